"""The rule that leaves tiles out, attacked: the mass it drops, in float64, is within tolerance."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from alibi_jax import attention, slopes
from alibi_jax.attention.biases import LinearBias
from alibi_jax.attention.tiles import key_ranges

TILES = {"query_tile": 64, "key_tile": 32}
ranges = jax.jit(key_ranges, static_argnames=("causal", "tolerance", "query_tile", "key_tile"))


def kept_ranges(query, key, m, tolerance, *, scale=1.0, causal=True, **tokens):
    """Ranges of keys, [B, H, nT] twice, for positions and segments as `attention` fills them in."""
    length, key_length = query.shape[1], key.shape[1]
    given = {
        "query_positions": np.arange(key_length - length, key_length)[None],
        "key_positions": np.arange(key_length)[None],
        "segment_ids": None,
        "key_segment_ids": None,
    } | tokens
    given = {name: x if x is None else jnp.asarray(x, jnp.int32) for name, x in given.items()}
    first, end = ranges(
        *(jnp.asarray(x, jnp.float32) for x in (query, key)),
        LinearBias(jnp.asarray(m, jnp.float32)),
        jnp.float32(scale),
        causal=causal,
        tolerance=tolerance,
        **TILES,
        **given,
    )
    assert first.dtype == end.dtype == jnp.int32
    assert (first >= 0).all() and (first <= end).all()
    assert (end <= -(-key_length // TILES["key_tile"])).all()
    return np.asarray(first) * TILES["key_tile"], np.asarray(end) * TILES["key_tile"]


def worst_dropped(query, key, m, tolerance, *, rows=None, scale=1.0, causal=True, **tokens):
    """The largest probability, in float64, that the rule leaves out of one of `rows`."""
    (batch, length, heads, _), (key_length, key_heads) = query.shape, key.shape[1:3]
    first, end = kept_ranges(query, key, m, tolerance, scale=scale, causal=causal, **tokens)
    rows = np.arange(length) if rows is None else rows
    at = np.broadcast_to(
        tokens.get("query_positions", np.arange(length)[None] + key_length - length),
        (batch, length),
    )
    key_at = np.broadcast_to(
        tokens.get("key_positions", np.arange(key_length)[None]), (batch, key_length)
    )
    worst = 0.0
    for b, h in np.ndindex(batch, heads):
        q, k = (np.float64(x) for x in (query[b, rows, h], key[b, :, h // (heads // key_heads)]))
        distance = at[b, rows, None] - key_at[b, None]
        logits = np.float64(np.float32(scale)) * q @ k.T - np.float64(m[h]) * np.abs(distance)
        if causal:
            logits[distance < 0] = -np.inf
        if "segment_ids" in tokens:
            same = tokens["segment_ids"][b, rows, None] == tokens["key_segment_ids"][b, None]
            logits[~same] = -np.inf
        largest = logits.max(axis=1, keepdims=True)
        weights = np.exp(logits - np.where(np.isinf(largest), 0, largest))
        total = weights.sum(axis=1)
        tile = rows // TILES["query_tile"]
        number = np.arange(key_length)
        outside = (number < first[b, h, tile][:, None]) | (number >= end[b, h, tile][:, None])
        dropped = (weights * outside).sum(axis=1)
        worst = max(worst, np.max(dropped[total > 0] / total[total > 0], initial=0.0))
    return worst


def normal(rng, *shape):
    return rng.normal(size=shape).astype(np.float32)


def adversary(name, rng, query, key, m):
    """Change queries or keys so that a careless rule would be wrong."""
    length, key_length = query.shape[1], key.shape[1]
    unit = np.zeros(query.shape[-1], np.float32)
    unit[0] = 1
    far = rng.integers(0, key_length)
    distance = np.arange(key_length)[::-1].astype(np.float32)
    if name == "huge norms in one tile":
        key[:, far : far + 40] *= 1000
    elif name == "a far key wins":
        query[..., 0] = 10
        key[:, 0] = 0
        key[:, 0, :, 0] = (m.max() * key_length + 5) / 10
    elif name == "equal keys":
        key[:] = key[:, :1]
    elif name == "zero queries":
        query[:] = 0
    elif name == "zero queries, one tile not":
        query[:] = 0
        start = rng.integers(0, length)
        query[:, start : start + 30] = 20 * unit
    elif name == "all keys alike but for little":
        key[:] = 100 * unit + 0.1 * key
        query += 3 * unit
    elif name == "content undoes the decay":
        query[:] = unit
        key[:] = 0
        key[..., 0] = rng.choice(m) * distance[None, :, None]
    elif name == "content all but undoes the decay":
        query[:] = unit
        key[:] = 0
        key[..., 0] = 0.98 * rng.choice(m) * distance[None, :, None]
    elif name == "own keys are the worst":
        key[:] = -3 * query[:, -key_length:, : key.shape[2]] if key_length <= length else key
    elif name == "queries loud where keys are quiet":
        query *= np.geomspace(1e-3, 1e3, length, dtype=np.float32)[None, :, None, None]
        key *= np.geomspace(1e3, 1e-3, key_length, dtype=np.float32)[None, :, None, None]
    else:
        assert name == "normal"


ADVERSARIES = [
    "normal",
    "huge norms in one tile",
    "a far key wins",
    "equal keys",
    "zero queries",
    "zero queries, one tile not",
    "all keys alike but for little",
    "content undoes the decay",
    "content all but undoes the decay",
    "own keys are the worst",
    "queries loud where keys are quiet",
]
# Queries, keys, their heads, causal, tolerance: a few, since each is compiled.
CASES = [
    (1, 1, 2, 2, True, 1e-3),
    (1, 300, 2, 1, True, 0.1),
    (33, 33, 2, 2, False, 0.6),
    (500, 500, 4, 2, True, 1e-7),
    (500, 500, 4, 2, True, 0.6),
    (500, 500, 4, 2, False, 1e-3),
    (200, 700, 2, 2, True, 1e-3),
    (200, 700, 2, 2, True, 0.0),
    (200, 700, 2, 2, False, 0.1),
]
SLOPES = ["standard", "steep", "learned", "with zero"]


def some_slopes(kind, rng, heads):
    return {
        "standard": np.float32(2.0 ** -rng.integers(1, 9, heads)),
        "steep": np.ones(heads, np.float32),
        "learned": rng.lognormal(-2, 2, heads).astype(np.float32),
        "with zero": np.float32([0.0] + [0.3] * (heads - 1)),
    }[kind]


@settings(deadline=None, max_examples=300)
@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from(ADVERSARIES),
    st.sampled_from(CASES),
    st.sampled_from(SLOPES),
    st.sampled_from([1.0, 0.35, -2.0]),
)
def test_dropped_mass_is_within_tolerance(seed, name, case, kind, scale):
    length, key_length, heads, key_heads, causal, tolerance = case
    rng = np.random.default_rng(seed)
    m = some_slopes(kind, rng, heads)
    query, key = normal(rng, 1, length, heads, 8), normal(rng, 1, key_length, key_heads, 8)
    adversary(name, rng, query, key, m)
    dropped = worst_dropped(query, key, m, tolerance, scale=scale, causal=causal)
    assert dropped <= tolerance


@pytest.mark.parametrize("below", np.arange(0.0, 8.0, 0.5))
def test_many_tiles_each_within_tolerance(below):
    """All far tiles weigh the same, just what the bound says; the mean key is 0."""
    query, key = np.zeros((1, 64, 1, 8), np.float32), np.zeros((1, 2048, 1, 8), np.float32)
    m = np.float32([2.0**-8])
    query[..., 0] = 1
    edge = (np.arange(1920) // TILES["key_tile"] + 1) * TILES["key_tile"]
    key[0, :1920, 0, 0] = m[0] * (1984 - edge) - below
    key[0, -1] = -key[0].sum(axis=0)
    dropped = [worst_dropped(query, key, m, tolerance) for tolerance in (0.01, 0.1, 0.6)]
    assert dropped[0] <= 0.01 and dropped[1] <= 0.1 and dropped[2] <= 0.6


@settings(deadline=None, max_examples=60)
@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from(["sorted", "shuffled", "repeated", "far apart"]),
    st.sampled_from(["none", "documents", "shuffled"]),
    st.sampled_from([(True, 0.0), (True, 1e-3), (False, 0.3)]),
)
def test_positions_and_segments(seed, order, segments, case):
    causal, tolerance = case
    rng = np.random.default_rng(seed)
    query, key = normal(rng, 2, 300, 2, 8), normal(rng, 2, 300, 2, 8)
    m = some_slopes("learned", rng, 2)
    at = {
        "sorted": np.sort(rng.integers(0, 2000, (2, 300))),
        "shuffled": rng.permuted(np.tile(np.arange(300), (2, 1)), axis=1),
        "repeated": np.tile(np.arange(100), (2, 3)),
        "far apart": np.sort(rng.integers(-(2**29), 2**29, (2, 300))),
    }[order]
    tokens = {"query_positions": at, "key_positions": at}
    if segments != "none":
        ids = np.sort(rng.integers(0, 5, (2, 300)), axis=1)
        ids = rng.permuted(ids, axis=1) if segments == "shuffled" else ids
        tokens |= {"segment_ids": ids, "key_segment_ids": ids}
    dropped = worst_dropped(query, key, m, tolerance, causal=causal, **tokens)
    assert dropped <= tolerance


@pytest.mark.parametrize("name", ["normal", "a far key wins", "content all but undoes the decay"])
def test_dropped_mass_in_long_inputs(name):
    length, rng = 32768, np.random.default_rng(0)
    m = np.asarray(slopes(8))[[0, 3, 7]]
    query, key = normal(rng, 1, length, 3, 8), normal(rng, 1, length, 1, 8)
    adversary(name, rng, query, key, m)
    rows = np.unique(np.r_[0, 63, rng.integers(0, length, 30), length - 1])
    for tolerance in (2.0**-24, 0.01):
        assert worst_dropped(query, key, m, tolerance, rows=rows, scale=0.35) <= tolerance


def test_the_shares_that_are_left_out():
    """Random inputs at 8192: a steep head sees its own tiles only, a flat one most of its past."""
    rng = np.random.default_rng(0)
    query, key = normal(rng, 1, 8192, 8, 64), normal(rng, 1, 8192, 8, 64)
    first, end = kept_ranges(query, key, np.asarray(slopes(8)), 2.0**-24, scale=1 / 8)
    tiles = np.arange(8192 // 64)
    assert (end[0] == (tiles + 1) * 64).all()  # causal: up to the diagonal, never beyond
    seen = (end - first)[0, :, -1]
    assert (np.diff(seen) > 0).all()
    # 16.6 nats for the tolerance and about 12 for what |q||k| may be: some 30 over the slope.
    np.testing.assert_allclose(seen[3:] - 64, 30 / np.asarray(slopes(8))[3:], rtol=0.2)
    everything = kept_ranges(query, key, np.asarray(slopes(8)), 0.0, scale=1 / 8)[0]
    assert (everything == 0).all()


def test_other_segments_are_left_out_even_at_tolerance_zero():
    ids = np.repeat(np.arange(4), 256)[None]
    ones = np.ones((1, 1024, 1, 8), np.float32)
    first, end = kept_ranges(ones, ones, np.zeros(1), 0.0, segment_ids=ids, key_segment_ids=ids)
    tiles = np.arange(16)
    np.testing.assert_array_equal(first[0, 0], tiles // 4 * 256)
    np.testing.assert_array_equal(end[0, 0], (tiles + 1) * 64)


def test_queries_that_see_nothing_have_no_tiles():
    ones = np.ones((1, 128, 1, 8), np.float32)
    for causal, tokens in (
        (True, {"query_positions": np.arange(128)[None] - 1000}),
        (False, {"segment_ids": np.zeros((1, 128)), "key_segment_ids": np.ones((1, 128))}),
    ):
        first, end = kept_ranges(ones, ones, np.ones(1), 1e-3, causal=causal, **tokens)
        assert (first == end).all()


@pytest.mark.parametrize("causal", [True, False])
def test_error_at_the_default_tolerance_is_that_of_dense(causal):
    """Against float64, with most tiles left out: within 1.1 times what dense float32 is off by."""
    rng = np.random.default_rng(0)
    query, key, value = (normal(rng, 1, 2048, 4, 16) for _ in range(3))
    m = np.asarray(slopes(8))[[0, 2, 4, 7]]
    run = partial(attention, causal=causal)
    error = {}
    with jax.enable_x64(True):
        exact = run(*(jnp.asarray(x, jnp.float64) for x in (query, key, value, m)))
        exact = np.asarray(exact)
    for name in ("dense", "blockwise"):
        got = jax.jit(partial(run, implementation=name))(query, key, value, m)
        error[name] = np.sqrt(np.mean(np.square(np.asarray(got, np.float64) - exact)))
    assert 0 < error["blockwise"] <= 1.1 * error["dense"] < 1e-6


@pytest.mark.parametrize("beyond", [0.0, 1e4, np.nan])
@pytest.mark.parametrize("hidden_by", ["causality", "segments"])
def test_queries_in_the_middle_of_a_cache_leave_out_as_much(beyond, hidden_by):
    """As in a row that ends with them: what is in slots not filled yet moves neither mean nor norm.

    The keys have a large common part, and the row is long enough for it to spoil the bound.
    """
    rng = np.random.default_rng(0)
    query, key = (normal(rng, 1, n, 2, 16) for n in (128, 2048))
    key += 20 * normal(rng, 16)
    m = np.array([0.5, 0.25])
    filled = 1024
    expected = kept_ranges(query, key[:, :filled], m, 1e-7)
    assert (expected[0] >= filled - 512).all()
    key[:, filled:] = beyond
    at = np.arange(filled - 128, filled)[None]
    tokens = {"query_positions": at, "key_positions": np.arange(2048)[None]}
    if hidden_by == "segments":
        tokens["key_positions"] = tokens["key_positions"] % filled
        tokens["segment_ids"] = np.ones((1, 128), int)
        tokens["key_segment_ids"] = np.arange(2048)[None] // filled + 1
    got = kept_ranges(query, key, m, 1e-7, **tokens)
    np.testing.assert_array_equal(got, expected)
    key[:, filled:] = np.nan_to_num(beyond)
    assert worst_dropped(query, key, m, 1e-7, **tokens) <= 1e-7


def test_where_positions_start_anew_as_much_is_left_out():
    """Packed documents that each count from 0, of which the last queries are those of the last."""
    rng = np.random.default_rng(0)
    query, key = (normal(rng, 1, n, 2, 16) for n in (512, 1024))
    m, at = np.array([0.5, 0.25]), np.arange(1024)[None] % 512
    tokens = {
        "query_positions": at[:, -512:],
        "key_positions": at,
        "segment_ids": np.ones((1, 512)),
        "key_segment_ids": np.arange(1024)[None] // 512,
    }
    first, _ = kept_ranges(query, key, m, 1e-7, **tokens)
    assert (first[0, :, -1] >= 512 + 256).all()
    assert worst_dropped(query, key, m, 1e-7, **tokens) <= 1e-7
