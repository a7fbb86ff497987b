"""The loss against float64 NumPy, and at the values that break a careless one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alibi_jax.training.loss import summed_loss, target_mask, token_losses

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


def cross_entropy(logits, targets):
    given = np.take_along_axis(logits.astype(np.float64), targets[..., None], -1)[..., 0]
    return log_z(logits) - given


@pytest.mark.parametrize("scale", [1.0, 30.0, 1e4])
def test_token_losses(scale):
    logits, tokens = make(scale)
    losses = token_losses(jnp.asarray(logits), jnp.asarray(tokens[:, 1:]))
    assert losses.shape == (BATCH, LENGTH) and losses.dtype == jnp.float32
    expected = cross_entropy(logits, tokens[:, 1:])
    np.testing.assert_allclose(losses, expected, rtol=1e-6, atol=1e-6 * max(scale, 1.0))


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_token_losses_of_one_huge_logit(sign):
    logits = np.zeros((1, 2, VOCAB), np.float32)
    logits[..., 3] = sign * 1e4
    targets = jnp.asarray([[3, 5]], jnp.int32)
    expected = cross_entropy(logits, np.asarray(targets))
    np.testing.assert_allclose(token_losses(jnp.asarray(logits), targets), expected, rtol=1e-6)
    grads = jax.grad(lambda x: jnp.sum(token_losses(x, targets)))(jnp.asarray(logits))
    assert np.isfinite(grads).all()


def test_bfloat16_logits_are_reduced_in_float32():
    logits, tokens = make()
    half = jnp.asarray(logits).astype(jnp.bfloat16)
    losses = token_losses(half, jnp.asarray(tokens[:, 1:]))
    assert losses.dtype == jnp.float32
    expected = cross_entropy(np.asarray(half.astype(jnp.float32)), tokens[:, 1:])
    np.testing.assert_allclose(losses, expected, rtol=1e-6, atol=1e-6)


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
    total, sums = summed_loss(
        jnp.asarray(logits), jnp.asarray(tokens), jnp.asarray(segment_ids), z_loss
    )
    mask = (segment_ids[:, 1:] == segment_ids[:, :-1]) & (segment_ids[:, 1:] != 0)
    nats = (mask * cross_entropy(logits, tokens[:, 1:])).sum()
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
        return summed_loss(logits, jnp.asarray(tokens), segment_ids, z_loss)

    (total, sums), grads = jax.value_and_grad(loss, has_aux=True)(jnp.asarray(logits))
    assert total == sums["nats"] == sums["tokens"] == 0.0
    np.testing.assert_array_equal(grads, np.zeros_like(logits))
