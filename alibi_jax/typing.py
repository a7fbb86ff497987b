"""The axis alphabet and the array types, declared once.

B batch, T query length, S key length, H query heads, K key/value heads, D head dim,
Dv value head dim (D unless said), M model (embedding) dim, V vocabulary.
"""

from jaxtyping import Array, Float, Int

Slopes = Float[Array, "H"]
Query = Float[Array, "B T H D"]
Key = Float[Array, "B S K D"]
Value = Float[Array, "B S K Dv"]
Attended = Float[Array, "B T H Dv"]
Bias = Float[Array, "*B H T S"]
QueryPositions = Int[Array, "*B T"]
KeyPositions = Int[Array, "*B S"]
SegmentIds = Int[Array, "B T"]

Tokens = Int[Array, "B T"]
Activations = Float[Array, "B T M"]
Logits = Float[Array, "B T V"]
