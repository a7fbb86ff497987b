"""NaN and infinity: what no row sees may not matter, what one sees must show, in gradients too."""

import importlib
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alibi_jax import attention
from tests.attention.naive import close, inputs

NOT_FINITE = (np.nan, np.inf, -np.inf)


def expected(query, key, value, m, cotangent, seen, distance):
    """Return the output and the gradients of query, key, value and slopes, in float64.

    Rows that see a number that is not finite are NaN, and so are the gradients that they, or rows
    with such a query or cotangent, have a part in. All the others are as if it were not there.
    """
    query, key, value, m, cotangent = (
        np.asarray(x, np.float64) for x in (query, key, value, m, cotangent)
    )
    (batch, length, heads, dim), group = query.shape, query.shape[2] // key.shape[2]
    output = np.zeros((batch, length, heads, value.shape[3]))
    grads = [np.zeros(x.shape) for x in (query, key, value, m)]
    dquery, dkey, dvalue, dm = grads
    with np.errstate(invalid="ignore"):  # NaN is the point
        for b, h in np.ndindex(batch, heads):
            k, v = key[b, :, h // group], value[b, :, h // group]
            bad_keys = ~(np.isfinite(k).all(axis=1) & np.isfinite(v).all(axis=1))
            for t in range(length):
                see = np.flatnonzero(seen[b, t])
                if see.size == 0:
                    continue
                q, dout = query[b, t, h], cotangent[b, t, h]
                bad = bad_keys[see].any() or not np.isfinite(q).all()
                if bad:
                    output[b, t, h] = np.nan
                if bad or not np.isfinite(dout).all():
                    dquery[b, t, h] = dm[h] = np.nan
                    dkey[b, see, h // group] = dvalue[b, see, h // group] = np.nan
                if bad:
                    continue
                logits = k[see] @ q / np.sqrt(dim) - m[h] * distance[b, t, see]
                weights = np.exp(logits - logits.max())
                weights /= weights.sum()
                output[b, t, h] = weights @ v[see]
                dweights = v[see] @ dout
                dlogits = weights * (dweights - weights @ dweights)
                dquery[b, t, h] += dlogits @ k[see] / np.sqrt(dim)
                dkey[b, see, h // group] += np.outer(dlogits, q) / np.sqrt(dim)
                dvalue[b, see, h // group] += np.outer(weights, dout)
                dm[h] -= dlogits @ distance[b, t, see]
    return [output, *grads]


@pytest.fixture(params=["dense", "blockwise"])
def implementation(request, monkeypatch):
    """Each, with tiles so small that short inputs have many."""
    module = importlib.import_module("alibi_jax.attention.blockwise")
    for name, size in (("QUERY_TILE", 4), ("KEY_TILE", 2), ("STEP", 4)):
        monkeypatch.setattr(module, name, size)
    return request.param


@partial(jax.jit, static_argnames=("causal", "implementation"))
def all_of(query, key, value, m, cotangent, **options):
    """Return the output and its gradients."""
    output, pullback = jax.vjp(partial(attention, **options), query, key, value, m)
    return [output, *pullback(cotangent)]


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("where", ["query", "key", "value", "cotangent"])
def test_what_is_hidden_never_matters_and_what_is_seen_shows(implementation, causal, where):
    """Of packed documents, with a window, a NaN or infinity in one place at a time."""
    length, window = 26, 9
    rng = np.random.default_rng(0)
    for seed in range(6):
        args = [np.array(x) for x in inputs(seed, length=length, heads=2, key_heads=1)]
        args.append(rng.normal(size=args[0].shape).astype(np.float32))
        m, cotangent = args[3:]
        bad = args[["query", "key", "value", "", "cotangent"].index(where)]
        bad[rng.integers(2), rng.integers(length), 0, rng.integers(8)] = NOT_FINITE[seed % 3]
        # No row of a dense output is NaN for a cotangent alone: there it reaches hidden values.
        if where == "cotangent" and implementation == "dense":
            continue
        segments = np.sort(rng.integers(0, 3, (2, length)), axis=1).astype(np.int32)
        signed = np.arange(length)[:, None] - np.arange(length)
        distance = np.broadcast_to(np.abs(signed), (2, length, length))
        seen = (segments[:, :, None] == segments[:, None]) & (distance < window)
        if causal:
            seen &= signed >= 0
        got = all_of(
            *args,
            causal=causal,
            segment_ids=segments,
            window=window,
            implementation=implementation,
        )
        wanted = expected(*args[:3], m, cotangent, seen, distance)
        for name, x, y in zip(("output", "dq", "dk", "dv", "dm"), got, wanted, strict=True):
            np.testing.assert_allclose(x, y, atol=2e-5, rtol=1e-5, err_msg=f"{seed} {name}")


@pytest.mark.parametrize("name", ["dense", "blockwise"])
@pytest.mark.parametrize("bad", NOT_FINITE)
@pytest.mark.parametrize("slope", [0.0, 0.5])
def test_a_key_far_away_survives_skipping(name, bad, slope):
    """1024 tokens, and rows for which all tiles with the key would be negligible."""
    x = np.ones((1, 1100, 1, 8), np.float32)
    for at in range(2):
        args = [x, x.copy(), x.copy(), np.float32([slope])]
        args[1 + at][0, 512] = bad
        got = np.asarray(attention(*args, implementation=name))[0, :, 0, 0]
        np.testing.assert_allclose(got[:512], 1.0, rtol=1e-5)
        assert np.isnan(got[512:]).all()


@pytest.mark.parametrize("bad", [*NOT_FINITE, 1e38])
def test_padding_holds_anything(bad):
    """Its segment is between those of the live tokens, so that no limits of ids hide it."""
    length = 1300
    segments = np.repeat([[1, 3, 2]], 1, axis=0).repeat([600, 100, 600], axis=1)
    args = [np.array(x) for x in inputs(length=length, heads=2, batch=1)]
    clean = jax.jit(attention)(*args, segment_ids=segments)
    for x in args[:3]:
        x[:, 600:700] = bad
    got = jax.jit(attention)(*args, segment_ids=segments)
    live = segments[0] != 3
    close(got[:, live], clean[:, live], atol=2e-6)  # of other tiles: other rounding


def test_a_large_key_in_padding_does_not_keep_tiles(monkeypatch):
    """It is no part of the mean key that the bound counts from."""
    module = importlib.import_module("alibi_jax.attention.tiles")
    length = 2048
    segments = jnp.asarray(np.repeat([[1, 2]], 1, axis=0).repeat([1792, 256], axis=1), jnp.int32)
    query, key, *_ = inputs(length=length, heads=1, batch=1)
    ranges = partial(
        jax.jit(
            module.key_ranges, static_argnames=("causal", "tolerance", "query_tile", "key_tile")
        ),
        query,
        bias=importlib.import_module("alibi_jax.attention.biases").LinearBias(jnp.float32([0.5])),
        scale=jnp.float32(1.0),
        causal=True,
        query_positions=jnp.arange(length, dtype=jnp.int32)[None],
        key_positions=jnp.arange(length, dtype=jnp.int32)[None],
        segment_ids=segments,
        key_segment_ids=segments,
        tolerance=1e-7,
        query_tile=256,
        key_tile=256,
    )
    clean = ranges(key=key)
    for bad in (1e30, np.nan):
        found = ranges(key=key.at[:, 1800:].set(bad))
        for x, y in zip(found, clean, strict=True):
            np.testing.assert_array_equal(x[..., :7], y[..., :7])


def test_one_wrong_weight_shows_at_every_length():
    """By the whole of a decoder: short rows are dense and long ones go by tiles."""
    from flax import nnx

    from alibi_jax import Decoder, DecoderConfig

    config = DecoderConfig(vocab_size=11, num_layers=1, embed_dim=8, num_heads=2)
    decoder = Decoder(config, nnx.Rngs(0))
    kernel = jax.tree.leaves(nnx.state(decoder.blocks.attention, nnx.Param))[0]
    state = nnx.state(decoder, nnx.Param)
    state = jax.tree.map(lambda x: x.at[(0,) * x.ndim].set(jnp.nan) if x is kernel else x, state)
    nnx.update(decoder, state)
    for length in (256, 1100):
        assert jnp.isnan(jax.jit(decoder)(jnp.zeros((1, length), jnp.int32))).any()
