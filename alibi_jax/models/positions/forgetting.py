"""Decay that depends on the data (Forgetting Transformer, Lin et al., ICLR 2025, arXiv:2503.02130).

Each head has a forget gate, f_t = sigmoid(w.x_t + b) of the input of attention at token t, and the
bias of query i and key j is the sum of log f over the tokens after j, up to i (section 3). With
gates that are constant it is ALiBi. As in the authors' code w is drawn as the other projections
are, and b starts at 0; the gates are float32. Each layer has its own.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from alibi_jax.attention.biases import Bias, Prefix, PrefixBias, prefix_sums
from alibi_jax.models.config import DecoderConfig
from alibi_jax.models.layers import Linear
from alibi_jax.models.positions.base import Position, own_stream
from alibi_jax.sharding import spec
from alibi_jax.typing import Activations, Slopes


class Forgetting(Position):
    """A bias by prefix sums of log gates."""

    @staticmethod
    def layer(config: DecoderConfig, rngs: nnx.Rngs) -> nnx.Module:
        """The projection to the gates of a layer: f32[M, H] and f32[H]."""
        return Linear(
            "btm,mh->bth",
            own_stream(rngs),
            (config.embed_dim, config.num_heads),
            ("embed", "heads"),
            num_inputs=1,
            std=config.embed_dim**-0.5,
            use_bias=True,
        )

    def bias(self, layer: Any, x: Activations, length: int, before: Prefix | None) -> Slopes | Bias:
        """The prefix sums of the tokens of x, queries and keys alike."""
        log_gates = jax.nn.log_sigmoid(layer(x.astype(jnp.float32)))
        whole = spec("batch", None, "heads")  # a sum goes over the whole length
        log_gates = log_gates if whole is None else jax.sharding.reshard(log_gates, whole)
        sums = prefix_sums(log_gates, before)
        return PrefixBias(sums, sums)
