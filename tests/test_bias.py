"""Slopes, bias and horizon against the authors' lists, closed forms and brute force in float64."""

import itertools
import math

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from alibi_jax.bias import NEVER, bias, horizon, slopes

examples = settings(deadline=None, max_examples=25)


# Slopes

COUNTS = range(1, 257)


def authors_slopes(n: int) -> list[float]:
    """`get_slopes` of ofirpress/attention_with_linear_biases, as its recursion describes it."""
    if math.log2(n).is_integer():
        ratio = 2 ** -(2 ** -(math.log2(n) - 3))
        return [ratio * ratio**i for i in range(n)]
    closest = 2 ** math.floor(math.log2(n))
    return authors_slopes(closest) + authors_slopes(2 * closest)[0::2][: n - closest]


def all_slopes(**options) -> list[np.ndarray]:
    """Return the slopes for 1 to 256 heads; one jit, for eager arrays compile once a shape."""
    return [np.asarray(m) for m in jax.jit(lambda: [slopes(n, **options) for n in COUNTS])()]


def test_reference_slopes_are_the_authors_in_order():
    for n, got in zip(COUNTS, all_slopes(), strict=True):
        assert got.dtype == np.float32
        expected = np.array(authors_slopes(n), np.float32)
        np.testing.assert_array_equal(got, expected, err_msg=f"{n} heads")


def test_published_slopes():
    """The paper's section 3 for 8 and 16 heads; issue 17 of the authors' repository for 12."""
    eight = [0.5, 0.25, 0.125, 0.0625, 0.03125, 0.015625, 0.0078125, 0.00390625]
    np.testing.assert_array_equal(slopes(8), np.float32(eight))
    np.testing.assert_allclose(
        slopes(12), [*eight, 0.70711, 0.35355, 0.17678, 0.08839], atol=5e-6, rtol=0
    )
    np.testing.assert_array_equal(slopes(16), np.float32([2 ** (-k / 2) for k in range(1, 17)]))


def test_geometric_slopes_are_the_papers_formula():
    for n, got, reference in zip(COUNTS, all_slopes(rule="geometric"), all_slopes(), strict=True):
        expected = np.float32([2 ** (-8 * k / n) for k in range(1, n + 1)])
        np.testing.assert_array_equal(got, expected)
        assert np.array_equal(got, reference) == math.log2(n).is_integer(), n


@pytest.mark.parametrize("rule", ["reference", "geometric"])
def test_bias_max_scales_the_logarithm(rule):
    for n in (1, 6, 8):
        np.testing.assert_allclose(
            np.log2(slopes(n, rule=rule, bias_max=16.0)), 2 * np.log2(slopes(n, rule=rule)), 1e-6
        )


def test_slopes_take_numpy_integers():
    np.testing.assert_array_equal(slopes(np.int64(6)), slopes(6))


# Bias


def naive_bias(slopes, query_positions, key_positions, kind):
    """One row of positions, with loops, in float64."""
    heads = np.shape(slopes)[-1]
    out = np.empty((heads, len(query_positions), len(key_positions)))
    for h, t, s in np.ndindex(out.shape):
        q, k = query_positions[t], key_positions[s]
        if kind == "causal":
            out[h, t, s] = -float(slopes[h]) * (int(q) - int(k)) if k <= q else -np.inf
        elif kind == "symmetric":
            out[h, t, s] = -float(slopes[h]) * math.dist(np.atleast_1d(q), np.atleast_1d(k))
        else:
            side = 0 if k < q else 1
            out[h, t, s] = -float(slopes[side][h]) * abs(int(q) - int(k))
    return out


def random_slopes(rng, heads, kind):
    return rng.uniform(0, 1, (2, heads) if kind == "asymmetric" else heads).astype(np.float32)


@examples
@given(
    st.sampled_from(["causal", "symmetric", "asymmetric"]),
    st.sampled_from(["int8", "uint8", "uint16", "int32", "uint32"]),
    st.integers(1, 4),
    st.integers(0, 2**32 - 1),
)
def test_bias_matches_loops(kind, dtype, heads, seed):
    rng = np.random.default_rng(seed)
    query = rng.integers(0, 127, (2, 3, 5)).astype(dtype)
    key = rng.integers(0, 127, (2, 3, 4)).astype(dtype)
    m = random_slopes(rng, heads, kind)
    got = jax.jit(bias, static_argnames="kind")(m, query, key, kind=kind)
    assert got.dtype == jnp.float32
    assert got.shape == (2, 3, heads, 5, 4)
    for i, j in np.ndindex(2, 3):
        expected = naive_bias(m, query[i, j], key[i, j], kind)
        np.testing.assert_allclose(got[i, j], expected, rtol=1e-6)


@examples
@given(st.integers(-(2**31) + 300, 2**31 - 300), st.sampled_from(["causal", "symmetric"]))
def test_only_differences_matter_exactly(shift, kind):
    query, key = np.arange(100, 105), np.arange(0, 200, 7)
    m = slopes(6)
    np.testing.assert_array_equal(
        bias(m, query + shift, key + shift, kind=kind), bias(m, query, key, kind=kind)
    )


@pytest.mark.parametrize(("dtype", "shift"), [(np.int32, 2**30 + 1), (np.float32, 0)])
def test_planar_symmetric_bias_is_euclidean(dtype, shift):
    """Integer coordinates are subtracted as integers, so a large shift changes nothing."""
    rng = np.random.default_rng(0)
    query, key = rng.integers(-9, 9, (3, 5, 2)), rng.integers(-9, 9, (3, 4, 2))
    m = random_slopes(rng, 3, "symmetric")
    shifted = ((x + shift).astype(dtype) for x in (query, key))
    got = bias(m, *shifted, kind="symmetric")
    assert got.shape == (3, 3, 5, 4)
    for i in range(3):
        np.testing.assert_allclose(
            got[i], naive_bias(m, query[i], key[i], "symmetric"), rtol=1e-6, atol=1e-7
        )


def test_a_batch_of_two_tokens_needs_vmap():
    positions = jnp.array([[0, 1], [4, 7]])
    m = slopes(2)
    got = jax.vmap(lambda p: bias(m, p, p, kind="symmetric"))(positions)
    for i, distance in enumerate((1, 3)):
        np.testing.assert_array_equal(got[i, :, 0, 1], -m * distance)


def test_slope_gradient_is_minus_the_distances_and_finite():
    """The future's -inf must not reach a slope, not even through 0 * inf."""
    query, key = jnp.arange(4), jnp.arange(6)
    distance = np.clip(np.arange(4)[:, None] - np.arange(6), 0, None)

    def visible(m):
        values = bias(m, query, key)
        return jnp.sum(jnp.where(jnp.isfinite(values), values, 0.0))

    m = jnp.array([0.0, 0.5])
    np.testing.assert_allclose(jax.grad(visible)(m), [-distance.sum()] * 2)
    softmaxed = jax.grad(lambda m: jax.nn.softmax(bias(m, query, key))[..., 0].sum())(m)
    assert np.isfinite(softmaxed).all()


def test_coordinate_gradient_is_finite_where_points_coincide():
    points = jnp.array([[0.0, 0.0], [3.0, 4.0], [3.0, 4.0]])
    gradient = jax.grad(lambda p: bias(jnp.ones(1), p, points, kind="symmetric").sum())(points)
    np.testing.assert_allclose(gradient, [[1.2, 1.6], [-0.6, -0.8], [-0.6, -0.8]], rtol=1e-6)


def test_bias_under_vmap_and_jit_is_the_loop():
    rng = np.random.default_rng(0)
    m = jnp.asarray(rng.uniform(0, 1, (3, 4)), jnp.float32)
    query, key = (jnp.asarray(rng.integers(0, 50, (3, n))) for n in (5, 6))
    got = jax.jit(jax.vmap(bias))(m, query, key)
    np.testing.assert_array_equal(
        got, jnp.stack([bias(*x) for x in zip(m, query, key, strict=True)])
    )


def test_relative_bias_keeps_its_distribution_in_bfloat16_and_the_absolute_form_does_not():
    """The last of 32k positions, 16 heads: total variation from float64."""
    length, m = 32768, np.asarray(slopes(16))
    content = np.random.default_rng(0).normal(size=(16, length))
    positions = np.arange(length)

    def distribution(values):
        weights = np.exp(content + values - np.max(content + values, axis=-1, keepdims=True))
        return weights / weights.sum(axis=-1, keepdims=True)

    exact = distribution(-m.astype(np.float64)[:, None] * (length - 1 - positions))
    relative = np.asarray(bias(m, positions[-1:], positions), ml_dtypes.bfloat16)[:, 0]
    absolute = (m[:, None] * positions).astype(ml_dtypes.bfloat16)
    error = [
        0.5 * np.abs(distribution(x.astype(np.float64)) - exact).sum(axis=-1).max()
        for x in (relative, absolute)
    ]
    assert error[0] < 2e-3 < 0.5 < error[1]


# Horizon

jit_horizon = jax.jit(horizon)


def dropped_mass(slope, logit_range, length, width):
    """Take the worst row of `length` keys: those at `width` or more at the top of the range."""
    logits = -slope * np.arange(length, dtype=np.float64)
    logits[width:] += logit_range
    weights = np.exp(logits - logits.max())
    return weights[width:].sum() / weights.sum()


def dropped_mass_without_length(slope, logit_range, width):
    """Take an endless row: both parts are geometric series."""
    log_odds = logit_range - slope * width - math.log(-math.expm1(-slope * width))
    return 1 / (1 + math.exp(-log_odds))


@st.composite
def tolerances(draw):
    return np.float32(draw(st.sampled_from([10.0**-e for e in range(1, 10)] + [0.3, 0.9])))


@examples
@given(
    st.sampled_from([1, 3, 8, 12]),
    st.floats(0, 100, width=32),
    tolerances(),
    st.sampled_from([1, 2, 17, 300, 4096, 65536]),
    st.sampled_from([1.0, 2.0**-8, 0.0]),
)
def test_horizon_is_the_smallest_that_keeps_the_tolerance(
    heads, logit_range, tolerance, length, factor
):
    m = np.asarray(slopes(heads)) * np.float32(factor)
    got = jit_horizon(m, logit_range=logit_range, tolerance=tolerance, length=length)
    assert got.dtype == jnp.int32
    for slope, width in zip(m.astype(np.float64), np.asarray(got), strict=True):
        assert 1 <= width <= length
        assert dropped_mass(slope, logit_range, length, width) <= tolerance * (1 + 1e-4)
        if width > 1:
            assert dropped_mass(slope, logit_range, length, width - 1) > tolerance * (1 - 1e-4)


@examples
@given(st.floats(0, 100, width=32), tolerances(), st.integers(0, 16))
def test_horizon_without_a_length(logit_range, tolerance, exponent):
    slope = 2.0**-exponent
    (width,) = np.asarray(
        jit_horizon(np.float32([slope]), logit_range=logit_range, tolerance=tolerance)
    ).tolist()
    mass = dropped_mass_without_length
    assert mass(slope, logit_range, width) <= tolerance * (1 + 1e-4)
    if width > 1:
        assert mass(slope, logit_range, width - 1) > tolerance * (1 - 1e-4)


def test_horizon_at_ranges_that_float32_rounds():
    for logit_range in (1e3, 1e4, 3e4):
        near = 1e-4 + 3e-7 * logit_range
        for exponent in range(9):
            for tolerance in np.float32([1e-7, 1e-3]):
                m = np.float32([2.0**-exponent])
                width = int(jit_horizon(m, logit_range=logit_range, tolerance=tolerance)[0])
                # Of rows without end the dropped keys have e^(R-mW) for each of the others.
                odds = tolerance / (1 - np.float64(tolerance))
                assert -m[0] * width + logit_range <= np.log(odds * (1 + near))
                assert -m[0] * (width - 1) + logit_range > np.log(odds * (1 - near))


def test_horizon_where_the_length_is_close_to_it():
    """Around the length from which on the length stops to matter, where the formulas meet."""
    m = np.asarray(slopes(8))
    each = jax.jit(jax.vmap(lambda m, r, t, n: horizon(m, logit_range=r, tolerance=t, length=n)[0]))
    for logit_range, tolerance in itertools.product((0.0, 3.0, 30.0), np.float32([1e-6, 0.1, 0.5])):
        endless = np.asarray(jit_horizon(m, logit_range=logit_range, tolerance=tolerance))
        ratio = np.array([0.7, 1.0, 1.02, 1.3])
        lengths = np.int32(np.ceil(ratio[:, None] * endless)).ravel()
        steep = np.tile(m, 4)
        constants = (np.full(32, x, np.float32) for x in (logit_range, tolerance))
        widths = np.asarray(each(steep[:, None], *constants, lengths))
        for slope, length, width in zip(np.float64(steep), lengths, widths, strict=True):
            assert dropped_mass(slope, logit_range, length, width) <= tolerance * (1 + 1e-4)
            if width > 1:
                less = dropped_mass(slope, logit_range, length, width - 1)
                assert less > tolerance * (1 - 1e-4)


def test_horizon_of_slope_zero_is_a_share_of_the_length():
    got = horizon(jnp.zeros(1), logit_range=0.0, tolerance=0.35, length=10)
    np.testing.assert_array_equal(got, [7])
    got = horizon(jnp.zeros(1), logit_range=math.log(3), tolerance=0.35, length=100)
    np.testing.assert_array_equal(got, [85])  # 100 - floor(100 * 0.35 / (0.35 + 3 * 0.65))


def test_horizon_where_nothing_can_be_dropped():
    m = jnp.array([0.0, 1e-9, 0.5])
    free = horizon(m, logit_range=10.0, tolerance=1e-6)
    np.testing.assert_array_equal(free[:2], [NEVER, NEVER])
    assert free[2] < 100
    np.testing.assert_array_equal(horizon(m, logit_range=0.0, tolerance=0.0), [NEVER] * 3)
    np.testing.assert_array_equal(horizon(m, logit_range=0.0, tolerance=0.0, length=7), [7] * 3)


def test_horizon_takes_traced_arguments():
    m = jnp.stack([slopes(4), slopes(4) / 2])
    traced = jax.jit(
        lambda m, r, t, n: jax.vmap(lambda m: horizon(m, logit_range=r, tolerance=t, length=n))(m)
    )(m, 5.0, 1e-3, 1000)
    for row, got in zip(m, traced, strict=True):
        expected = horizon(row, logit_range=5.0, tolerance=1e-3, length=1000)
        np.testing.assert_array_equal(got, expected)
    ranges = np.float32([1, 2, 3, 4])
    each = [horizon(m[0, h : h + 1], logit_range=ranges[h], tolerance=1e-3)[0] for h in range(4)]
    np.testing.assert_array_equal(horizon(m[0], logit_range=ranges, tolerance=1e-3), each)


# Bad inputs

POSITIONS = np.arange(3)
HALF = np.float32([0.5])


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: slopes(0), ValueError, "at least 1, got 0"),
        (lambda: slopes(-3), ValueError, "got -3"),
        (lambda: slopes(True), TypeError, "got True"),
        (lambda: slopes(8.0), TypeError, "got 8.0"),
        (lambda: slopes("8"), TypeError, "got '8'"),
        (lambda: slopes(8, rule="paper"), ValueError, "got 'paper'"),
        (lambda: slopes(8, bias_max=0.0), ValueError, "got 0.0"),
        (lambda: slopes(8, bias_max=math.nan), ValueError, "got nan"),
        (lambda: slopes(8, bias_max=math.inf), ValueError, "got inf"),
        (lambda: bias(HALF, POSITIONS, POSITIONS, kind="left"), ValueError, "got 'left'"),
        (lambda: bias(np.array([1]), POSITIONS, POSITIONS), TypeError, "got int32"),
        (
            lambda: bias(np.float32(0.5), POSITIONS, POSITIONS),
            ValueError,
            "[H] with H >= 1, got ()",
        ),
        (lambda: bias(HALF[:0], POSITIONS, POSITIONS), ValueError, "got (0,)"),
        (lambda: bias(HALF[None], POSITIONS, POSITIONS), ValueError, "got (1, 1)"),
        (
            lambda: bias(HALF, POSITIONS, POSITIONS, kind="asymmetric"),
            ValueError,
            "[2, H] with H >= 1, got (1,)",
        ),
        (
            lambda: bias(np.float32([0.5, -0.25]), POSITIONS, POSITIONS),
            ValueError,
            "head 1 has -0.25",
        ),
        (lambda: bias([0.5, math.inf], POSITIONS, POSITIONS), ValueError, "head 1 has inf"),
        (
            lambda: bias([[0.5, 0.5], [math.nan, 0.5]], POSITIONS, POSITIONS, kind="asymmetric"),
            ValueError,
            "head 0 has nan",
        ),
        (lambda: bias(HALF, HALF, POSITIONS), TypeError, "query_positions must be integers, got f"),
        (
            lambda: bias(HALF, POSITIONS, HALF, kind="symmetric"),
            TypeError,
            "key_positions must be integers, got float32",
        ),
        (lambda: bias(HALF, POSITIONS > 1, POSITIONS), TypeError, "got bool"),
        (
            lambda: bias(HALF, np.zeros((3, 2), bool), np.zeros((3, 2)), kind="symmetric"),
            TypeError,
            "floating coordinates, got bool",
        ),
        (lambda: bias(HALF, 3, POSITIONS), ValueError, "query_positions must have a shape"),
        (
            lambda: bias(HALF, POSITIONS[None], POSITIONS),
            ValueError,
            "(1, 3) and key_positions (3,)",
        ),
        (
            lambda: bias(HALF, np.zeros((4, 3, 2)), np.zeros((5, 3, 2)), kind="symmetric"),
            ValueError,
            "(4,) and (5,)",
        ),
        (lambda: horizon(HALF, logit_range=-1.0, tolerance=0.1), ValueError, "got -1.0"),
        (lambda: horizon(HALF, logit_range=math.nan, tolerance=0.1), ValueError, "got nan"),
        (lambda: horizon(HALF, logit_range=HALF[[0, 0]], tolerance=0.1), ValueError, "(2,)"),
        (lambda: horizon(HALF, logit_range=1.0, tolerance=1.0), ValueError, "got 1.0"),
        (lambda: horizon(HALF, logit_range=1.0, tolerance=-0.5), ValueError, "got -0.5"),
        (lambda: horizon(HALF, logit_range=1.0, tolerance=0.1, length=0), ValueError, "got 0"),
        (lambda: horizon(HALF, logit_range=1.0, tolerance=0.1, length=8.0), TypeError, "float32"),
        (lambda: horizon([-1.0], logit_range=1.0, tolerance=0.1), ValueError, "head 0 has -1.0"),
    ],
)
def test_bad_inputs_are_named(call, error, message):
    with pytest.raises(error) as raised:
        call()
    assert message in str(raised.value)
