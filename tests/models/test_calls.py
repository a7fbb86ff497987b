"""How a decoder is called: outside of `jit`, with wrong tokens, with 64 bits, on any mesh."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType

from alibi_jax.errors import UserError
from alibi_jax.models import Decoder, DecoderConfig
from alibi_jax.models.softmax import softmax_losses
from alibi_jax.sharding import rules, spec

CONFIG = DecoderConfig(vocab_size=23, num_layers=1, embed_dim=16, num_heads=4, mlp_dim=24)
BANDS = dataclasses.replace(CONFIG, adaptive_cutoffs=(8, 15), adaptive_factor=2)
ROWS = np.random.default_rng(0).integers(0, 23, (4, 9)).astype(np.int32)
TOKENS, TARGETS = ROWS[:, :-1], ROWS[:, 1:]


def make(config=CONFIG):
    return Decoder(config, nnx.Rngs(0))


def losses(model, tokens=TOKENS, targets=TARGETS, **given):
    return model.token_losses(tokens, targets, **given)[0]


def mean_loss(model):
    return jnp.mean(losses(model))


def chunks(model, tokens=TOKENS, targets=TARGETS):
    cache = model.init_cache(4, 8)
    (first, _), cache = model.chunk_losses(tokens[:, :4], targets[:, :4], cache)
    (second, _), cache = model.chunk_losses(tokens[:, 4:], targets[:, 4:], cache)
    return jnp.concatenate([first, second], axis=1)


CALLS = {
    "call": lambda model: model(TOKENS, key=jax.random.key(0)),
    "losses": lambda model: losses(model, window=jnp.int32(3)),
    "chunks": chunks,
    "logits": lambda model: model.logits(model.hidden(TOKENS)),
    "mass": lambda model: model.attention_mass(TOKENS, (1, 3), 4),
    "gradient": jax.grad(mean_loss),
}


@pytest.mark.parametrize("name", CALLS)
def test_compiles_once_outside_of_jit(name, caplog):
    def compiled():
        caplog.clear()
        with jax.log_compiles():
            CALLS[name](make(config))
        return [text for text in map(str, caplog.messages) if text.startswith("Compiling")]

    # Of a shape of its own, so that no other test has compiled it.
    config = dataclasses.replace(CONFIG, embed_dim=20)
    assert compiled()
    assert not compiled()


@pytest.mark.parametrize("config", [CONFIG, BANDS], ids=["one table", "bands"])
@pytest.mark.parametrize("wrong", [-1, 23])
def test_tokens_outside_the_vocabulary_are_loud(config, wrong):
    model, tokens, targets = make(config), TOKENS.copy(), TARGETS.copy()
    tokens[1, 3] = targets[2, 5] = wrong
    with pytest.raises(ValueError, match=f"tokens must be from 0 to 22, .*; got {wrong}"):
        model(tokens)
    with pytest.raises(ValueError, match=f"targets must be from 0 to 22, .*; got {wrong}"):
        model.token_losses(TOKENS, jnp.asarray(targets))
    found = np.isnan(jax.jit(losses)(model, tokens, targets))
    see = np.zeros((4, 8), bool)
    see[1, 3:] = see[2, 5] = True
    np.testing.assert_array_equal(found, see)


def test_a_cache_that_is_full_is_loud():
    model = make()
    cache = model.init_cache(4, 6)
    _, cache = model.chunk_hidden(TOKENS[:, :4], cache)
    with pytest.raises(ValueError, match="4 tokens does not fit a cache of 6 that holds 4"):
        model.chunk_hidden(TOKENS[:, 4:], cache)
    hidden, _ = jax.jit(type(model).chunk_hidden)(model, TOKENS[:, 4:], cache)
    assert np.isnan(hidden).all()
    with pytest.raises(ValueError, match="the cache is for 3 rows, got 4"):
        model.chunk_hidden(TOKENS[:, :4], model.init_cache(3, 6))


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"window": jnp.int32(0)}, "window must be an integer from 1"),
        ({"window": np.array([2])}, "window must be a scalar, got the shape \\(1,\\)"),
        ({"tokens": TOKENS[0]}, "tokens must be \\[batch, length\\]"),
        ({"targets": TARGETS.T}, "targets must have the shape of the tokens, .*; got \\(8, 4\\)"),
    ],
)
def test_wrong_calls_say_why(given, words):
    with pytest.raises(ValueError, match=words):
        losses(make(), **given)


@pytest.mark.parametrize("position", ["alibi", "t5", "forgetting"])
def test_64_bits_change_nothing(position):
    config = CONFIG.with_position(position)
    with jax.enable_x64(False):
        model = make(config)
        expected = losses(model), chunks(model)
    with jax.enable_x64(True):
        model = make(config)
        found = losses(model, window=np.int64(8)), chunks(model)
        mass = model.attention_mass(TOKENS, (1, 3), 4)
    assert mass.dtype == jnp.float32
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), found, expected)


MESHES = {
    "some of the axes": (("data",), (4,), AxisType.Explicit, {}),
    "their order": (("tensor", "data"), (2, 4), AxisType.Explicit, {}),
    "other names": (
        ("tp", "dp"),
        (2, 4),
        AxisType.Explicit,
        {"batch": "dp", "embed": "dp", "heads": "tp", "mlp": "tp"},
    ),
    "auto": (("data", "fsdp"), (2, 2), AxisType.Auto, {}),
}


@pytest.mark.parametrize("name", MESHES)
def test_any_mesh_agrees_with_one_device(name):
    names, sizes, kind, names_of = MESHES[name]
    mesh = jax.make_mesh(sizes, names, axis_types=(kind,) * len(names))
    run = jax.value_and_grad(lambda model, t, y: jnp.mean(losses(model, t, y)))
    alone = jax.jit(run)(make(), TOKENS, TARGETS)
    with jax.set_mesh(mesh), rules(**names_of):
        model = jax.jit(make)()
        batch = spec("batch", None) or jax.P("data", None)
        assert batch[0] == ("dp" if name == "other names" else "data")
        placed = jax.device_put((TOKENS, TARGETS), batch)
        together = jax.jit(run)(model, *placed)
        in_chunks = chunks(model, *placed)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, np.asarray(b), rtol=1e-4, atol=1e-6),
        alone,
        together,
    )
    np.testing.assert_allclose(in_chunks, losses(make()), rtol=1e-4)


def test_rules_are_of_logical_axes():
    with pytest.raises(UserError, match="the logical axes are batch, length, embed, heads, mlp"):
        rules(bach="dp")


@pytest.mark.parametrize("config", [CONFIG, BANDS], ids=["one table", "bands"])
def test_what_is_not_a_number_shows(config, monkeypatch):
    """Whatever a chunk's maximum makes of NaN: in the token's loss, and in all gradients' sum."""
    monkeypatch.setattr("alibi_jax.models.softmax.LOGITS_AT_ONCE", 3 * 23)
    model = make(config)
    hidden = np.random.default_rng(0).normal(size=(1, 8, 16)).astype(np.float32)
    hidden[0, 5] = np.nan

    @jax.jit
    def run(hidden):
        if model.vocabulary is None:
            return softmax_losses(hidden, model.embedding[...], TARGETS[:1], 1.0)[0]
        return model.vocabulary.token_losses(hidden, TARGETS[:1], None)[0]

    grad = jax.jit(jax.grad(lambda x: jnp.sum(run(x))))(hidden)
    for found in (run(hidden)[0], grad[0].sum(-1)):
        np.testing.assert_array_equal(np.isnan(found), np.arange(8) == 5)
