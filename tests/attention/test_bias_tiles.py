"""The rule that leaves tiles out, attacked with every bias: the mass it drops, in float64."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from alibi_jax.attention import attention
from alibi_jax.attention.biases import DistanceBias, PrefixBias
from alibi_jax.attention.tiles import key_ranges
from alibi_jax.models.positions import kerple
from tests.attention.kinds import KINDS
from tests.attention.naive import close, inputs

QUERY_TILE, KEY_TILE = 32, 16
ranges = jax.jit(
    partial(key_ranges, query_tile=QUERY_TILE, key_tile=KEY_TILE),
    static_argnames=("causal", "tolerance"),
)


def kept(bias, query, key, tolerance, *, causal=True, window=2**31 - 1, ids=None):
    """First and end, in tiles, [B, H, nT], at the default positions."""
    length, key_length = query.shape[1], key.shape[1]
    first, end = ranges(
        jnp.asarray(query),
        jnp.asarray(key),
        bias,
        jnp.float32(1.0),
        causal=causal,
        tolerance=tolerance,
        query_positions=jnp.arange(key_length - length, key_length)[None],
        key_positions=jnp.arange(key_length)[None],
        segment_ids=None if ids is None else ids[:, -length:],
        key_segment_ids=ids,
        window=jnp.int32(window),
    )
    return np.asarray(first), np.asarray(end)


def rows_of(kind, params, h, length, key_length):
    """The bias [T, S] of one head, and the distances."""
    signed = np.arange(key_length - length, key_length)[:, None] - np.arange(key_length)
    distance = np.abs(signed)
    if kind.sink:
        distance[:, 0] = 0
    rows = [
        kind.formula(params, 0, h, t, distance[t], t + key_length - length, length)
        for t in range(length)
    ]
    return np.stack(rows), signed, distance


def attack(name, rng, query, key, bias):
    """Change query [T, D] and key [S, D] so that a careless rule would be wrong."""
    if name.startswith("content undoes the bias"):
        row = bias[rng.integers(0, len(bias))] * (0.97 if name.endswith("all but") else 1.0)
        query[:], key[:] = 0, 0
        query[:, 0], key[:, 0] = 1, -np.clip(row, -1e4, 1e4)
    elif name == "a far key wins":
        query[:, 0] = 10
        key[rng.integers(0, len(key)), 0] = (np.abs(bias).max() + 5) / 10
    elif name == "zero queries":
        query[:] = 0
    else:
        assert name == "normal"


ATTACKS = [
    "normal",
    "zero queries",
    "a far key wins",
    "content undoes the bias",
    "content undoes the bias, all but",
]
# A few, since each is compiled.
CASES = [(300, 300, True, 1e-3), (200, 420, False, 0.3)]


@settings(deadline=None, max_examples=80)
@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from([name for name in KINDS if name != "fire"]),
    st.sampled_from(ATTACKS),
    st.sampled_from(CASES),
    st.sampled_from([2**31 - 1, 100, 20]),
)
def test_dropped_mass_is_within_tolerance(seed, name, attack_name, case, window):
    kind, (length, key_length, causal, tolerance) = KINDS[name], case
    rng = np.random.default_rng(seed)
    params = kind.params(rng, 1, key_length, 2)
    query, key = (rng.normal(size=(1, n, 2, 8)).astype(np.float32) for n in (length, key_length))
    of_heads = [rows_of(kind, params, h, length, key_length) for h in range(2)]
    for h in range(2):
        attack(attack_name, rng, query[0, :, h], key[0, :, h], of_heads[h][0])
    bias = kind.bias(params, length)
    first, end = kept(bias, query, key, tolerance, causal=causal, window=window)
    number = np.arange(key_length) // KEY_TILE
    tile = np.arange(length) // QUERY_TILE
    for h, (rows, signed, distance) in enumerate(of_heads):
        logits = np.float64(query[0, :, h]) @ np.float64(key[0, :, h]).T + rows
        seen = distance < window
        if causal:
            seen &= signed >= 0
        logits[~seen] = -np.inf
        weights = np.exp(logits - logits.max(axis=1, keepdims=True))
        weights /= weights.sum(axis=1, keepdims=True)
        outside = (number < first[0, h, tile][:, None]) | (number >= end[0, h, tile][:, None])
        if kind.sink:
            assert (first >= 1).all()
            outside &= number > 0  # tile 0 is computed beside the range
        assert (weights * outside).sum(axis=1).max() <= tolerance


@pytest.mark.parametrize("name", ["kerple_log", "kerple_power", "t5", "bam", "shifted"])
def test_a_bound_is_one_of_every_distance_beyond(name):
    """To float32's rounding, for many heads; and it comes near, or nothing would be left out."""
    kind, rng = KINDS[name], np.random.default_rng(0)
    params = kind.params(rng, 1, 1, 64)
    distance = np.r_[np.arange(3000), 2 ** np.arange(12, 20)]
    bias = kind.bias(params, 1)
    upper = np.asarray(jax.vmap(bias.upper, (0, None))(bias.params, jnp.asarray(distance)[None]))
    for h in range(64):
        exact = kind.formula(params, 0, h, 0, distance, 0, 1)
        largest = np.maximum.accumulate(exact[::-1])[::-1]
        slack = 1e-5 * (1 + np.abs(largest))
        assert (upper[h, 0] >= largest - slack).all()
        assert name in ("bam", "shifted") or (upper[h, 0] <= largest + slack).all()


def long_inputs(length=4096):
    rng = np.random.default_rng(0)
    return (rng.normal(size=(1, length, 1, 16)).astype(np.float32) / 2 for _ in range(2))


@pytest.mark.parametrize(
    ("name", "params", "tokens"),
    [
        # 17 nats for the tolerance, and at most some 14 more for the content.
        ("linear", np.float32([0.1]), (170, 310)),
        ("sink", np.float32([0.1]), (170, 310)),
        ("kerple_power", (np.float32([0.1]), np.float32([1])), (170, 310)),
        ("kerple_log", (np.float32([8]), np.float32([1])), (8, 100)),
        ("bam", (np.log(np.float32([0.1])), np.float32([1])), (170, 310)),
        ("prefix", np.full((1, 4096, 1), -0.1, np.float32), (170, 310)),
    ],
)
def test_biases_that_fall_leave_out_what_is_far(name, params, tokens):
    first, end = kept(KINDS[name].bias(params, 4096), *long_inputs(), 2.0**-24)
    tiles = (end - first)[0, 0, 64:] * KEY_TILE - QUERY_TILE
    assert tokens[0] - KEY_TILE <= tiles.min() and tiles.max() <= tokens[1] + KEY_TILE
    causal_end = (np.arange(4096 // QUERY_TILE) + 1) * QUERY_TILE // KEY_TILE
    np.testing.assert_array_equal(end[0, 0], causal_end)


def test_without_a_bound_only_what_no_query_sees_is_left_out():
    unbounded = DistanceBias(kerple._log, (np.float32([8]), np.float32([1])))
    first, end = kept(unbounded, *long_inputs(), 0.5)
    assert (first == 0).all() and (end[0, 0] == 2 * (np.arange(128) + 1)).all()


@pytest.mark.parametrize("causal", [True, False])
def test_a_window_leaves_out_all_tiles_beyond_it(causal):
    bias = KINDS["linear"].bias(np.zeros(1, np.float32), 4096)
    for window in (1, 33, 500):
        first, end = kept(bias, *long_inputs(), 0.0, causal=causal, window=window)
        start = np.arange(0, 4096, QUERY_TILE)
        lowest = np.maximum(start - window + 1, 0)
        highest = np.minimum(start + QUERY_TILE - 1 + (0 if causal else window - 1), 4095)
        np.testing.assert_array_equal(first[0, 0], lowest // KEY_TILE)
        np.testing.assert_array_equal(end[0, 0], highest // KEY_TILE + 1)


def test_gates_that_close_leave_out_what_is_before():
    """A document that forgets all at once: its own tokens decay by nothing."""
    gates = np.zeros((1, 4096, 1), np.float32)
    gates[:, 2048] = -40.0
    first, end = kept(PrefixBias.from_log_gates(gates), *long_inputs(), 2.0**-24)
    assert (first[0, 0, :64] == 0).all()
    assert (first[0, 0, 64:] == 2048 // KEY_TILE).all() and end[0, 0, -1] == 4096 // KEY_TILE


@pytest.mark.parametrize("name", ["sink", "kerple_log", "prefix"])
def test_what_is_left_out_changes_no_more_than_rounding(name):
    """At the sizes of tiles that are used, where the steepest head leaves out most."""
    kind, rng = KINDS[name], np.random.default_rng(0)
    params = kind.params(rng, 1, 1100, 2)
    query, key, value, _ = inputs(batch=1, length=1100, heads=2, key_heads=1)

    def both(implementation):
        def run(query, key, value, params):
            bias = kind.bias(params, 1100)
            return attention(query, key, value, bias, implementation=implementation)

        output, pullback = jax.vjp(run, query, key, value, params)
        return output, *pullback(jnp.sin(output))

    got, expected = (jax.jit(partial(both, x))() for x in ("blockwise", "dense"))
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        largest = jnp.abs(y).max()
        close(x / largest, y / largest, atol=5e-6)
