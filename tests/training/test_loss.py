"""The loss of a batch against float64 NumPy: what counts, and what does not."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alibi_jax.models.softmax import cross_entropy
from alibi_jax.training.loss import summed_loss, target_mask

BATCH, LENGTH, VOCAB = 3, 7, 11


def make(scale=1.0, seed=0):
    rng = np.random.default_rng(seed)
    logits = scale * rng.standard_normal((BATCH, LENGTH, VOCAB))
    tokens = rng.integers(0, VOCAB, (BATCH, LENGTH + 1), dtype=np.int32)
    return logits.astype(np.float32), tokens


def log_z(logits):
    logits = logits.astype(np.float64)
    largest = logits.max(-1)
    return largest + np.log(np.exp(logits - largest[..., None]).sum(-1))


def exact(logits, targets):
    given = np.take_along_axis(logits.astype(np.float64), targets[..., None], -1)[..., 0]
    return log_z(logits) - given


def token_losses(logits, targets):
    flat = cross_entropy(logits.reshape(-1, VOCAB), targets.reshape(-1))
    return tuple(x.reshape(targets.shape) for x in flat)


@pytest.mark.parametrize(
    ("segment_ids", "expected"),
    [
        ([1, 1, 1, 1], [1, 1, 1]),
        ([1, 1, 2, 2], [1, 0, 1]),  # the first token of a document is no target
        ([1, 2, 3, 4], [0, 0, 0]),
        ([1, 1, 0, 0], [1, 0, 0]),  # padding is no target, and none follows from it
        ([0, 0, 1, 1], [0, 0, 1]),
        ([0, 0, 0, 0], [0, 0, 0]),
        ([2, 2, 1, 1], [1, 0, 1]),  # ids need not rise
    ],
)
def test_target_mask(segment_ids, expected):
    mask = target_mask(jnp.asarray([segment_ids], jnp.int32))
    assert mask.dtype == jnp.float32
    np.testing.assert_array_equal(mask, [expected])


@pytest.mark.parametrize("scale", [1.0, 1e4])
@pytest.mark.parametrize("z_loss", [0.0, 1e-3])
def test_summed_loss(scale, z_loss):
    logits, tokens = make(scale)
    segment_ids = np.array([[1] * 8, [1, 1, 1, 2, 2, 0, 0, 0], [0] * 8], np.int32)
    losses = token_losses(jnp.asarray(logits), jnp.asarray(tokens[:, 1:]))
    total, sums = summed_loss(losses, jnp.asarray(segment_ids), z_loss)
    mask = (segment_ids[:, 1:] == segment_ids[:, :-1]) & (segment_ids[:, 1:] != 0)
    nats = (mask * exact(logits, tokens[:, 1:])).sum()
    expected = nats + z_loss * (mask * log_z(logits) ** 2).sum()
    assert int(sums["tokens"]) == mask.sum() == 10
    np.testing.assert_allclose(sums["nats"], nats, rtol=1e-6)
    np.testing.assert_allclose(total, expected, rtol=1e-6)
    if z_loss:  # and the metric is free of it
        assert abs(total - sums["nats"]) > 1e-3


@pytest.mark.parametrize("z_loss", [0.0, 1e-3])
def test_padding_alone_gives_no_loss_and_no_gradient(z_loss):
    logits, tokens = make(1e4)
    segment_ids = jnp.zeros((BATCH, LENGTH + 1), jnp.int32)

    def loss(logits):
        losses = token_losses(logits, jnp.asarray(tokens[:, 1:]))
        return summed_loss(losses, segment_ids, z_loss)

    (total, sums), grads = jax.value_and_grad(loss, has_aux=True)(jnp.asarray(logits))
    assert total == sums["nats"] == sums["tokens"] == 0.0
    np.testing.assert_array_equal(grads, np.zeros_like(logits))


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e38])
@pytest.mark.parametrize("z_loss", [0.0, 1e-3])
def test_what_is_masked_does_not_matter(value, z_loss):
    """Neither in the sums nor in gradients, whatever stands there; a target of nan poisons both."""
    segment_ids = jnp.asarray([[1, 1, 2, 2, 0, 0]], jnp.int32)
    masked = np.array([[False, True, False, True, True]])
    losses = np.random.default_rng(0).uniform(1, 2, (2, 1, 5)).astype(np.float32)

    def total(nats, log_z):
        return summed_loss((nats, log_z), segment_ids, z_loss)[0]

    both = jax.value_and_grad(total, argnums=(0, 1))
    expected = both(*jnp.asarray(losses))
    found = both(*jnp.asarray(np.where(masked, value, losses).astype(np.float32)))
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(found))
    losses[0, 0, 0] = np.nan
    assert np.isnan(total(*jnp.asarray(losses)))
