"""The loss of a batch from the losses of its tokens."""

import jax.numpy as jnp

from alibi_jax.models.softmax import Losses
from alibi_jax.typing import Array, Float, Int


def target_mask(segment_ids: Int[Array, "B T+1"]) -> Float[Array, "B T"]:
    """1.0 where token t+1 is a target for token t: both of one document, and no padding (id 0)."""
    current, following = segment_ids[:, :-1], segment_ids[:, 1:]
    return ((current == following) & (following > 0)).astype(jnp.float32)


def summed_loss(
    losses: Losses, segment_ids: Int[Array, "B T+1"], z_loss: float
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """Loss of a batch as sums, so that microbatches add up to the loss of the whole.

    Args:
      losses: cross-entropy and log-normaliser of each token, as `Decoder.token_losses` gives them.
      segment_ids: i32[B, T+1]; 0 marks padding.
      z_loss: weight of the squared log-normaliser (PaLM, Chowdhery et al. 2022, section 5).

    Returns:
      The sum to minimise, and {"nats": sum of cross-entropies, "tokens": number of targets}.
    """
    mask = target_mask(segment_ids)
    # Chosen, not multiplied: 0 * inf is nan, in the sum and, after the square, in the gradient.
    token_nats, log_z = (jnp.where(mask > 0, values, 0.0) for values in losses)
    nats = jnp.sum(token_nats)
    total = nats
    if z_loss:
        total = nats + z_loss * jnp.sum(jnp.square(log_z))
    return total, {"nats": nats, "tokens": jnp.sum(mask)}
