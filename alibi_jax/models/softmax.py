"""Cross-entropy over a vocabulary without the logits of all tokens at once.

The logits of a batch, f32[B, T, V], are often the largest array of a training step: 20 GB for 36
sequences of 512 tokens and 267,744 words. Each device takes its own tokens a chunk at a time and
computes their logits again in the backward pass, so only a chunk's are ever in memory.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from alibi_jax.sharding import replicate
from alibi_jax.typing import Activations, Array, Float, Int, Tokens

# On each device: 0.5 GB in float32. A batch with fewer is one chunk, whose logits are kept.
LOGITS_AT_ONCE = 1 << 27

# Of each token: nats of cross-entropy, and the log-normaliser of the logits that z-loss is of.
Losses = tuple[Float[Array, "..."], Float[Array, "..."]]


def cross_entropy(logits: Float[Array, "N V"], targets: Int[Array, "N"]) -> Losses:
    """Cross-entropy of each target in nats, f32[N], and the logsumexp of its logits, f32[N]."""
    logits = logits.astype(jnp.float32)
    target_logits = jnp.take_along_axis(logits, targets[:, None], axis=-1)[:, 0]
    log_z = jax.nn.logsumexp(logits, axis=-1)
    return log_z - target_logits, log_z


def softmax_losses(
    hidden: Activations, head: Float[Array, "V M"], targets: Tokens, scale: float
) -> Losses:
    """Cross-entropy of the targets where logits are scale * hidden @ head.T: two f32[B, T]."""

    def losses(tokens, head):
        def chunk(hidden, targets):
            return cross_entropy(scale * class_logits(hidden, head), targets)

        return in_chunks(chunk, tokens, num_classes=head.shape[0])

    return on_each_device(losses, (hidden, targets), head)


def class_logits(hidden: Float[Array, "N D"], table: Float[Array, "V D"]) -> Float[Array, "N V"]:
    """Logits hidden @ table.T in hidden's dtype, accumulated and returned in float32."""
    return jnp.einsum(
        "nd,vd->nv", hidden, table.astype(hidden.dtype), preferred_element_type=jnp.float32
    )


def on_each_device(
    losses: Callable[[Any, Any], Losses], tokens: tuple[Array, ...], weights: Any
) -> Losses:
    """Calls `losses(tokens, weights)` on each device's own tokens, with all of the weights.

    Gradients of the weights are summed over devices once, after the last chunk.

    Args:
      losses: From [N, ...] arrays and the weights to two f32[N].
      tokens: Arrays [B, T, ...], divided over devices as the first of them is.
      weights: A tree of arrays.

    Returns:
      Two f32[B, T].
    """

    def local(tokens, weights):
        batch, length = tokens[0].shape[:2]
        flat = tuple(jnp.asarray(x).reshape(batch * length, *x.shape[2:]) for x in tokens)
        nats, log_z = losses(flat, weights)
        return nats.reshape(batch, length), log_z.reshape(batch, length)

    if not jax.sharding.get_abstract_mesh().explicit_axes:
        return local(tokens, weights)
    of_tokens = PartitionSpec(*jax.typeof(tokens[0]).sharding.spec[:2])
    axes = tuple(jax.tree.leaves(tuple(of_tokens)))

    def spread(tokens, weights):
        # Said here, once: left to where a weight is used, the sum over devices of its gradient
        # would be in the loop over chunks.
        return local(tokens, jax.lax.pcast(weights, axes, to="varying") if axes else weights)

    return jax.shard_map(
        spread, in_specs=(of_tokens, PartitionSpec()), out_specs=(of_tokens, of_tokens)
    )(jax.sharding.reshard(tokens, of_tokens), jax.tree.map(replicate, weights))


def in_chunks(
    losses: Callable[..., Losses], tokens: tuple[Array, ...], *, num_classes: int
) -> Losses:
    """Calls `losses(*tokens)` on as many tokens at a time as `LOGITS_AT_ONCE` allows.

    Args:
      losses: From [n, ...] arrays to two f32[n], token by token.
      tokens: Arrays [N, ...] of one device.
      num_classes: Logits of each token.

    Returns:
      Two f32[N].
    """
    num_tokens = len(tokens[0])
    num_chunks = math.ceil(num_tokens / max(1, LOGITS_AT_ONCE // num_classes))
    if num_chunks == 1:
        return losses(*tokens)
    size = math.ceil(num_tokens / num_chunks)
    padding = num_chunks * size - num_tokens

    def split(x: Array) -> Array:
        padded = jnp.pad(x, ((0, padding), *((0, 0),) * (x.ndim - 1)))
        return padded.reshape(num_chunks, size, *x.shape[1:])

    chunk = jax.checkpoint(lambda tokens: losses(*tokens))
    nats, log_z = jax.lax.map(chunk, tuple(map(split, tokens)))
    return nats.reshape(-1)[:num_tokens], log_z.reshape(-1)[:num_tokens]
