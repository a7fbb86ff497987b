"""Schedules against their formulas, the decay mask on a real decoder, AdamW against NumPy."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from alibi_jax.config import OptimizerConfig
from alibi_jax.errors import UserError
from alibi_jax.models import Decoder, DecoderConfig
from alibi_jax.training.optimizer import decay_mask, learning_rate_schedule, make_optimizer

PEAK, FINAL = 3e-3, 0.2


def formula(name, step, warmup, num_steps):
    if step < warmup:
        return PEAK * step / warmup
    done = min((step - warmup) / max(num_steps - warmup, 1), 1.0)
    if name == "cosine":
        return PEAK * (FINAL + (1 - FINAL) * (1 + math.cos(math.pi * done)) / 2)
    if name == "wsd":  # the last fifth decays, after Hägele et al.: 1 - sqrt
        decay = max(1, round(num_steps / 5))
        done = max(step - (num_steps - decay), 0) / decay
        return PEAK * (FINAL + (1 - FINAL) * (1 - math.sqrt(done)))
    return PEAK * (1 - (1 - FINAL) * done) if name == "linear" else PEAK


@pytest.mark.parametrize("name", ["cosine", "linear", "constant", "wsd"])
@pytest.mark.parametrize(("warmup", "num_steps"), [(10, 100), (0, 100), (100, 100), (1, 2), (0, 1)])
def test_schedule(name, warmup, num_steps):
    if name == "wsd" and warmup == num_steps:
        return  # no room for a decay: refused by `Config.validate`
    config = OptimizerConfig(
        learning_rate=PEAK, schedule=name, warmup_steps=warmup, final_fraction=FINAL
    )
    with jax.numpy_dtype_promotion("standard"):  # as step.py does around optax
        schedule = learning_rate_schedule(config, num_steps)
        steps = {0, 1, warmup // 2, warmup, (warmup + num_steps) // 2, num_steps - 1, num_steps}
        for step in sorted(steps):
            expected = formula(name, step, warmup, num_steps)
            value = float(schedule(jnp.int32(step)))
            np.testing.assert_allclose(value, expected, rtol=1e-6, atol=1e-9, err_msg=str(step))


def test_wsd_by_hand():
    """100 steps, 10 of warm-up, 20 of decay to nothing: 1 - sqrt(5/20) = 0.5 at step 85."""
    config = OptimizerConfig(
        learning_rate=1.0, schedule="wsd", warmup_steps=10, decay_fraction=0.2, final_fraction=0.0
    )
    expected = {0: 0, 5: 0.5, 10: 1, 50: 1, 80: 1, 85: 0.5, 100: 0, 120: 0}
    assert config.decay_start(100) == 80 and OptimizerConfig().decay_start(100) is None
    with jax.numpy_dtype_promotion("standard"):
        schedule = learning_rate_schedule(config, 100)
        for step, value in expected.items():
            assert float(schedule(jnp.int32(step))) == pytest.approx(value, abs=1e-6), step


def test_schedule_landmarks():
    def at(name, step, **changes):
        config = OptimizerConfig(
            learning_rate=PEAK,
            schedule=name,
            warmup_steps=changes.get("warmup", 10),
            final_fraction=FINAL,
        )
        with jax.numpy_dtype_promotion("standard"):
            return float(learning_rate_schedule(config, 100)(jnp.int32(step)))

    for name in ("cosine", "linear", "constant", "wsd"):
        assert at(name, 0) == 0.0
        assert at(name, 10) == pytest.approx(PEAK)
        assert at(name, 0, warmup=0) == pytest.approx(PEAK)
        assert at(name, 100) == pytest.approx(PEAK * (1.0 if name == "constant" else FINAL))


MODELS = {
    "layernorm": {},
    "rmsnorm": {"norm": "rmsnorm", "gated_mlp": True, "mlp_dim": 24},
    "untied": {"tie_embeddings": False, "embed_norm": True, "qk_norm": "full"},
    "unrolled": {"scan_layers": False, "qk_norm": "per_head"},
}


@pytest.mark.parametrize("name", MODELS)
def test_decay_mask(name, to_numpy):
    config = DecoderConfig(num_layers=3, embed_dim=16, num_heads=2, vocab_size=32, **MODELS[name])
    decoder = nnx.eval_shape(lambda: Decoder(config, nnx.Rngs(0)))
    params = nnx.state(decoder, nnx.Param)
    mask = {
        jax.tree_util.keystr(path): value
        for path, value in jax.tree_util.tree_leaves_with_path(decay_mask(params))
    }
    assert len(mask) == len(jax.tree.leaves(params)) > 10
    for path, decayed in mask.items():
        matrix = any(word in path for word in ("kernel", "embedding", "head"))
        vector = any(word in path for word in ("bias", "scale"))
        assert matrix != vector, path
        assert decayed == matrix, path
    assert any("embedding" in path for path in mask)
    assert any("'head'" in path or ".head" in path for path in mask) == (name == "untied")
    stacked = jax.tree.leaves(params["blocks"])
    assert all(leaf.shape[0] == config.num_layers for leaf in stacked)  # biases have rank 2 or 3


@pytest.mark.parametrize("gradient_scale", [1e-3, 10.0])  # below the clip, and above
def test_adamw_against_numpy(gradient_scale):
    config = OptimizerConfig(
        learning_rate=1e-2,
        schedule="linear",
        warmup_steps=0,
        final_fraction=0.5,
        beta1=0.8,
        beta2=0.9,
        epsilon=1e-3,
        weight_decay=0.3,
        clip_norm=0.7,
    )
    num_steps = 4
    rng = np.random.default_rng(0)
    params = {"a": {"kernel": rng.standard_normal((3, 4)), "bias": rng.standard_normal(4)}}
    params = jax.tree.map(lambda x: x.astype(np.float32), params)
    gradients = [
        jax.tree.map(
            lambda x: (gradient_scale * rng.standard_normal(x.shape)).astype(np.float32), params
        )
        for _ in range(num_steps)
    ]

    optimizer = make_optimizer(config, num_steps)
    actual = jax.tree.map(jnp.asarray, params)
    state = optimizer.init(actual)
    for gradient in gradients:
        with jax.numpy_dtype_promotion("standard"):
            updates, state = optimizer.update(jax.tree.map(jnp.asarray, gradient), state, actual)
        actual = optax.apply_updates(actual, updates)

    expected = {name: value.astype(np.float64) for name, value in params["a"].items()}
    mean, square = (dict.fromkeys(expected, 0.0) for _ in range(2))
    clipped = []
    for count, gradient in enumerate(gradients):
        norm = math.sqrt(
            sum(float((g.astype(np.float64) ** 2).sum()) for g in gradient["a"].values())
        )
        clipped.append(norm > config.clip_norm)
        rate = config.learning_rate * (1 - 0.5 * count / num_steps)
        for name, value in expected.items():
            g = gradient["a"][name].astype(np.float64) * min(1.0, config.clip_norm / norm)
            mean[name] = config.beta1 * mean[name] + (1 - config.beta1) * g
            square[name] = config.beta2 * square[name] + (1 - config.beta2) * g**2
            step = mean[name] / (1 - config.beta1 ** (count + 1))
            step = step / (
                np.sqrt(square[name] / (1 - config.beta2 ** (count + 1))) + config.epsilon
            )
            decay = config.weight_decay * value if name == "kernel" else 0.0
            expected[name] = value - rate * (step + decay)
    assert all(clipped) if gradient_scale > 1 else not any(clipped)
    for name, value in expected.items():
        np.testing.assert_allclose(actual["a"][name], value, rtol=2e-5, atol=1e-6)


def test_nag_against_fairseq():
    """The update of fairseq's NAG, in NumPy: a velocity that learns each learning rate."""
    config = OptimizerConfig(
        name="nag",
        learning_rate=0.7,
        schedule="cosine",
        warmup_steps=3,
        final_fraction=1e-4,
        beta1=0.9,
        weight_decay=0.02,
        clip_norm=0.1,
    )
    num_steps = 9
    rng = np.random.default_rng(0)
    params = {"kernel": rng.standard_normal((3, 4)).astype(np.float32)}
    gradients = rng.standard_normal((num_steps, 3, 4)).astype(np.float32)
    gradients[::2] *= 1e-2  # some below the clip
    optimizer, schedule = make_optimizer(config, num_steps), learning_rate_schedule(config, 9)
    actual = jax.tree.map(jnp.asarray, params)
    state = optimizer.init(actual)
    expected, velocity, last = params["kernel"].astype(np.float64), np.zeros((3, 4)), None
    for count, gradient in enumerate(gradients):
        with jax.numpy_dtype_promotion("standard"):
            rate = max(float(schedule(jnp.int32(count))), 1e-7)  # where fairseq's warm-up begins
            updates, state = optimizer.update({"kernel": jnp.asarray(gradient)}, state, actual)
        actual = optax.apply_updates(actual, updates)

        g = gradient.astype(np.float64)
        g = g * min(1.0, config.clip_norm / np.sqrt((g**2).sum()))
        momentum, correction = config.beta1, rate / last if last else 1.0
        expected = expected * (1 - rate * config.weight_decay)
        expected = expected + momentum**2 * correction * velocity - (1 + momentum) * rate * g
        velocity = momentum * correction * velocity - rate * g
        last = rate
        np.testing.assert_allclose(actual["kernel"], expected, rtol=1e-5, atol=2e-6)


def test_a_config_that_cannot_train_is_refused():
    for fields, words in (
        ({"schedule": "step"}, "must be one of cosine"),
        ({"beta1": 1.0}, "beta1"),
    ):
        with pytest.raises(UserError, match=words):
            make_optimizer(OptimizerConfig(**fields), 10)


def test_every_field_matters():
    """Each field of the config changes the parameters after two steps."""
    rng = np.random.default_rng(0)
    params = {"kernel": jnp.asarray(rng.standard_normal((3, 4)), jnp.float32)}
    gradients = [{"kernel": jnp.asarray(rng.standard_normal((3, 4)), jnp.float32)} for _ in "ab"]

    def trained(config):
        optimizer, values = make_optimizer(config, 3), params
        state = optimizer.init(values)
        for gradient in gradients:
            with jax.numpy_dtype_promotion("standard"):
                updates, state = optimizer.update(gradient, state, values)
            values = optax.apply_updates(values, updates)
        return np.asarray(values["kernel"])

    base = OptimizerConfig(warmup_steps=1, epsilon=1e-2, schedule="wsd", decay_fraction=0.5)
    changes = {
        "name": "nag",
        "learning_rate": 1e-3,
        "schedule": "linear",
        "warmup_steps": 0,
        "decay_fraction": 1.0,
        "final_fraction": 0.9,
        "beta1": 0.5,
        "beta2": 0.5,
        "epsilon": 1.0,
        "weight_decay": 0.0,
        "clip_norm": 0.01,
    }
    assert changes.keys() == {field.name for field in dataclasses.fields(OptimizerConfig)}
    gradients = [*gradients, gradients[0]]
    for name, value in changes.items():
        other = trained(dataclasses.replace(base, **{name: value}))
        assert np.abs(other - trained(base)).max() > 1e-6, name
