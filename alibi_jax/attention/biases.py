"""What `attention` can add to its logits: functions of distance, and differences of prefix sums.

- `LinearBias` is ALiBi, `-slope * distance`; an array of slopes means this one.
- `DistanceBias` is any other function of the distance (and, if it likes, of the query's position).
- `PrefixBias` is `c_i - c_j` with c the cumulative sum of one number a token, as in the Forgetting
  Transformer: decay that depends on the data. Constant log gates of -slope are ALiBi.

All are pytrees: parameters are their leaves, what is static their structure. `dense` gives all of
a bias. An implementation that goes by tiles takes it apart into what belongs to a head and what to
a token (`parts`), cuts out what a tile needs, and asks `at` for the bias and `most` for a bound.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.tree_util import register_dataclass
from jaxtyping import Float, Int

from alibi_jax.attention.placement import whole_length
from alibi_jax.bias import check_slopes, distance_bias, float_dtype
from alibi_jax.typing import Slopes

Head = Any  # parameters of one head: `of_heads` without its leading axis
Pairs = Float[Array, "t s"]
Distances = Int[Array, "t s"]


class Prefix(NamedTuple):
    """Cumulative sums as unevaluated sums of two floats, `high + low`: see `prefix_sums`."""

    high: Float[Array, "B L H"]
    low: Float[Array, "B L H"]


class Parts(NamedTuple):
    """The arrays of a bias, by what they belong to: pytrees, or None. Gradients look the same."""

    heads: Any = None  # [H, ...]
    queries: Any = None  # [B, T, H]
    keys: Any = None  # [B, S, H]


@partial(register_dataclass, data_fields=["slopes"], meta_fields=["sink"])
@dataclass(frozen=True)
class LinearBias:
    """ALiBi: `-slope * distance` (Press, Smith, Lewis, ICLR 2022, section 3).

    Slopes alone mean the same; this one can have a sink:

    >>> import jax.numpy as jnp
    >>> from alibi_jax import LinearBias, attention, slopes
    >>> x = jnp.ones((1, 64, 2, 16))
    >>> attention(x, x, x, LinearBias(slopes(2), sink=True)).shape
    (1, 64, 2, 16)

    Attributes:
      slopes: floating [H], finite and at least 0.
      sink: whether the first key of the row (index 0) is at distance 0 from every query: no
        penalty, and no window hides it. Masks by causality and segments stay.
    """

    slopes: Slopes
    sink: bool = False

    @property
    def parts(self) -> Parts:
        """The slopes, which belong to heads."""
        return Parts(heads=self.slopes)

    def with_parts(self, parts: Parts) -> "LinearBias":
        """Return the bias that has other parts, or its gradient that has theirs."""
        return LinearBias(parts.heads, self.sink)

    bounded = True

    def at(
        self, head: Head, query: None, key: None, distance: Distances, query_position: Array
    ) -> Pairs:
        """Return the bias of one head at distances >= 0."""
        return -head * distance.astype(head.dtype)

    def most(self, head: Head, query: None, key: None, distance: Distances) -> Pairs:
        """Return the largest bias of a head between two tiles at least that far apart."""
        return self.at(head, query, key, distance, distance)

    def dense(
        self, distance: Int[Array, "#B T S"], query_positions: Int[Array, "#B T"]
    ) -> Float[Array, "#B H T S"]:
        """Return the bias of all heads at distances >= 0."""
        return distance_bias(self.slopes, distance, kind="symmetric")


@partial(register_dataclass, data_fields=["params"], meta_fields=["function", "upper"])
@dataclass(frozen=True)
class DistanceBias:
    """Any function of the distance, with parameters a head.

    One that falls everywhere is its own bound, and far keys then cost nothing at any length:

    >>> import jax.numpy as jnp
    >>> from alibi_jax import DistanceBias, attention
    >>> def log(p, distance, query_position=None):
    ...     return -p * jnp.log1p(distance.astype(p.dtype))
    >>> bias = DistanceBias(log, params=jnp.array([4.0, 2.0]), upper=log)
    >>> x = jnp.ones((1, 64, 2, 16))
    >>> attention(x, x, x, bias).shape
    (1, 64, 2, 16)

    Attributes:
      function: `(params of one head, distance i32[t, s], query_position i32[t, 1]) -> f32[t, s]`.
        Elementwise in the distance, which is at least 0, with the position broadcast against it:
        both may come transposed, [s, t] and [1, t]. Parameters come in the dtype to compute in, and
        so must what it returns; it must be finite, with finite derivatives. It is static: give the
        same object in every call, or each compiles anew.
      params: a pytree of floating arrays [H, ...].
      upper: `(params of one head, distance i32[n, m]) -> f32[n, m]`: at least the bias at *every*
        distance that is not less than this one, whatever the query's position. It decides which
        keys are too far to matter. None: there is no bound, and only keys that no query sees are
        left out.
    """

    function: Callable[[Head, Array, Array], Array]
    params: Any
    upper: Callable[[Head, Array], Array] | None = None

    @property
    def parts(self) -> Parts:
        """The parameters, which belong to heads."""
        return Parts(heads=self.params)

    def with_parts(self, parts: Parts) -> "DistanceBias":
        """Return the bias that has other parts, or its gradient that has theirs."""
        return DistanceBias(self.function, parts.heads, self.upper)

    @property
    def bounded(self) -> bool:
        """Whether there is a bound, `most`."""
        return self.upper is not None

    def at(
        self, head: Head, query: None, key: None, distance: Distances, query_position: Array
    ) -> Pairs:
        """Return the bias of one head at distances >= 0."""
        return self.function(head, distance, query_position)

    def most(self, head: Head, query: None, key: None, distance: Distances) -> Pairs:
        """Return at least the largest bias of a head between two tiles at least that far apart."""
        assert self.upper is not None, "a bias that is not bounded"
        return self.upper(head, distance)

    def dense(
        self, distance: Int[Array, "#B T S"], query_positions: Int[Array, "#B T"]
    ) -> Float[Array, "#B H T S"]:
        """Return the bias of all heads at distances >= 0."""
        of_heads = jax.vmap(self.function, in_axes=(0, None, None))
        position = jnp.broadcast_to(query_positions, distance.shape[:2])[..., None]
        return jax.vmap(of_heads, in_axes=(None, 0, 0))(self.params, distance, position)


@partial(register_dataclass, data_fields=["query", "key"], meta_fields=[])
@dataclass(frozen=True)
class PrefixBias:
    """`c_i - c_j`, a difference of cumulative sums (Forgetting Transformer, Lin et al., ICLR 2025).

    With c the cumulative sum of log forget gates it is the log of all gates from key j on, j
    excluded, up to query i: what is left of the key (arXiv:2503.02130, section 3). Made by
    `from_log_gates`, or of parts where prefixes of earlier keys are cached (`prefix_sums`).

    >>> import jax, jax.numpy as jnp
    >>> from alibi_jax import PrefixBias, attention
    >>> x = jnp.ones((1, 64, 2, 16))
    >>> log_gates = jax.nn.log_sigmoid(jax.random.normal(jax.random.key(0), (1, 64, 2)))
    >>> attention(x, x, x, PrefixBias.from_log_gates(log_gates)).shape
    (1, 64, 2, 16)

    Softmax ignores what a whole row shares, so the derivative in the query's side is 0, and is
    given as 0.

    Attributes:
      query: the sums up to and including each query's own token, [B, T, H].
      key: those of the keys, [B, S, H].
    """

    query: Prefix
    key: Prefix

    @classmethod
    def from_log_gates(
        cls, log_gates: Float[Array, "B S H"], *, num_queries: int | None = None
    ) -> "PrefixBias":
        """Return the bias for log gates of all S keys, of which the last `num_queries` query.

        Args:
          log_gates: floating [B, S, H], finite, at most 0: one for each token and query head. That
            of the first token changes nothing.
          num_queries: T, from 1 to S; S if None.
        """
        key = prefix_sums(log_gates)
        if num_queries is None:
            return cls(key, key)
        if not 1 <= num_queries <= log_gates.shape[1]:
            raise ValueError(
                f"num_queries must be from 1 to the number of keys, {log_gates.shape[1]}, "
                f"got {num_queries}"
            )
        return cls(Prefix(*(x[:, -num_queries:] for x in key)), key)

    @property
    def parts(self) -> Parts:
        """The sums, which belong to tokens."""
        return Parts(queries=self.query, keys=self.key)

    def with_parts(self, parts: Parts) -> "PrefixBias":
        """Return the bias that has other parts, or its gradient that has theirs."""
        return PrefixBias(parts.queries, parts.keys)

    bounded = True

    def at(
        self, head: None, query: Prefix, key: Prefix, distance: Array, query_position: Array
    ) -> Array:
        """Return the bias for sums [..., t, 1] of queries and [..., 1, s] of keys."""
        query = jax.lax.stop_gradient(query)  # exactly 0: see above
        # The difference of the high parts is exact, or as large as its own rounding allows.
        return (query.high - key.high) + (query.low - jax.lax.stop_gradient(key.low))

    def most(self, head: None, query: Prefix, key: Prefix, distance: Array) -> Array:
        """Return the largest bias between tiles of queries, sums [n, t], and of keys, [m, s]."""
        first, last = _largest(query), _largest(jax.tree.map(jnp.negative, key))
        smallest = jax.tree.map(lambda x: -x.T, last)
        return self.at(None, first, smallest, distance, distance)

    def dense(
        self, distance: Int[Array, "#B T S"], query_positions: Int[Array, "#B T"]
    ) -> Float[Array, "B H T S"]:
        """Return the bias of all heads."""
        query = jax.tree.map(lambda x: x.swapaxes(1, 2)[..., :, None], self.query)
        key = jax.tree.map(lambda x: x.swapaxes(1, 2)[..., None, :], self.key)
        return self.at(None, query, key, distance, query_positions)


Bias = LinearBias | DistanceBias | PrefixBias


def as_bias(
    bias: Bias | Slopes, dtype: jnp.dtype, batch: int, heads: int, lengths: tuple[int, int]
) -> Bias:
    """Return the bias for attention in a dtype, after a check that its shapes fit.

    Raises:
      TypeError: something is not floating.
      ValueError: a shape does not fit, slopes have a value that is not allowed, or the functions
        of a DistanceBias do not return one number for each distance.
    """
    if isinstance(bias, PrefixBias):
        for name, prefix, length in zip(
            ("query", "key"), (bias.query, bias.key), lengths, strict=True
        ):
            shapes = [jnp.shape(x) for x in prefix]
            if any(shape != (batch, length, heads) for shape in shapes):
                raise ValueError(
                    f"the PrefixBias must have sums [batch, length, query heads] of each {name}, "
                    f"{(batch, length, heads)}; got {shapes[0]}"
                )
    elif isinstance(bias, DistanceBias):
        if not jax.tree.leaves(bias.params):
            raise ValueError("the params of a DistanceBias must hold at least one array [H, ...]")
        for leaf in jax.tree.leaves(bias.params):
            if jnp.ndim(leaf) == 0 or len(leaf) != heads:
                raise ValueError(
                    "every array in the params of a DistanceBias must have one entry for each "
                    f"query head, [{heads}, ...]; got {jnp.shape(leaf)}"
                )
    else:
        bias = bias if isinstance(bias, LinearBias) else LinearBias(bias)
        bias = LinearBias(check_slopes(bias.slopes), bias.sink)
        if bias.slopes.shape != (heads,):
            raise ValueError(
                "slopes must have one value for each query head, "
                f"({heads},); got {bias.slopes.shape}"
            )
    bias = jax.tree.map(jnp.asarray, bias)
    for leaf in jax.tree.leaves(bias):
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise TypeError(
                f"the arrays of a {type(bias).__name__} must be floating, got {leaf.dtype}"
            )
    wide: Bias = jax.tree.map(lambda x: x.astype(float_dtype(dtype)), bias)
    if isinstance(wide, DistanceBias):
        _check_functions(wide, float_dtype(dtype))
    return wide


def _check_functions(bias: DistanceBias, dtype: jnp.dtype) -> None:
    """Raise a ValueError unless function and upper return one number for each distance."""
    head = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), bias.params)
    distance, position = (jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((2, 3), (2, 1)))
    results = {"function": jax.eval_shape(bias.function, head, distance, position)}
    if bias.upper is not None:
        results["upper"] = jax.eval_shape(bias.upper, head, distance)
    for name, result in results.items():
        found = [f"{x.dtype}{[*x.shape]}" for x in jax.tree.leaves(result)]
        if found != [f"{dtype}[2, 3]"]:
            raise ValueError(
                f"the {name} of a DistanceBias must return an array of the shape of the distances "
                f"and the dtype of the params, {dtype}[2, 3] for int32[2, 3]; got "
                f"{' and '.join(found) or None}"
            )


def has_sink(bias: Bias) -> bool:
    """Whether the first key of the row is at distance 0 from every query."""
    return isinstance(bias, LinearBias) and bias.sink


def with_sink(bias: Bias, distance: Int[Array, "#B T S"]) -> Int[Array, "#B T S"]:
    """Return distances to all keys of a row, that of the first one 0 if it is a sink."""
    if not has_sink(bias):
        return distance
    first = jnp.arange(distance.shape[-1], dtype=jnp.int32)[None, None] == 0
    return jnp.where(first, 0, distance)


def beyond_slopes(bias: Bias, window: Array | None) -> str | None:
    """Return what a kernel for `-slope * distance` alone cannot do, or None if it can do all."""
    if not isinstance(bias, LinearBias):
        return type(bias).__name__
    if has_sink(bias):
        return "sink"
    return None if window is None else "window"


def prefix_sums(log_gates: Float[Array, "B L H"], start: Prefix | None = None) -> Prefix:
    """Return the cumulative sums over axis 1, so exact that their differences are right to float32.

    At 100,000 tokens a sum in one float32 may be 50,000 and off by 0.004, and so would be the bias
    between neighbours. Two floats, whose sum has twice the digits, keep it (Dekker, 1971).

    Tokens that come later go on from the last sums:

    >>> import jax, jax.numpy as jnp
    >>> from alibi_jax import prefix_sums
    >>> log_gates = jnp.full((1, 6, 2), -0.5)
    >>> first = prefix_sums(log_gates[:, :4])
    >>> rest = prefix_sums(log_gates[:, 4:], jax.tree.map(lambda x: x[:, -1:], first))
    >>> rest.high[0, :, 0]
    Array([-2.5, -3. ], dtype=float32)

    Args:
      log_gates: floating [B, L, H], finite.
      start: the sums up to the token before the first, [B, 1, H], for example the last of what is
        cached; 0 if None.

    Returns:
      The sums up to and including each token, f32[B, L, H], or float64 for float64. Their
      derivative is that of a cumulative sum and belongs to `high`; `low` has none.

    Raises:
      TypeError: `log_gates` are not floating.
      ValueError: they are not [B, L, H], or `start` is not [B, 1, H].
    """
    log_gates = jnp.asarray(log_gates)
    if not jnp.issubdtype(log_gates.dtype, jnp.floating):
        raise TypeError(f"log_gates must be floating, got {log_gates.dtype}")
    if log_gates.ndim != 3:
        raise ValueError(f"log_gates must be [batch, length, heads], got {log_gates.shape}")
    log_gates = whole_length(log_gates.astype(float_dtype(log_gates.dtype)))
    if start is None:
        start = Prefix(*(jnp.zeros_like(log_gates[:, :1]),) * 2)
    for part in start:
        if part.shape != log_gates[:, :1].shape:
            raise ValueError(
                f"start must have the sums before the first token, {log_gates[:, :1].shape}; "
                f"got {part.shape}"
            )
    return _prefix_sums(log_gates, start)


@jax.custom_jvp
@jax.jit  # op by op it takes many times as long
def _prefix_sums(x: Array, start: Prefix) -> Prefix:
    sums = jax.lax.associative_scan(_add, Prefix(x, jnp.zeros_like(x)), axis=1)
    return _add(jax.tree.map(lambda s: jnp.broadcast_to(s, x.shape), start), sums)


@_prefix_sums.defjvp
def _prefix_sums_jvp(primals, tangents):
    of_x, of_start = tangents
    # Linear, so that the reverse is a cumulative sum from the end.
    of_high = of_start.high + jax.lax.cumsum(of_x, axis=1)
    return _prefix_sums(*primals), Prefix(of_high, jnp.zeros_like(of_high))


def _add(a: Prefix, b: Prefix) -> Prefix:
    """Return the sum of two pairs, where high is the nearest float to it (Knuth's two-sum)."""
    high = a.high + b.high
    of_b = high - a.high
    low = (a.high - (high - of_b)) + (b.high - of_b) + (a.low + b.low)
    total = high + low
    return Prefix(total, low - (total - high))


def _largest(x: Prefix) -> Prefix:
    """Return the largest of each row, [n, 1]: high is the nearest float, so it goes before low."""
    # A maximum on a CPU may pass over NaN, of which nothing is known.
    high = jnp.where(jnp.isnan(x.high), jnp.inf, x.high).max(axis=-1, keepdims=True)
    low = jnp.where(x.high == high, x.low, -jnp.inf).max(axis=-1, keepdims=True)
    return Prefix(high, low)
