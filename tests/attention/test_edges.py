"""Where numbers are large, positions far apart, or arguments not what they should be."""

from functools import partial

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from alibi_jax import DistanceBias, attention, slopes
from tests.attention.naive import close, inputs, naive_attention
from tests.compiles import compilations

blockwise = partial(attention, implementation="blockwise")
dense = partial(attention, implementation="dense")
by_tiles = pytest.mark.parametrize("attend", [dense, blockwise], ids=["dense", "blockwise"])


def rms(x):
    return np.sqrt(np.mean(np.square(np.asarray(x, np.float64))))


# Gradients


@partial(jax.jit, static_argnames="attend")
def gradients(attend, cotangent, *args):
    return jax.vjp(attend, *args)[1](cotangent)


@pytest.mark.parametrize(
    ("dtype", "limits"),
    [
        # Rounding to 8 bits is off by 2^-9 at most, by 1.7e-3 of the RMS of what is measured.
        (jnp.bfloat16, (2e-3, 2e-3, 2e-3, 1e-5)),
        # Dense ones are off by 1.1e-6, 7e-7, 4e-7 and 3e-7 at worst.
        (jnp.float32, (2e-6, 2e-6, 1e-6, 3e-6)),
    ],
)
@pytest.mark.parametrize("outlier", ["keys", "query"])
def test_gradients_lose_no_more_than_their_own_rounding(dtype, limits, outlier):
    rng = np.random.default_rng(0)
    query, key, value, cotangent = (rng.normal(size=(1, 1536, 2, 64)) for _ in range(4))
    if outlier == "keys":
        key[:, ::97] *= 8
    else:
        query[:, 700] *= 30
    args = [jnp.asarray(x, jnp.float32).astype(dtype) for x in (cotangent, query, key, value)]
    m = jnp.float32([0.25, 0.02])
    got = gradients(blockwise, *args, m)
    with jax.enable_x64(True):
        wide = [jnp.asarray(np.asarray(x, np.float64)) for x in (*args, m)]
        exact = gradients(dense, *wide)
    for x, y, limit in zip(got, exact, limits, strict=True):
        assert rms(np.asarray(x, np.float64) - np.asarray(y)) < limit * rms(y)


@by_tiles
@pytest.mark.parametrize(("lengths", "scale"), [((13, 2), None), ((31, 130), -1.0)])
def test_weights_stay_below_one_at_enormous_logits(attend, lengths, scale):
    """No value can gain more than all of every row's cotangent."""
    query, key, value, m = inputs(length=lengths[0], key_length=lengths[1])
    run = partial(attend, causal=False, scale=scale)
    cotangent = jnp.ones_like(query)
    *grads, _ = jax.jit(lambda *x: jax.vjp(run, *x)[1](cotangent))(1e4 * query, 1e4 * key, value, m)
    assert all(np.isfinite(x).all() for x in grads)
    assert np.abs(grads[2]).max() <= 1.01 * lengths[0]


def test_parameters_of_a_bias_that_is_finite_only_where_tokens_are():
    """A thousand tokens a hundred thousand positions out, with a function that overflows beyond."""

    def growing(p, distance, query_position):
        return -p * jnp.expm1(distance.astype(p.dtype) / 200)

    query, key, value, _ = inputs(length=1030, heads=2, batch=1)
    p = jnp.float32([0.5, 0.1])

    def loss(attend, p):
        bias = DistanceBias(growing, p)
        return attend(query, key, value, bias, query_positions=100_000 + np.arange(1030)).sum()

    got, expected = (jax.jit(jax.grad(partial(loss, attend)))(p) for attend in (blockwise, dense))
    close(got, expected, atol=1e-3)


def test_derivatives_that_tiles_lack_name_dense():
    args = inputs(length=40, batch=1)

    def loss(query):
        return blockwise(query, *args[1:]).sum()

    with pytest.raises(NotImplementedError, match='implementation="dense"'):
        jax.grad(lambda query: jax.grad(loss)(query).sum())(args[0])
    with pytest.raises(TypeError, match='implementation="dense"'):
        jax.jvp(loss, args[:1], args[:1])


def test_second_derivatives_in_forward_mode_are_those_of_dense():
    args = inputs(length=40, batch=1)

    @partial(jax.jit, static_argnums=0)
    def product(attend, query):
        gradient = jax.grad(lambda query: jnp.square(attend(query, *args[1:])).sum())
        return jax.jvp(gradient, (query,), (jnp.cos(query),))[1]

    close(product(blockwise, args[0]), product(dense, args[0]), atol=1e-4)


# Positions and windows


@by_tiles
def test_queries_at_both_ends_of_int32(attend):
    """Differences of queries and keys fit int32; those of two queries do not."""
    length = 600
    query, key, value, m = inputs(length=length, heads=2, batch=1)
    at = np.arange(length)
    query_positions = np.where(at < 300, -1_500_000_000, 1_500_000_000) + at
    for key_positions in (at, at - 300):
        options = {"query_positions": query_positions, "key_positions": key_positions}
        exact = naive_attention(query, key, value, 0 * m, positions=[*options.values()])
        close(jax.jit(attend)(query, key, value, 0 * m, **options), exact)
    # Keys far apart and queries between them, and positions that wrap round.
    options = {"query_positions": at, "key_positions": query_positions}
    exact = naive_attention(query, key, value, 0 * m, positions=[*options.values()])
    close(jax.jit(attend)(query, key, value, 0 * m, **options), exact)
    wrapped = {name: (x + 2_000_000_000).astype(np.int32) for name, x in options.items()}
    close(jax.jit(attend)(query, key, value, 0 * m, **wrapped), exact)


def test_known_positions_of_a_million_keys_are_not_computed_with_at_compile_time(capfd):
    """XLA says when that takes it more than a second."""
    query = jax.ShapeDtypeStruct((1, 512, 1, 8), jnp.float32)
    key = jax.ShapeDtypeStruct((1, 2**20, 1, 8), jnp.float32)
    jax.jit(partial(blockwise, slopes=slopes(1))).lower(query, key, key).compile()
    assert "onstant folding" not in capfd.readouterr().err


@by_tiles
@pytest.mark.parametrize("make", [int, np.int64, jnp.int32, np.uint8])
def test_windows_of_any_kind_of_integer_inside_and_outside_of_jit(attend, make):
    args = inputs(length=12)
    exact = naive_attention(*args, window=2)
    close(attend(*args, window=make(2)), exact)
    close(jax.jit(lambda *x: attend(*x, window=make(2)))(*args), exact)
    close(jax.jit(lambda w, *x: attend(*x, window=w))(make(2), *args), exact)


def test_windows_of_64_bits_do_not_wrap():
    args = inputs(length=12)
    with jax.enable_x64(True):
        run = jax.jit(lambda w, *x: attention(*x, window=w))
        for window in (2**31, 2**32 + 1, 2**62):
            close(run(np.int64(window), *args), naive_attention(*args))
        assert np.isnan(run(np.int64(5 - 2**32), *args)).all()


@by_tiles
@pytest.mark.parametrize("window", [0, -3])
def test_windows_that_hide_everything_are_refused_or_nan(attend, window):
    args = inputs(length=6)
    with pytest.raises(ValueError, match="window must be an integer from 1"):
        attend(*args, window=window)
    traced = jax.jit(lambda w, *x: attend(*x, window=w))(window, *args)
    assert np.isnan(traced).all()


# Arguments


def test_arguments_that_look_right_are_refused():
    query, key, value, m = inputs()
    with pytest.raises(TypeError, match="causal must be True or False, got 'yes'"):
        attention(query, key, value, m, causal="yes")
    small = [x.astype(ml_dtypes.float8_e4m3fn) for x in (query, key, value)]
    with pytest.raises(TypeError, match="bfloat16, float16, float32, float64"):
        attention(*small, m)
    with pytest.raises(TypeError, match="tolerance must be a number"):
        jax.jit(lambda t: attention(query, key, value, m, tolerance=t))(0.1)


@by_tiles
def test_eager_calls_compile_once_for_a_shape(attend):
    m = slopes(4)

    def total(args, m):
        return attend(*args, m).sum()

    for _ in range(2):
        args = inputs(length=30)[:3]
        segments = jnp.zeros((2, 30), jnp.int32)
        with compilations() as count:
            for scale, window in ((0.5, 3), (0.25, 7)):
                attend(*args, m, scale=scale, window=window, segment_ids=segments)
            jax.grad(total)(args, m)
            jax.grad(jax.checkpoint(lambda *x: total(x, m)))(*args)
    assert count() == 0


@pytest.mark.parametrize("length", [256, 512, 513, 1024])
def test_a_boundary_between_implementations_moves_nothing(length):
    args = inputs(length=length, heads=1, batch=1)
    close(jax.jit(attention)(*args), naive_attention(*args))
