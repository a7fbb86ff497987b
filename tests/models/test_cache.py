"""Rows read chunk by chunk, through a window, elsewhere, on a mesh; and where attention looks."""

import dataclasses
import importlib.util
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from alibi_jax.models import Decoder, DecoderConfig
from alibi_jax.models.positions import POSITION_METHODS
from alibi_jax.sharding import MeshConfig, make_mesh
from alibi_jax.training.step import make_loss_fn

SMALL = DecoderConfig(
    vocab_size=23,
    num_layers=2,
    embed_dim=16,
    num_heads=4,
    num_kv_heads=2,
    mlp_dim=24,
    trained_length=8,
)
METHODS = {name: SMALL.with_position(name) for name in POSITION_METHODS} | {
    "alibi, sink and scaling": dataclasses.replace(SMALL, sink=True, length_scaling="dynamic"),
    "alibi, learned": dataclasses.replace(SMALL, learned_slopes=True),
    "alibi, some learned": dataclasses.replace(SMALL, learned_slopes=True, alibi_heads=3),
    "rotary, dynamic": dataclasses.replace(SMALL, position="rotary", length_scaling="dynamic"),
}


def random_tokens(batch, length):
    tokens = np.random.default_rng(0).integers(0, 23, (batch, length + 1)).astype(np.int32)
    return tokens[:, :-1], tokens[:, 1:]


def close(found, truth):
    np.testing.assert_allclose(found, truth, rtol=2e-5, atol=2e-5 * float(np.abs(truth).max()))


def in_chunks(graphdef, params, tokens, targets, size, window=None, length=None):
    cache = nnx.merge(graphdef, params).init_cache(len(tokens), length or tokens.shape[1])

    @jax.jit
    def chunk(params, tokens, targets, cache, window):
        return nnx.merge(graphdef, params).chunk_losses(tokens, targets, cache, window=window)

    losses = []
    for start in range(0, tokens.shape[1], size):
        part = slice(start, start + size)
        loss, cache = chunk(params, tokens[:, part], targets[:, part], cache, window)
        losses.append(loss)
    return [np.concatenate(x, axis=1) for x in zip(*losses, strict=True)], cache


@pytest.mark.parametrize("name", METHODS)
def test_chunks_shifts_and_gradients(noisy, name):
    """Chunks give what the row does, relative methods wherever it is; every parameter learns."""
    graphdef, params = noisy(METHODS[name])
    tokens, targets = random_tokens(2, 12)

    @jax.jit
    def run(params, positions):
        def mean_and_losses(params):
            model = nnx.merge(graphdef, params)
            both = model.token_losses(tokens, targets, positions=positions)
            return jnp.mean(both[0]), both

        return jax.value_and_grad(mean_and_losses, has_aux=True)(params)

    positions = np.tile(np.arange(12, dtype=np.int32), (2, 1))
    ((_, whole), grads), ((_, elsewhere), _) = run(params, positions), run(params, positions + 1000)
    found, cache = in_chunks(graphdef, params, tokens, targets, 4)
    jax.tree.map(close, tuple(found), tuple(whole))
    assert int(cache.filled) == 12

    absolute = name in ("sinusoidal", "learned", "fire")
    assert (np.abs(whole[0] - elsewhere[0]).max() > 1e-3) == absolute
    if not absolute:
        close(elsewhere[0], whole[0])
    for path, grad in jax.tree.leaves_with_path(nnx.to_pure_dict(grads)):
        assert np.isfinite(grad).all() and np.abs(grad).max() > 0, path


@pytest.mark.parametrize("changes", [{"scan_layers": False}, {"position": "forgetting"}])
def test_chunks_of_any_size_and_room_to_spare(noisy, changes):
    graphdef, params = noisy(dataclasses.replace(SMALL, **changes))
    tokens, targets = random_tokens(2, 12)
    whole, _ = in_chunks(graphdef, params, tokens, targets, 12)
    for size, length in ((5, 12), (5, 20)):
        found, cache = in_chunks(graphdef, params, tokens, targets, size, length=length)
        assert cache.length == length
        jax.tree.map(close, found, whole)


def test_a_full_cache_says_so(noisy):
    graphdef, params = noisy(SMALL)
    tokens, targets = random_tokens(1, 12)
    (losses, _), _ = in_chunks(graphdef, params, tokens, targets, 4, length=10)
    assert np.isfinite(losses[:, :8]).all() and np.isnan(losses[:, 8:]).all()
    with pytest.raises(ValueError, match="a chunk of 12 tokens does not fit a cache of 10"):
        in_chunks(graphdef, params, tokens, targets, 12, length=10)


def test_the_cache_is_all_that_grows_with_length(noisy):
    """Donated, it is updated in place; what else a chunk needs is one layer's keys and logits."""
    graphdef, params = noisy(dataclasses.replace(SMALL, num_layers=16))

    def temporaries(length):
        cache = nnx.merge(graphdef, params).init_cache(1, length)
        tokens, targets = random_tokens(1, 8)

        def chunk(params, cache):
            return nnx.merge(graphdef, params).chunk_losses(tokens, targets, cache)

        compiled = jax.jit(chunk, donate_argnums=1).lower(params, cache).compile()
        size = cache.key.nbytes + cache.value.nbytes
        memory = compiled.memory_analysis()
        assert memory.alias_size_in_bytes >= size  # updated in place
        return memory.temp_size_in_bytes, size

    (short, _), (long, size) = temporaries(1024), temporaries(4096)
    # 8 queries of 4 heads have as many logits as a layer has keys and values in all.
    assert long - short < 0.5 * size


@pytest.mark.parametrize("name", ["alibi", "rotary", "forgetting"])
def test_a_window_equals_a_row_that_begins_there(noisy, name):
    """With one layer, a token sees what is in the window and nothing through other tokens."""
    config = dataclasses.replace(METHODS[name], num_layers=1, sink=False, length_scaling="none")
    graphdef, params = noisy(config)
    tokens, targets = random_tokens(2, 9)

    @jax.jit
    def losses(params, tokens, targets, positions, window):
        model = nnx.merge(graphdef, params)
        return model.token_losses(tokens, targets, positions=positions, window=window)[0]

    for window in (4, 2, 9):
        found = losses(params, tokens, targets, None, jnp.int32(window))
        chunks, _ = in_chunks(graphdef, params, tokens, targets, 3, jnp.int32(window))
        close(chunks[0], found)
        if window == 4:
            for last in (5, 8):
                part = slice(last + 1 - window, last + 1)
                positions = np.tile(np.arange(9, dtype=np.int32)[part], (2, 1))
                alone = losses(params, tokens[:, part], targets[:, part], positions, None)
                close(found[:, last], alone[:, -1])
    assert losses._cache_size() == 2  # one program for all windows
    close(found, losses(params, tokens, targets, None, None))


def test_the_loss_of_held_out_tokens_takes_a_window(noisy):
    graphdef, params = noisy(SMALL)
    tokens = random_tokens(2, 8)[0]
    losses = make_loss_fn(graphdef)
    found = [losses(params, tokens, window=jnp.int32(window)) for window in (1, 3, 7)]
    model = nnx.merge(graphdef, params)
    truth = jax.jit(lambda window: model.token_losses(tokens[:, :-1], tokens[:, 1:], window=window))
    close(found[1], truth(3)[0])
    close(found[2], losses(params, tokens))
    assert losses._cache_size() == 2


@pytest.mark.parametrize("name", ["alibi, sink and scaling", "forgetting"])
def test_long_rows_go_by_tiles(noisy, name):
    """1200 tokens, 300 at a time: too many logits to hold at once, here as in the whole row."""
    config = dataclasses.replace(METHODS[name], num_layers=1)
    graphdef, params = noisy(config)
    params = jax.tree.map(lambda x: 0.3 * x, params)
    tokens, targets = random_tokens(1, 1200)
    whole = jax.jit(lambda params: nnx.merge(graphdef, params).token_losses(tokens, targets))
    found, _ = in_chunks(graphdef, params, tokens, targets, 300)
    jax.tree.map(close, tuple(found), tuple(whole(params)))


# Those that have no parameters of their own that devices divide by heads: three heads do not divide
# over two devices, so their slopes are on each.
UNDIVIDED = ("learned", "rotary, dynamic", "alibi, sink and scaling", "alibi, some learned")
SLOW = ("fire", "t5", "kerple_log", "bam", "alibi, learned", *UNDIVIDED)


@pytest.mark.parametrize(
    "name", ["forgetting", *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)]
)
def test_meshes_agree_with_one_device(name):
    config = dataclasses.replace(METHODS[name], num_kv_heads=4)
    tokens, targets = random_tokens(4, 8)
    graphdef = nnx.split(jax.eval_shape(lambda: Decoder(config, nnx.Rngs(0))), nnx.Param)[0]

    def init():
        return nnx.split(Decoder(config, nnx.Rngs(0)), nnx.Param)[1]

    def loss(params, tokens, targets):
        return jnp.mean(nnx.merge(graphdef, params).token_losses(tokens, targets)[0])

    def chunk(params, tokens, targets):
        model = nnx.merge(graphdef, params)
        return model.chunk_losses(tokens, targets, model.init_cache(4, 16))[0]

    def both(params, tokens, targets):
        return jax.value_and_grad(loss)(params, tokens, targets), chunk(params, tokens, targets)

    alone = jax.jit(both)(jax.jit(init)(), tokens, targets)
    with jax.set_mesh(make_mesh(MeshConfig(2, 2, 2))):
        placed = jax.device_put((tokens, targets), jax.P(("data", "fsdp"), None))
        params = jax.jit(init)()
        leaves = jax.tree.leaves_with_path(nnx.to_pure_dict(params))
        own = [leaf for path, leaf in leaves if "position" in jax.tree_util.keystr(path)]
        assert any("tensor" in leaf.sharding.spec for leaf in own) == (name not in UNDIVIDED)
        together = jax.jit(both)(params, *placed)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, np.asarray(b), rtol=1e-4, atol=1e-6),
        alone,
        together,
    )


def load_reference():
    path = Path(__file__).parent / "reference.py"
    spec = importlib.util.spec_from_file_location("reference", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["alibi", "alibi, sink", "fire", "forgetting"])
def test_attention_mass_by_distance(noisy, name, monkeypatch):
    reference = load_reference()
    config = dataclasses.replace(SMALL, sink=name == "alibi, sink", num_layers=2)
    config = dataclasses.replace(config, position=name.split(",")[0])
    graphdef, params = noisy(config)
    tokens, _ = random_tokens(2, 12)
    monkeypatch.setattr("alibi_jax.models.attention_mass.LOGITS_AT_ONCE", 2 * 4 * 12 * 2)
    run = jax.jit(lambda params: nnx.merge(graphdef, params).attention_mass(tokens, (1, 3, 8), 5))
    found = np.asarray(run(params))
    assert found.shape == (2, 2, 4, 4)
    np.testing.assert_allclose(found.sum(-1), 1.0, rtol=1e-5)

    def plain(node):
        if isinstance(node, dict):
            return {key: plain(value) for key, value in node.items()}
        return np.asarray(node, np.float64)

    params = plain(nnx.to_pure_dict(params))
    for row in range(2):
        x = params["embedding"][tokens[row]]
        for n in range(2):
            block = reference.layer(params["blocks"], n)
            of_attention = block["attention"]
            normed = reference.norm(config, block["attention_norm"], x)
            query, key = (reference.linear(of_attention[name], normed) for name in ("query", "key"))
            own = of_attention.get("position", {})
            for head in range(4):
                truth = np.zeros(4)
                for i in range(7, 12):
                    logits = key[: i + 1, head // 2] @ query[i, head] / 2
                    logits += reference.bias(config, params, own, normed, head, i)
                    weights = np.exp(logits - logits.max())
                    bucket = np.searchsorted([1, 3, 8], i - np.arange(i + 1), side="right")
                    np.add.at(truth, bucket, weights / weights.sum() / 5)
                np.testing.assert_allclose(found[n, row, head], truth, rtol=1e-4, atol=1e-5)
            x = x + reference.attention(config, params, of_attention, normed, np.zeros(12))
            x = x + reference.mlp(
                config, block["mlp"], reference.norm(config, block["mlp_norm"], x)
            )


@pytest.mark.parametrize(
    ("edges", "num_queries", "words"),
    [
        ((), 2, "edges must be distances above 0"),
        ((0, 2), 2, "edges must be distances above 0"),
        ((4, 2), 2, "edges must be distances above 0"),
        ((2,), 0, "num_queries must be from 1 to the number of tokens, 6"),
        ((2,), 7, "num_queries must be from 1 to the number of tokens, 6"),
    ],
)
def test_impossible_masses_say_why(noisy, edges, num_queries, words):
    model = nnx.merge(*noisy(SMALL))
    with pytest.raises(ValueError, match=words):
        model.attention_mass(random_tokens(1, 6)[0], edges, num_queries)
