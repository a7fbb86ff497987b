"""Every position method against its paper's formula in float64, and what options do to it."""

import dataclasses
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import alibi_jax
from alibi_jax.attention.biases import DistanceBias, LinearBias
from alibi_jax.errors import UserError
from alibi_jax.models import Decoder, DecoderConfig
from alibi_jax.models.positions import POSITION_METHODS
from alibi_jax.training.flops import flops_per_token
from alibi_jax.training.optimizer import decay_mask

sys.path.insert(0, str(Path(__file__).parent))
import position_formulas as formulas

SMALL = DecoderConfig(
    vocab_size=23, num_layers=2, embed_dim=32, num_heads=4, mlp_dim=24, trained_length=64
)
DISTANCES = np.arange(4097)
CLOSE = {"rtol": 1e-6, "atol": 1e-6}


def method(position, **changes):
    """A method, its parameters of one layer (or None), and its config."""
    config = dataclasses.replace(SMALL, position=position, **changes)
    config.validate()
    made = POSITION_METHODS[position]
    return made(config, nnx.Rngs(1)), made.layer(config, nnx.Rngs(2)), config


def bias_at(position, distance, query_position, **changes):
    """Bias f32[H, S] of one query at distances [S], and where the parameters come from."""
    shared, layer, _ = method(position, **changes)
    bias = shared.bias(layer, jnp.zeros((1, 1, 32)), len(distance), None)
    bias = LinearBias(bias) if isinstance(bias, jax.Array) else bias
    values = jax.jit(bias.dense)(
        jnp.asarray(distance)[None, None], jnp.full((1, 1), query_position, jnp.int32)
    )
    return np.asarray(values)[0, :, 0], shared, layer, bias


def values(param):
    return np.asarray(param[...], np.float64)


def upper_is_true(bias, found):
    """The bound at a distance holds for all distances from there on."""
    assert isinstance(bias, DistanceBias) and bias.upper is not None
    bound = jax.vmap(bias.upper, (0, None))(bias.params, jnp.asarray(DISTANCES)[None])[:, 0]
    later = np.maximum.accumulate(found[:, ::-1], axis=1)[:, ::-1]
    assert (np.asarray(bound) >= later - 1e-6 * np.abs(later)).all()
    return np.asarray(bound)


def test_alibi():
    found, *_ = bias_at("alibi", DISTANCES, 4096)
    np.testing.assert_allclose(found, -np.outer([0.25, 0.0625, 2**-6, 2**-8], DISTANCES), **CLOSE)


def test_t5():
    found, shared, _, bias = bias_at("t5", DISTANCES, 4096)
    buckets = [formulas.t5_bucket(d) for d in DISTANCES]
    assert len(set(buckets)) == 32
    np.testing.assert_array_equal(found, values(shared.table)[:, buckets].astype(np.float32))
    bound = upper_is_true(bias, found)
    np.testing.assert_array_equal(bound[:, 4096], found[:, 4096])  # the last bucket has no other


def test_kerple_log():
    found, shared, _, bias = bias_at("kerple_log", DISTANCES, 4096)
    p, a = np.exp(values(shared.log_p)), np.exp(values(shared.log_a))
    truth = [formulas.kerple_log(p[h], a[h], DISTANCES, 8) for h in range(4)]
    np.testing.assert_allclose(found, truth, **CLOSE)
    np.testing.assert_array_equal(upper_is_true(bias, found), found)


def test_kerple_power():
    found, shared, _, bias = bias_at("kerple_power", DISTANCES, 4096)
    p, a = 2 / (1 + np.exp(-values(shared.logit_p))), np.exp(values(shared.log_a))
    truth = [formulas.kerple_power(p[h], a[h], DISTANCES, 8) for h in range(4)]
    # p itself is right to 1e-7, and times log(4096) in the exponent.
    np.testing.assert_allclose(found, truth, rtol=3e-6, atol=1e-6)
    upper_is_true(bias, found)


@pytest.mark.parametrize("position", ["kerple_log", "kerple_power"])
def test_kerple_starts_as_the_authors_do(position):
    shared, *_ = method(position, num_heads=512, embed_dim=1024)
    a = np.exp(values(shared.log_a))
    p = values(shared.log_p) if position == "kerple_log" else values(shared.logit_p)
    p = np.exp(p) if position == "kerple_log" else 2 / (1 + np.exp(-p))
    for drawn, most in ((a, 1.0), (p, 2.0)):
        assert drawn.min() > 0.0099 and drawn.max() < most
        np.testing.assert_allclose(
            np.quantile(drawn, [0.25, 0.5, 0.75]), most * np.array([0.25, 0.5, 0.75]), atol=0.15
        )


@pytest.mark.parametrize("position", [7, 511, 4096])
def test_fire(position):
    distance = DISTANCES[: position + 1]
    found, _, layer, bias = bias_at("fire", distance, position)
    assert bias.upper is None
    c, limit = values(layer.c), 512 * values(layer.multiplier)
    assert (float(c), float(limit)) == (np.float32(0.1), 512.0)
    for head in range(4):
        mlp = {name: values(getattr(layer, name)) for name in ("hidden", "hidden_shift")}
        mlp |= {"out": values(layer.out)[head], "out_shift": values(layer.out_shift)[head]}
        truth = formulas.fire(float(c), float(limit), mlp, distance, position)
        np.testing.assert_allclose(found[head], truth, **CLOSE)


def test_bam_starts_as_alibi_and_falls_or_rises_with_its_exponent():
    found, _, layer, bias = bias_at("bam", DISTANCES, 4096)
    alibi, *_ = bias_at("alibi", DISTANCES, 4096)
    np.testing.assert_allclose(found, alibi, rtol=1e-6, atol=1e-5)
    upper_is_true(bias, found)
    scale, exponent = np.exp(values(layer.log_scale)), np.array([-0.5, 0.3, 1.2, 2.0])
    bias = dataclasses.replace(bias, params=(bias.params[0], jnp.asarray(exponent, jnp.float32)))
    found = np.asarray(bias.dense(jnp.asarray(DISTANCES)[None, None], jnp.full((1, 1), 4096)))
    found = found[0, :, 0]
    truth = [formulas.bam(scale[h], np.float32(exponent[h]), DISTANCES) for h in range(4)]
    np.testing.assert_allclose(found, truth, **CLOSE)
    bound = upper_is_true(bias, found)
    np.testing.assert_array_equal(bound[1:], found[1:])
    np.testing.assert_array_equal(bound[0], 0.0)


def test_bam_is_finite_for_any_exponent():
    """One infinity is NaN in the gradient of every parameter once their norm is clipped."""
    _, _, _, bias = bias_at("bam", DISTANCES, 4096)
    for exponent in (-40.0, 40.0):

        def total(params):
            changed = dataclasses.replace(bias, params=params)
            at = jnp.asarray([0, 1, 4096, 2**20])[None, None]
            return changed.dense(at, jnp.full((1, 1), 2**20)).sum() * 1e-30

        given = (bias.params[0], jnp.full_like(bias.params[1], exponent))
        value, gradients = jax.value_and_grad(total)(given)
        assert np.isfinite(value) and np.isfinite(np.asarray(gradients)).all()


def test_forgetting():
    shared, layer, _ = method("forgetting")
    x = jax.random.normal(jax.random.key(0), (1, 4097, 32))
    bias = shared.bias(layer, x, 4097, None)
    found = bias.dense(jnp.zeros((1, 1, 1), jnp.int32), jnp.zeros((1, 1), jnp.int32))
    logits = np.asarray(x, np.float64)[0] @ values(layer.kernel) + values(layer.bias)
    gates = 1 / (1 + np.exp(-logits))
    rows = [0, 1, 100, 4096]
    for head in range(4):
        for i in rows:
            for j in [j for j in (0, 1, 99, 4000, 4095, 4096) if j <= i]:
                truth = formulas.forgetting(gates[:, head], i, j)
                np.testing.assert_allclose(found[0, head, i, j], truth, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("changes", "frequencies", "temperature"),
    [
        ({}, formulas.rotary_frequencies(8), 1.0),
        (
            {"length_scaling": "linear", "scaling_factor": 4.0},
            formulas.rotary_frequencies(8) / 4,
            1.0,
        ),
        (
            {"length_scaling": "ntk", "scaling_factor": 4.0},
            formulas.rotary_frequencies(8, 10_000 * 4 ** (8 / 6)),
            1.0,
        ),
        (
            {"length_scaling": "dynamic"},
            formulas.rotary_frequencies(8, 10_000 * (4097 / 64) ** (8 / 6)),
            1.0,
        ),
        (
            {"length_scaling": "yarn", "scaling_factor": 4.0, "trained_length": 1024},
            formulas.yarn_frequencies(8, 4.0, 1024),
            0.1 * np.log(4.0) + 1.0,
        ),
    ],
)
def test_rotary(changes, frequencies, temperature):
    shared, *_ = method("rotary", **changes)
    x = jax.random.uniform(jax.random.key(0), (1, 4097, 2, 8), minval=-0.7, maxval=0.7)
    found = jax.jit(shared.rotate, static_argnums=2)(x, jnp.arange(4097)[None], 4097)
    position = np.arange(4097)[None, :, None, None]
    truth = temperature * formulas.rotated(np.asarray(x, np.float64), position, frequencies)
    np.testing.assert_allclose(found, truth, rtol=0, atol=1e-6)


def test_angles_stay_right_at_a_million_tokens():
    far = jnp.arange(1_000_000, 1_000_064)[None]
    x = jnp.ones((1, 64, 1, 8))
    found = method("rotary")[0].rotate(x, far, 64)
    position = np.asarray(far, np.float64)[:, :, None, None]
    truth = formulas.rotated(np.ones((1, 64, 1, 8)), position, formulas.rotary_frequencies(8))
    np.testing.assert_allclose(found, truth, rtol=0, atol=2e-6)
    waves = method("sinusoidal")[0].embed(jnp.zeros((1, 64, 32)), far)[0]
    angle = np.outer(np.asarray(far[0], np.float64), 10_000.0 ** (-np.arange(16) / 16))
    truth = np.concatenate([np.sin(angle), np.cos(angle)], axis=1)
    np.testing.assert_allclose(waves, truth, rtol=0, atol=2e-6)


def test_learned_positions_end_with_the_last():
    shared, *_ = method("learned")
    found = shared.embed(jnp.zeros((1, 4, 32)), jnp.array([[0, 63, 64, 100_000]]))[0]
    np.testing.assert_array_equal(found, values(shared.table)[[0, 63, 63, 63]].astype(np.float32))
    with pytest.raises(UserError, match="trained_length must be given"):
        Decoder(dataclasses.replace(SMALL, position="learned", trained_length=None), nnx.Rngs(0))


def slopes_of(length=64, **changes):
    shared, layer, _ = method("alibi", **changes)
    return shared.bias(layer, jnp.zeros((1, 1, 32)), length, None)


def test_alibi_options():
    plain = np.array([2.0 ** -(2 * h) for h in range(1, 5)])
    np.testing.assert_array_equal(slopes_of(), plain)
    np.testing.assert_array_equal(slopes_of(alibi_heads=2), [2**-4, 2**-8, 0, 0])
    sink = slopes_of(sink=True)
    assert isinstance(sink, LinearBias) and sink.sink
    np.testing.assert_array_equal(sink.slopes, plain)
    learned = {"learned_slopes": True, "slope_scale": 0.5, "bias_max": 4.0}
    np.testing.assert_allclose(slopes_of(**learned), 0.5 * plain**0.5, rtol=1e-6)
    partial = slopes_of(learned_slopes=True, alibi_heads=2)
    np.testing.assert_allclose(partial, [2**-4, 2**-8, 0, 0], rtol=1e-6)


def test_alibi_scaling():
    plain = np.array([2.0 ** -(2 * h) for h in range(1, 5)])
    linear = slopes_of(length_scaling="linear", scaling_factor=4.0)
    np.testing.assert_allclose(linear, plain / 4, rtol=1e-6)
    for length, factor in ((1, 1), (64, 1), (128, 2), (4096, 64)):
        found = slopes_of(length, length_scaling="dynamic")
        np.testing.assert_allclose(found, plain / factor, rtol=1e-6)
    ntk = {"length_scaling": "ntk", "scaling_factor": 8.0}
    truth = [2.0 ** -(2 * h) / 8 ** ((h - 1) / 3) for h in range(1, 5)]
    np.testing.assert_allclose(slopes_of(**ntk), truth, rtol=1e-6)
    # Twelve heads are two sequences in one, and a head without a slope stays without.
    found = np.asarray(slopes_of(**ntk, num_heads=12, embed_dim=36))
    slopes = np.asarray(alibi_jax.slopes(12), np.float64)
    share = np.log2(slopes.max() / slopes) / np.log2(slopes.max() / slopes.min())
    np.testing.assert_allclose(found, slopes / 8**share, rtol=1e-6)
    found = slopes_of(**ntk, slopes=(0.5, 0.0, 0.25, 0.125))
    np.testing.assert_allclose(found, [0.5, 0.0, 0.25 / 8**0.5, 0.125 / 8], rtol=1e-6)


def test_other_parameters_do_not_depend_on_the_method():
    def draw(position):
        model = Decoder(SMALL.with_position(position), nnx.Rngs(3))
        params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
        leaves = jax.tree.leaves_with_path(params)
        return params, {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}

    _, shared = draw("none")
    for position in POSITION_METHODS:
        params, drawn = draw(position)
        own = drawn.keys() - shared.keys()
        assert all("position" in name for name in own)
        assert bool(own) == (position not in ("alibi", "sinusoidal", "rotary", "none"))
        decayed = jax.tree.leaves_with_path(decay_mask(params))
        assert {jax.tree_util.keystr(path) for path, yes in decayed if yes}.isdisjoint(own)
        for name, leaf in shared.items():
            np.testing.assert_array_equal(drawn[name], leaf)


def test_flops_count_what_methods_multiply():
    def of(position):
        return flops_per_token(SMALL.with_position(position), 100)

    # A gate a head and layer of 32 inputs; FIRE's 32 hidden units, and 32 inputs of each head.
    assert of("forgetting") - of("alibi") == 6 * 2 * 4 * 32
    assert of("fire") - of("alibi") == 6 * 2 * (32 + 4 * 32) * 100
    assert of("t5") == of("rotary") == of("alibi")


def test_another_method_drops_the_options_it_lacks():
    config = dataclasses.replace(SMALL, sink=True, bias_max=4.0, dropout=0.1)
    bam = config.with_position("bam")
    bam.validate()
    assert (bam.position, bam.sink, bam.bias_max, bam.dropout) == ("bam", False, 4.0, 0.1)
    config.with_position("rotary").validate()


NTK = {"length_scaling": "ntk", "scaling_factor": 2.0}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"position": "rotary", "sink": True}, "sink=True is an option of alibi, not of .*rotary"),
        ({"position": "t5", "bias_max": 4.0}, "option of alibi and bam, not of position=t5"),
        ({"position": "bam", "slopes": (1.0,) * 4}, "slopes=.* is an option of alibi, not"),
        ({"position": "none", "alibi_heads": 2}, "alibi_heads=2 is an option of alibi"),
        ({"position": "fire", "learned_slopes": True}, "learned_slopes=True is an option of"),
        ({"position": "t5", "length_scaling": "ntk"}, "length_scaling=ntk is an option of alibi"),
        ({"length_scaling": "yarn", "scaling_factor": 2.0}, "yarn is rotary's"),
        ({"length_scaling": "linear"}, "scaling_factor=1.0: .* above 1"),
        ({"length_scaling": "dynamic", "scaling_factor": 2.0}, "only linear, ntk and yarn"),
        ({"scaling_factor": 2.0}, "only linear, ntk and yarn"),
        ({"alibi_heads": 0}, "alibi_heads=0: from 1 to num_heads=4"),
        ({"alibi_heads": 5}, "alibi_heads=5: from 1 to num_heads=4"),
        ({"alibi_heads": 2, "slopes": (1.0,) * 4}, "give one of the two"),
        ({"bias_max": 4.0, "slopes": (1.0,) * 4}, "bias_max=4.0 with slopes=.*one of the two"),
        ({**NTK, "alibi_heads": 1}, "two different slopes above 0, and here is 1"),
        ({**NTK, "slopes": (0.5, 0.0, 0.5, 0.0)}, "two different slopes above 0, and here is 1"),
        ({**NTK, "slopes": (0.0,) * 4}, "two different slopes above 0, and here is 0"),
        ({**NTK, "position": "rotary", "head_dim": 2}, "head_dim=2 has one alone"),
        ({"learned_slopes": True, "slopes": (1.0, 1.0, 1.0, 0.0)}, "must be above 0"),
        ({"learned_slopes": True, "slope_scale": 0.0}, "must be above 0"),
        ({"position": "rotary", "head_dim": 7}, "head_dim=7 is odd"),
        ({"trained_length": 0}, "trained_length=0"),
    ],
)
def test_impossible_options_say_why(changes, words):
    with pytest.raises(UserError, match=words) as error:
        dataclasses.replace(SMALL, **changes).validate()
    assert "\n" not in str(error.value)
