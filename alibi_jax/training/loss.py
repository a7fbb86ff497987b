"""Next-token cross-entropy, in float32."""

import jax
import jax.numpy as jnp

from alibi_jax.typing import Array, Float, Int, Logits, SegmentIds, Tokens


def token_losses(logits: Logits, targets: Tokens) -> Float[Array, "B T"]:
    """Cross-entropy of each target, f32[B, T] in nats."""
    logits = logits.astype(jnp.float32)
    target_logits = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits, axis=-1) - target_logits


def target_mask(segment_ids: Int[Array, "B T+1"]) -> Float[Array, "B T"]:
    """1.0 where token t+1 is a target for token t: both of one document, and no padding (id 0)."""
    current, following = segment_ids[:, :-1], segment_ids[:, 1:]
    return ((current == following) & (following > 0)).astype(jnp.float32)


def summed_loss(
    logits: Logits, tokens: Int[Array, "B T+1"], segment_ids: SegmentIds, z_loss: float
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """Loss of a batch as sums, so that microbatches add up to the loss of the whole.

    Args:
      logits: f32[B, T, V], of tokens[:, :-1].
      tokens: i32[B, T+1].
      segment_ids: i32[B, T+1]; 0 marks padding.
      z_loss: weight of logsumexp(logits)^2 (PaLM, Chowdhery et al. 2022, section 5).

    Returns:
      The sum to minimise, and {"nats": sum of cross-entropies, "tokens": number of targets}.
    """
    mask = target_mask(segment_ids)
    nats = jnp.sum(mask * token_losses(logits, tokens[:, 1:]))
    total = nats
    if z_loss:
        log_z = jax.nn.logsumexp(logits.astype(jnp.float32), axis=-1)
        total = nats + z_loss * jnp.sum(mask * jnp.square(log_z))
    return total, {"nats": nats, "tokens": jnp.sum(mask)}
