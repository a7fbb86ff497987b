"""The decoder against float64 numpy, and the properties that every switch must keep."""

import dataclasses
import importlib.util
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from alibi_jax.errors import UserError
from alibi_jax.models import Decoder, DecoderConfig
from alibi_jax.sharding import MeshConfig, make_mesh

SMALL = DecoderConfig(vocab_size=23, num_layers=2, embed_dim=16, num_heads=4, mlp_dim=24)
# Settings in the manner of the published families (BLOOM, MPT, Falcon-RW, BTLM, Baichuan, Refact).
FAMILIES = {
    "default": {},
    "bloom": {"embed_norm": True, "activation": "gelu_tanh"},
    "mpt": {
        "norm_bias": False,
        "qkv_bias": False,
        "out_bias": False,
        "mlp_bias": False,
        "clip_qkv": 0.5,
        "bias_max": 16.0,
        "num_kv_heads": 2,
        "qk_norm": "full",
    },
    "falcon": {"slope_scale": 4**-0.5},
    "btlm": {
        "gated_mlp": True,
        "activation": "silu",
        "embed_scale": 14.6,
        "attention_scale": 0.25,
        "logit_scale": 0.222,
        "slopes": (0.5, 0.3, 0.2, 0.01),
    },
    "baichuan": {
        "norm": "rmsnorm",
        "gated_mlp": True,
        "activation": "silu",
        "tie_embeddings": False,
        "qkv_bias": False,
    },
    "refact": {"norm": "rmsnorm", "num_kv_heads": 1, "activation": "relu", "head_dim": 6},
    "per_head": {"qk_norm": "per_head", "norm_eps": 1e-3},
    "sinusoidal": {"position": "sinusoidal"},
    "none": {"position": "none"},
    "sink": {"sink": True, "learned_slopes": True},
    "learned": {"position": "learned", "trained_length": 8},
    "rotary": {"position": "rotary", "num_kv_heads": 2, "qk_norm": "per_head"},
    "t5": {"position": "t5"},
    "kerple_log": {"position": "kerple_log"},
    "kerple_power": {"position": "kerple_power"},
    "fire": {"position": "fire"},
    "bam": {"position": "bam"},
    "forgetting": {"position": "forgetting"},
}


def graph_of(config):
    return nnx.split(jax.eval_shape(lambda: Decoder(config, nnx.Rngs(0))), nnx.Param)[0]


def noisy_params(config):
    """Parameters that are all, norms and biases too, large enough to matter."""
    rng = np.random.default_rng(0)
    shapes = nnx.state(jax.eval_shape(lambda: Decoder(config, nnx.Rngs(0))), nnx.Param)

    def draw(x):
        return jax.device_put(rng.normal(0.2, 0.4, x.shape).astype(np.float32))

    return jax.tree.map(draw, shapes)


def make(config):
    return nnx.merge(graph_of(config), noisy_params(config))


def load_reference():
    spec = importlib.util.spec_from_file_location(
        "reference", Path(__file__).parent / "reference.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


reference = load_reference()


def plain(model):
    """Parameters as nested dicts of float64 arrays."""

    def convert(node):
        if isinstance(node, dict):
            return {name: convert(value) for name, value in node.items()}
        return np.asarray(node, np.float64)

    return convert(nnx.to_pure_dict(nnx.state(model, nnx.Param)))


def random_tokens(batch, length, vocab=23, seed=0):
    return np.random.default_rng(seed).integers(0, vocab, (batch, length)).astype(np.int32)


@pytest.mark.parametrize("family", FAMILIES)
def test_matches_float64_and_is_causal(family):
    config = dataclasses.replace(SMALL, **FAMILIES[family])
    model, tokens = make(config), random_tokens(2, 11)
    segments = np.array([[1] * 11, [1] * 4 + [2] * 7], np.int32)
    run = jax.jit(lambda t, s: model(t, segment_ids=s))
    logits = run(tokens, segments)
    assert logits.dtype == jnp.float32 and logits.shape == (2, 11, 23)
    for row in range(2):
        truth = reference.decoder(config, plain(model), tokens[row], segments[row])
        np.testing.assert_allclose(logits[row], truth, rtol=2e-4, atol=2e-4 * np.abs(truth).max())

    changed = tokens.copy()
    changed[:, 6] = (changed[:, 6] + 1) % 23
    before, after = np.asarray(logits), np.asarray(run(changed, segments))
    np.testing.assert_array_equal(before[:, :6], after[:, :6])
    assert (np.abs(before[:, 6:] - after[:, 6:]).max(-1) > 1e-4).all()


def test_parameters_and_logits_do_not_depend_on_how_layers_run():
    tokens = random_tokens(2, 12)

    def grads(**changes):
        config = dataclasses.replace(SMALL, **changes)
        graphdef, params = graph_of(config), noisy_params(config)

        def loss(params):
            return jnp.mean(jnp.square(nnx.merge(graphdef, params)(tokens)))

        return jax.jit(jax.grad(loss))(params), str(jax.make_jaxpr(jax.grad(loss))(params))

    base, text = grads()
    assert "scan[" in text and "remat" not in text
    for changes, present, absent in (
        ({"scan_layers": False}, "", "scan["),
        ({"remat": "full"}, "remat", "no such text"),
        ({"remat": "dots", "scan_layers": False}, "remat", "scan["),
    ):
        other, text = grads(**changes)
        assert present in text and absent not in text
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), base, other
        )


def test_rematerialisation_trades_memory_for_nothing_else():
    """At 4 layers of 64 tokens, what each policy keeps for the backward pass stands out."""
    tokens, memory, grads = random_tokens(4, 64), {}, {}
    for remat in ("none", "dots", "full"):
        config = dataclasses.replace(SMALL, num_layers=4, remat=remat)
        graphdef, params = graph_of(config), noisy_params(config)

        def loss(params, graphdef=graphdef):
            return jnp.mean(jnp.square(nnx.merge(graphdef, params)(tokens)))

        compiled = jax.jit(jax.grad(loss)).lower(params).compile()
        memory[remat] = compiled.memory_analysis().temp_size_in_bytes
        grads[remat] = compiled(params)
    assert memory["full"] < memory["dots"] < 0.75 * memory["none"]
    for remat in ("dots", "full"):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
            grads["none"],
            grads[remat],
        )


@pytest.mark.parametrize("position", ["alibi", "none", "rotary", "forgetting"])
def test_packed_documents_equal_separate_ones(position):
    model = make(dataclasses.replace(SMALL, position=position))
    tokens = random_tokens(1, 12)
    packed = jax.jit(model)(tokens, segment_ids=np.array([[5] * 5 + [2] * 7], np.int32))
    for part in (slice(0, 5), slice(5, 12)):
        alone = jax.jit(model)(tokens[:, part])
        np.testing.assert_allclose(packed[:, part], alone, rtol=1e-4, atol=1e-5)


def test_alibi_depends_on_distance_alone():
    model = make(SMALL)
    tokens = random_tokens(1, 8)
    here = jax.jit(model)(tokens)
    positions = np.arange(1_000_000, 1_000_008, dtype=np.int32)[None]
    np.testing.assert_array_equal(here, jax.jit(model)(tokens, positions=positions))


def test_bfloat16_is_close_and_parameters_stay_float32():
    model, tokens = make(SMALL), random_tokens(2, 16)
    half = nnx.merge(graph_of(dataclasses.replace(SMALL, dtype="bfloat16")), noisy_params(SMALL))
    logits, truth = jax.jit(half)(tokens), jax.jit(model)(tokens)
    assert logits.dtype == jnp.float32
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(half, nnx.Param))} == {
        jnp.dtype("float32")
    }
    assert float(jnp.max(jnp.abs(logits - truth))) < 0.05 * float(jnp.max(jnp.abs(truth)))
    assert float(jnp.max(jnp.abs(logits - truth))) > 0  # it did compute in bfloat16


def test_dropout_needs_a_key_and_keeps_the_mean():
    model = make(dataclasses.replace(SMALL, dropout=0.25, num_layers=1))
    tokens = random_tokens(1, 6)
    run = jax.jit(lambda key: model(tokens, key=key))
    np.testing.assert_array_equal(run(jax.random.key(1)), run(jax.random.key(1)))
    assert np.abs(np.asarray(run(jax.random.key(1)) - run(jax.random.key(2)))).max() > 1e-3

    in_mlp = make(dataclasses.replace(SMALL, mlp_dropout=0.25, num_layers=1))
    other = [jax.jit(lambda key: in_mlp(tokens, key=key))(jax.random.key(i)) for i in (1, 2)]
    assert np.abs(np.asarray(other[0] - other[1])).max() > 1e-3

    from alibi_jax.models.layers import dropout

    x = jnp.ones((64, 32, 32))
    y = np.asarray(dropout(x, 0.25, jax.random.key(0)))
    np.testing.assert_allclose(np.unique(y), [0.0, 1 / 0.75], rtol=1e-6)
    assert abs(y.mean() - 1.0) < 5 * np.sqrt(0.25 / 0.75 / y.size)


@pytest.mark.parametrize("sizes", [(1, 8, 1), (1, 1, 8), (2, 2, 2)])
def test_meshes_agree_with_one_device(sizes):
    config = DecoderConfig(vocab_size=23, num_layers=2, embed_dim=16, num_heads=8, num_kv_heads=8)
    config = dataclasses.replace(config, gated_mlp=True, qk_norm="full", embed_norm=True)
    tokens = random_tokens(8, 8)
    graphdef = graph_of(config)

    def init():
        return nnx.split(Decoder(config, nnx.Rngs(0)), nnx.Param)[1]

    def loss(params, tokens):
        return jnp.mean(jnp.square(nnx.merge(graphdef, params)(tokens)))

    alone = jax.jit(jax.value_and_grad(loss))(jax.jit(init)(), tokens)
    with jax.set_mesh(make_mesh(MeshConfig(*sizes))):
        placed = jax.device_put(tokens, jax.P(("data", "fsdp"), None))
        params = jax.jit(init)()
        kernel = params["blocks"]["mlp"]["up"]["kernel"][...]
        _, fsdp, tensor = sizes
        assert kernel.addressable_shards[0].data.shape == (2, 16 // fsdp, 64 // tensor)
        together = jax.jit(jax.value_and_grad(loss))(params, placed)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, np.asarray(b), rtol=1e-4, atol=1e-6),
        alone,
        together,
    )


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_layers": 0}, "num_layers=0"),
        ({"embed_dim": -4}, "embed_dim=-4"),
        ({"num_heads": 0}, "num_heads=0"),
        ({"num_heads": 3}, "embed_dim=16 is not a multiple of num_heads=3"),
        ({"num_kv_heads": 3}, "num_heads=4 is not a multiple of num_kv_heads=3"),
        ({"head_dim": 0}, "head_dim=0"),
        ({"mlp_dim": 0}, "mlp_dim=0"),
        ({"vocab_size": 0}, "vocab_size=0"),
        ({"vocab_size": None}, "vocab_size must be given"),
        ({"dropout": 1.0}, "dropout=1.0"),
        ({"bias_max": 0.0}, "bias_max=0.0"),
        ({"norm_eps": float("nan")}, "norm_eps=nan"),
        ({"clip_qkv": -1.0}, "clip_qkv=-1.0"),
        ({"attention_scale": float("inf")}, "attention_scale=inf"),
        ({"slope_scale": -1.0}, "slope_scale=-1.0"),
        ({"adaptive_factor": 2}, "adaptive_factor=2 is of the bands of adaptive_cutoffs"),
        ({"adaptive_dropout": 0.1}, "adaptive_dropout=0.1 is of the bands of adaptive_cutoffs"),
        ({"slopes": (0.5,)}, "slopes has 1 values for num_heads=4"),
        ({"slopes": (0.5, 0.5, 0.5, -0.5)}, "at least 0"),
        ({"embed_dim": 15, "head_dim": 4, "position": "sinusoidal"}, "embed_dim=15 is odd"),
    ],
)
def test_impossible_configs_say_why(changes, words):
    with pytest.raises(UserError, match=words):
        Decoder(dataclasses.replace(SMALL, **changes), nnx.Rngs(0))
