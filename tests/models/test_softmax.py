"""Cross-entropy in chunks: equal to float64, on any mesh, without the logits of all tokens."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alibi_jax.models import softmax
from alibi_jax.models.softmax import cross_entropy, softmax_losses
from alibi_jax.sharding import MeshConfig, make_mesh, spec

VOCAB = 11


def make(scale=1.0, seed=0, shape=(3, 7)):
    rng = np.random.default_rng(seed)
    logits = scale * rng.standard_normal((*shape, VOCAB))
    return logits.astype(np.float32), rng.integers(0, VOCAB, shape, dtype=np.int32)


def exact(logits, targets):
    """Cross-entropy and log-normaliser in float64."""
    logits = logits.astype(np.float64)
    largest = logits.max(-1)
    log_z = largest + np.log(np.exp(logits - largest[..., None]).sum(-1))
    return log_z - np.take_along_axis(logits, targets[..., None], -1)[..., 0], log_z


@pytest.mark.parametrize("scale", [1.0, 30.0, 1e4])
def test_cross_entropy(scale):
    logits, targets = make(scale, shape=(21,))
    nats, log_z = cross_entropy(jnp.asarray(logits), jnp.asarray(targets))
    assert nats.shape == log_z.shape == (21,) and nats.dtype == log_z.dtype == jnp.float32
    for actual, expected in zip((nats, log_z), exact(logits, targets), strict=True):
        np.testing.assert_allclose(actual, expected, rtol=1e-6, atol=1e-6 * max(scale, 1.0))


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_cross_entropy_of_one_huge_logit(sign):
    logits = np.zeros((2, VOCAB), np.float32)
    logits[..., 3] = sign * 1e4
    targets = jnp.asarray([3, 5], jnp.int32)
    nats, _ = cross_entropy(jnp.asarray(logits), targets)
    np.testing.assert_allclose(nats, exact(logits, np.asarray(targets))[0], rtol=1e-6)
    grads = jax.grad(lambda x: jnp.sum(cross_entropy(x, targets)[0]))(jnp.asarray(logits))
    assert np.isfinite(grads).all()


def test_bfloat16_logits_are_reduced_in_float32():
    logits, targets = make(shape=(21,))
    half = jnp.asarray(logits).astype(jnp.bfloat16)
    nats, _ = cross_entropy(half, jnp.asarray(targets))
    assert nats.dtype == jnp.float32
    expected, _ = exact(np.asarray(half.astype(jnp.float32)), targets)
    np.testing.assert_allclose(nats, expected, rtol=1e-6, atol=1e-6)


HIDDEN, HEAD = np.random.default_rng(1).standard_normal((2, 8, 8, 6)).astype(np.float32)
HEAD = HEAD.reshape(-1, 6)[:VOCAB]
TARGETS = np.random.default_rng(2).integers(0, VOCAB, (8, 8), dtype=np.int32)
WEIGHTS = np.random.default_rng(3).standard_normal((2, 8, 8)).astype(np.float32)


def weighted(hidden, head, targets, scale=0.7):
    nats, log_z = softmax_losses(hidden, head, targets, scale)
    return jnp.sum(WEIGHTS[0] * nats) + jnp.sum(WEIGHTS[1] * log_z)


def weighted_exactly(hidden, head):
    """Value and gradients in float64."""
    logits = 0.7 * hidden.astype(np.float64) @ head.T.astype(np.float64)
    nats, log_z = exact(logits, TARGETS)
    p = np.exp(logits - log_z[..., None])
    of_logits = WEIGHTS.sum(0)[..., None] * p - WEIGHTS[0][..., None] * np.eye(VOCAB)[TARGETS]
    grads = 0.7 * of_logits @ head, 0.7 * np.einsum("btv,btm->vm", of_logits, hidden)
    return (WEIGHTS[0] * nats).sum() + (WEIGHTS[1] * log_z).sum(), grads


# Logits at once: all; three tokens of 64, so that the last chunk is padded; fewer than a token's.
@pytest.mark.parametrize("at_once", [1 << 27, 3 * VOCAB, 5])
@pytest.mark.parametrize("sizes", [None, (4, 2, 1), (2, 2, 2)])
def test_losses_and_gradients_against_float64(at_once, sizes, monkeypatch):
    monkeypatch.setattr(softmax, "LOGITS_AT_ONCE", at_once)
    run = jax.value_and_grad(weighted, (0, 1))
    if sizes is None:
        value, grads = jax.jit(run)(HIDDEN, HEAD, TARGETS)
    else:
        with jax.set_mesh(make_mesh(MeshConfig(*sizes))):
            hidden = jax.device_put(HIDDEN, spec("batch", None, None))
            head = jax.device_put(HEAD, spec(None, "embed"))
            targets = jax.device_put(TARGETS, spec("batch", None))
            value, grads = jax.jit(run)(hidden, head, targets)
            assert jax.typeof(grads[1]).sharding.spec == spec(None, "embed")
    expected_value, expected = weighted_exactly(HIDDEN, HEAD)
    np.testing.assert_allclose(value, expected_value, rtol=1e-5)
    for actual, truth in zip(grads, expected, strict=True):
        np.testing.assert_allclose(actual, truth, rtol=1e-4, atol=1e-5)


def test_weights_are_summed_over_devices_once_and_not_in_every_chunk(monkeypatch):
    """An all-reduce inside a loop over chunks would cost as much again for each chunk."""
    monkeypatch.setattr(softmax, "LOGITS_AT_ONCE", 2 * VOCAB)
    with jax.set_mesh(make_mesh(MeshConfig(8))):
        hidden = jax.device_put(HIDDEN, spec("batch", None, None))
        targets = jax.device_put(TARGETS, spec("batch", None))
        head = jax.device_put(HEAD, spec(None, None))
        compiled = jax.jit(jax.grad(weighted, (0, 1))).lower(hidden, head, targets).compile()
    text = compiled.as_text()
    assert " while(" in text
    reductions = [line for line in text.splitlines() if re.search(r" all-reduce(-start)?\(", line)]
    assert len(reductions) == 1 and "while" not in reductions[0], reductions


def test_memory_does_not_hold_the_logits_of_all_tokens(monkeypatch):
    num_tokens, vocab = 64 * 64, 1000
    all_logits = 4 * num_tokens * vocab
    shapes = [
        jax.ShapeDtypeStruct(shape, dtype)
        for shape, dtype in (
            ((64, 64, 4), jnp.float32),
            ((vocab, 4), jnp.float32),
            ((64, 64), jnp.int32),
        )
    ]

    def temporaries(at_once):
        monkeypatch.setattr(softmax, "LOGITS_AT_ONCE", at_once)

        def loss(hidden, head, targets):
            return jnp.sum(softmax_losses(hidden, head, targets, 1.0)[0])

        compiled = jax.jit(jax.grad(loss, (0, 1))).lower(*shapes).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporaries(1 << 27) >= all_logits
    assert temporaries(num_tokens * vocab // 32) < all_logits / 4
