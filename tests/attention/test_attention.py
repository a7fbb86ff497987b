"""Attention against a naive one in float64, and the properties that ALiBi must have."""

import importlib
import math
from functools import partial

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec as P

from alibi_jax.attention import attention as attention_op_by_op
from alibi_jax.attention import choice
from alibi_jax.bias import slopes
from tests.attention.naive import close, inputs, naive_attention, naive_weights

# Compiled as a whole, which is how it is used and many times faster than op by op.
attention = jax.jit(attention_op_by_op, static_argnames=("causal", "tolerance", "implementation"))

examples = settings(deadline=None, max_examples=25)
seeds = st.integers(0, 2**32 - 1)


@pytest.fixture(scope="module", params=["dense", "blockwise"], autouse=True)
def implementation(request):
    """All of this file holds for each, with tiles so small that short inputs have many."""
    with pytest.MonkeyPatch.context() as patch:
        module = importlib.import_module("alibi_jax.attention.blockwise")
        for name, size in (("QUERY_TILE", 4), ("KEY_TILE", 2), ("STEP", 4)):
            patch.setattr(module, name, size)
        patch.setattr(choice, "choose", lambda case: request.param)
        jax.clear_caches()
        yield request.param
    jax.clear_caches()


@partial(jax.jit, static_argnames="causal")
def gradients(cotangent, *args, **options):
    """Return the gradients of `sum(output * cotangent)` in query, key, value and slopes."""
    _, pullback = jax.vjp(lambda *x: attention(*x, **options), *args)
    return pullback(cotangent)


def check_finite(tree):
    for leaf in jax.tree.leaves(tree):
        assert np.isfinite(leaf).all()


# Against float64


@examples
@given(
    seeds,
    st.booleans(),
    st.sampled_from([(1, 1), (1, 5), (6, 6), (3, 7), (7, 3)]),
    st.sampled_from([(1, 1), (4, 4), (4, 2), (6, 1)]),
    st.sampled_from([None, 0.3]),
    st.sampled_from([None, "shared", "batched"]),
    st.booleans(),
)
def test_matches_naive_float64(seed, causal, lengths, heads, scale, positions, segmented):
    length, key_length = lengths
    args = inputs(
        seed, length=length, key_length=key_length, heads=heads[0], key_heads=heads[1], value_dim=3
    )
    rng = np.random.default_rng(seed)
    options, naive_options = {}, {}
    if positions:
        lead = (2,) if positions == "batched" else ()
        naive_options["positions"] = [rng.integers(0, 40, (*lead, n)) for n in lengths]
        options["query_positions"], options["key_positions"] = naive_options["positions"]
    if segmented:
        naive_options["segments"] = [rng.integers(-1, 2, (2, n)) for n in lengths]
        options["segment_ids"], options["key_segment_ids"] = naive_options["segments"]
    got = attention(*args, causal=causal, scale=scale, **options)
    assert got.shape == (2, length, heads[0], 3)
    close(got, naive_attention(*args, causal=causal, scale=scale, **naive_options))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_inputs_keep_dtype_and_accuracy(dtype):
    query, key, value, m = inputs(length=40)
    query, key, value = (x.astype(dtype) for x in (query, key, value))
    got = attention(query, key, value, m)
    assert got.dtype == dtype
    close(got.astype(jnp.float32), naive_attention(query, key, value, m), atol=2e-2)
    found = gradients(jnp.ones_like(query), query, key, value, m)
    assert [g.dtype for g in found] == [dtype, dtype, dtype, jnp.float32]


def test_one_key_head_serves_consecutive_query_heads():
    query, key, value, m = inputs(heads=6, key_heads=2)
    repeated = (jnp.repeat(x, 3, axis=2) for x in (key, value))
    close(attention(query, key, value, m), attention(query, *repeated, m), atol=1e-6)


def test_gradients_match_finite_differences_in_float64():
    """Also of the slopes, whose gradient other kernels drop silently (flash-attention#1977)."""
    with jax.enable_x64(True):
        args = [np.asarray(x, np.float64) for x in inputs(length=4, key_heads=2)]
        cotangent = np.random.default_rng(1).normal(size=args[0].shape)
        options = {"segment_ids": np.array([[0, 0, 0, 0], [1, 1, 2, 2]])}
        naive_options = {"segments": [options["segment_ids"]] * 2}
        found = gradients(cotangent, *map(jnp.asarray, args), **options)
        assert all(g.dtype == np.float64 for g in found)
        rng, step = np.random.default_rng(2), 1e-5
        for i, gradient in enumerate(found):
            direction = rng.normal(size=args[i].shape)
            ends = []
            for sign in (1, -1):
                moved = [*args[:i], args[i] + sign * step * direction, *args[i + 1 :]]
                ends.append(np.sum(naive_attention(*moved, **naive_options) * cotangent))
            expected = (ends[0] - ends[1]) / (2 * step)
            assert abs(expected) > 1e-2
            np.testing.assert_allclose(np.sum(gradient * direction), expected, rtol=1e-6)


def test_slope_gradient_is_the_formula():
    """The formula is -(E[distance * value] - E[distance] E[value]) under the weights."""
    query, key, value, m = inputs(length=12)
    cotangent = np.random.default_rng(1).normal(size=query.shape)
    weights = naive_weights(query, key, m)
    distance = np.abs(np.arange(12)[:, None] - np.arange(12))
    value64 = np.asarray(value, np.float64)
    mean = np.einsum("bhts,bshd->bthd", weights, value64)
    mean_distance = np.einsum("bhts,ts->bth", weights, distance)[..., None]
    product = np.einsum("bhts,ts,bshd->bthd", weights, distance, value64)
    expected = np.einsum("bthd,bthd->h", cotangent, mean_distance * mean - product)
    close(gradients(jnp.asarray(cotangent, jnp.float32), query, key, value, m)[3], expected, 1e-4)


def test_32k_positions_in_bfloat16():
    """Total variation over the last 256 keys, one decode step, from float64 on the same inputs."""
    length, near, heads = 32768, 256, 16
    rng = np.random.default_rng(0)
    query, key = (
        rng.normal(size=shape).astype(ml_dtypes.bfloat16)
        for shape in ((1, 1, heads, 16), (1, length, 1, 16))
    )
    # The values read the weights out: a column for each near key, and one for all the others.
    value = np.zeros((1, length, 1, near + 1), ml_dtypes.bfloat16)
    value[0, np.arange(length), 0, np.clip(np.arange(length) - (length - near), -1, None)] = 1
    m = slopes(heads)

    exact = naive_attention(query, key, value, m)[0, 0]
    relative = np.asarray(attention(query, key, value, m), np.float64)[0, 0]
    absolute_bias = (np.asarray(m)[:, None] * np.arange(length)).astype(ml_dtypes.bfloat16)
    logits = np.einsum("hd,sd->hs", *(np.float64(x) for x in (query[0, 0], key[0, :, 0]))) / 4
    absolute = np.asarray(jax.nn.softmax(jnp.asarray(logits + absolute_bias.astype(np.float64))))
    absolute = absolute @ value[0, :, 0].astype(np.float32)
    error = [0.5 * np.abs(x - exact).sum(axis=-1).max() for x in (relative, absolute)]
    assert error[0] < 2e-3 < 0.5 < error[1]


# Properties


@examples
@given(seeds, st.integers(-(2**30), 2**30), st.booleans())
def test_only_differences_of_positions_matter(seed, shift, causal):
    args = inputs(seed)
    positions = np.sort(np.random.default_rng(seed).integers(0, 30, 6))
    got = attention(*args, causal=causal, query_positions=positions + shift)
    np.testing.assert_array_equal(got, attention(*args, causal=causal, key_positions=positions))


@examples
@given(seeds, st.booleans())
def test_packed_is_separate(seed, causal):
    first, second = inputs(seed, length=4), inputs(seed + 1, length=3)
    m = first[3]
    packed = [jnp.concatenate(x, axis=1) for x in zip(first[:3], second[:3], strict=True)]
    ids = np.array([[5] * 4 + [-2] * 3] * 2)
    got = attention(*packed, m, causal=causal, segment_ids=ids)
    close(got[:, :4], attention(*first[:3], m, causal=causal), atol=1e-6)
    close(got[:, 4:], attention(*second[:3], m, causal=causal), atol=1e-6)


def test_the_future_has_exactly_no_influence():
    args = inputs()
    for t in range(6):
        cotangent = np.zeros(args[0].shape, np.float32)
        cotangent[:, t] = np.random.default_rng(t).normal(size=cotangent[:, t].shape)
        causal = [np.abs(g).max(axis=(0, 2, 3)) for g in gradients(cotangent, *args)[1:3]]
        for influence in causal:
            assert (influence[t + 1 :] == 0).all()
        assert (causal[1][: t + 1] > 0).all()
        both = gradients(cotangent, *args, causal=False)[2]
        assert (np.abs(both).max(axis=(0, 2, 3)) > 0).all()


@pytest.mark.parametrize("length", [1, 2, 5])
def test_the_last_queries_alone_are_the_last_rows_of_all(length):
    query, key, value, m = inputs()
    whole = attention(query, key, value, m)
    close(attention(query[:, -length:], key, value, m), whole[:, -length:], atol=1e-6)


@examples
@given(seeds)
def test_heads_are_interchangeable_with_their_slopes(seed):
    query, key, value, m = inputs(seed)
    order = np.random.default_rng(seed).permutation(4)
    permuted = (x[:, :, order] for x in (query, key, value))
    got = attention(*permuted, m[order])
    close(got, attention(query, key, value, m)[:, :, order], atol=1e-6)


def test_symmetric_attention_commutes_with_reversal():
    *args, m = inputs()
    got = attention(*(x[:, ::-1] for x in args), m, causal=False)
    close(got, attention(*args, m, causal=False)[:, ::-1], atol=1e-6)


@examples
@given(seeds, st.sampled_from(["uint8", "uint32", "int16", "int32"]))
def test_any_integer_dtype(seed, dtype):
    args = inputs(seed)
    numbers = np.random.default_rng(seed).integers(0, 3, (2, 6))
    options = {"query_positions": numbers, "segment_ids": numbers}
    given = {name: x.astype(dtype) for name, x in options.items()}
    np.testing.assert_array_equal(attention(*args, **given), attention(*args, **options))


def test_two_tokens_in_a_batch_are_not_coordinates():
    args = inputs(length=2)
    positions = np.array([[0, 1], [4, 9]])
    got = attention(*args, causal=False, query_positions=positions)
    close(got, naive_attention(*args, causal=False, positions=(positions, positions)))


# Rows that see nothing


def test_rows_that_see_nothing_are_zero_with_zero_gradients():
    args = inputs(length=7, key_length=3)
    got = attention(*args)
    assert (got[:, :4] == 0).all()
    close(got, naive_attention(*args))
    blind = jnp.zeros_like(args[0]).at[:, :4].set(1.0)
    for gradient in gradients(blind, *args):
        assert (gradient == 0).all()
    found = gradients(jnp.ones_like(args[0]), *args)
    check_finite(found)
    assert (found[0][:, :4] == 0).all()


@pytest.mark.parametrize("causal", [True, False])
def test_a_batch_with_nothing_to_see(causal):
    args = inputs(length=3)
    options = {
        "causal": causal,
        "segment_ids": np.zeros((2, 3), int),
        "key_segment_ids": np.ones((2, 3), int),
    }
    assert (attention(*args, **options) == 0).all()
    for gradient in gradients(jnp.ones_like(args[0]), *args, **options):
        assert (gradient == 0).all()


def test_slope_zero_and_nan_are_not_hidden():
    query, key, value, _ = inputs()
    m = jnp.zeros(4)
    close(attention(query, key, value, m), naive_attention(query, key, value, m))
    check_finite(gradients(jnp.ones_like(query), query, key, value, m))
    assert np.isnan(attention(query.at[0, 2].set(jnp.nan), key, value, m)[0, 2]).all()


# Transformations and sharding


def test_vmap_jit_and_checkpoint_change_nothing():
    *arrays, m = (jnp.stack(x) for x in zip(inputs(0), inputs(1), inputs(2), strict=True))
    ids = jnp.asarray(np.random.default_rng(0).integers(0, 2, (3, 2, 6)))

    def packed(query, key, value, m, ids):
        return attention(query, key, value, m, segment_ids=ids)

    batched = jax.jit(jax.vmap(jax.checkpoint(packed)))(*arrays, m, ids)
    looped = jnp.stack(
        [attention_op_by_op(*x, segment_ids=i) for *x, i in zip(*arrays, m, ids, strict=True)]
    )
    close(batched, looped, atol=1e-6)

    def loss(f):
        return lambda *x: jnp.sum(jnp.sin(jax.vmap(f)(*x, ids)))

    plain, wrapped = (jax.grad(loss(f), (0, 1, 2, 3)) for f in (packed, jax.checkpoint(packed)))
    for expected, got in zip(jax.jit(plain)(*arrays, m), jax.jit(wrapped)(*arrays, m), strict=True):
        close(got, expected)


@pytest.mark.parametrize("key_heads", [4, 2])
@pytest.mark.parametrize("segmented", [False, True])
def test_explicit_sharding_needs_no_annotation(key_heads, segmented):
    args = inputs(key_heads=key_heads)
    ids = np.random.default_rng(0).integers(0, 2, (2, 6)) if segmented else None
    positions = np.arange(6) * 2
    cotangent = jnp.asarray(np.random.default_rng(1).normal(size=args[0].shape), jnp.float32)

    def run(*args, ids, positions, cotangent):
        options = {"segment_ids": ids, "query_positions": positions}
        return attention(*args, **options), gradients(cotangent, *args, **options)

    expected = run(*args, ids=ids, positions=positions, cotangent=cotangent)
    mesh = jax.make_mesh((2, 2), ("data", "tensor"), devices=jax.devices()[:4])
    with jax.set_mesh(mesh):
        spec = P("data", None, "tensor", None)
        sharded = [jax.device_put(x, spec) for x in (*args[:3], cotangent)]
        got = jax.jit(run)(
            *sharded[:3],
            jax.device_put(args[3], P(None)),
            ids=None if ids is None else jax.device_put(ids, P("data", None)),
            positions=jax.device_put(positions, P(None)),
            cotangent=sharded[3],
        )
    assert got[0].sharding.spec == spec
    assert [g.sharding.spec for g in got[1][:3]] == [spec] * 3
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        close(np.asarray(x), np.asarray(y))


# Choosing and bad inputs


@pytest.mark.parametrize("implementation", [None, "dense", "blockwise"])
@pytest.mark.parametrize("tolerance", [None, 0, 0.01])
def test_every_implementation_meets_its_tolerance(implementation, tolerance):
    args = inputs(length=9, key_heads=2)
    got = attention(*args, implementation=implementation, tolerance=tolerance)
    allowed = 2 * (tolerance or 0) * float(jnp.abs(args[2]).max())
    close(got, naive_attention(*args), atol=1e-5 + allowed)


def shapes(
    query=(2, 3, 4, 8), key=(2, 3, 2, 8), value=(2, 3, 2, 8), m=(4,), dtypes="fff", **options
):
    names = {"f": np.float32, "h": np.float16, "i": np.int32}
    arrays = [np.zeros(s, names[d]) for s, d in zip((query, key, value), dtypes, strict=True)]
    return attention_op_by_op(*arrays, np.ones(m, np.float32), **options)


IDS = np.zeros((2, 3), int)
LONG = {"key": (2, 5, 2, 8), "value": (2, 5, 2, 8)}


def test_the_good_shapes_of_the_table_below_pass():
    assert shapes().shape == (2, 3, 4, 8)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"query": (3, 4, 8)}, ValueError, "query (3, 4, 8)"),
        ({"query": (1, 3, 4, 8)}, ValueError, "same batch (axis 0), got query (1, 3, 4, 8)"),
        ({"key": (2, 0, 2, 8), "value": (2, 0, 2, 8)}, ValueError, "key (2, 0, 2, 8)"),
        ({"value": (2, 4, 2, 8)}, ValueError, "value (2, 4, 2, 8)"),
        ({"value": (2, 3, 1, 8)}, ValueError, "value (2, 3, 1, 8)"),
        ({"key": (2, 3, 2, 4)}, ValueError, "same head dim (axis 3)"),
        (
            {"query": (2, 3, 5, 8), "m": (5,)},
            ValueError,
            "got 5 query heads and 2 key heads",
        ),
        ({"dtypes": "fhf"}, TypeError, "key float16"),
        ({"dtypes": "iii"}, TypeError, "query int32"),
        ({"m": (2,)}, ValueError, "(4,); got (2,)"),
        ({"m": (1, 4)}, ValueError, "got (1, 4)"),
        ({"scale": np.ones(4)}, ValueError, "got the shape (4,)"),
        ({"tolerance": 1.0}, ValueError, "got 1.0"),
        ({"tolerance": -0.1}, ValueError, "got -0.1"),
        ({"tolerance": math.nan}, ValueError, "got nan"),
        ({"implementation": "flash"}, ValueError, "'splash'], got 'flash'"),
        (
            {"query_positions": np.zeros(3)},
            TypeError,
            "query_positions must be integers, got float",
        ),
        ({"query_positions": np.arange(4)}, ValueError, "(3,) or (2, 3), got (4,)"),
        ({"query_positions": np.zeros((1, 3), int)}, ValueError, "got (1, 3)"),
        (
            {"query_positions": np.arange(3), "key_positions": np.arange(4)},
            ValueError,
            "key_positions must have the shape (3,) or (2, 3), got (4,)",
        ),
        ({**LONG, "query_positions": np.arange(3)}, ValueError, "T is 3 and S is 5"),
        ({**LONG, "key_positions": np.arange(5)}, ValueError, "T is 3 and S is 5"),
        ({"segment_ids": IDS[0]}, ValueError, "(2, 3), got (3,)"),
        ({"segment_ids": IDS > 0}, TypeError, "segment_ids must be integers, got bool"),
        ({**LONG, "segment_ids": IDS}, ValueError, "T is 3 and S is 5"),
        ({"key_segment_ids": IDS}, ValueError, "key_segment_ids was given without segment_ids"),
        (
            {"segment_ids": IDS, "key_segment_ids": IDS[:1]},
            ValueError,
            "key_segment_ids must have the shape (2, 3), got (1, 3)",
        ),
    ],
)
def test_bad_inputs_are_named(options, error, message):
    with pytest.raises(error) as raised:
        shapes(**options)
    assert message in str(raised.value)


def test_bad_slopes_are_named():
    *args, _ = inputs()
    with pytest.raises(ValueError, match=r"head 2 has -0\.5"):
        attention_op_by_op(*args, np.float32([1, 1, -0.5, 1]))
    with pytest.raises(TypeError, match="got int32"):
        attention(*args, np.ones(4, np.int32))
