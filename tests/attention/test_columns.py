"""ALiBi in extra columns: what they encode, and the kernels that attend with them."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo
from jax.experimental.pallas.ops.tpu import splash_attention
from jax.sharding import PartitionSpec as P

from alibi_jax.attention import attention, choice, columns
from alibi_jax.attention.case import Case
from alibi_jax.bias import bias, slopes
from tests.attention.naive import close, inputs, naive_attention
from tests.attention.test_nonfinite import expected as expected_of

HOPPER = (9, 0)


def one_rounding(x, terms):
    """What FlashBias does, in place of `columns._split`: a single 16-bit number."""
    zero = jnp.zeros_like(x)
    return [jax.lax.reduce_precision(x, 8, 7), *[zero] * (terms - 1)]


def positions(length, key_length=None):
    """Positions that align the ends, as `attention` gives them to an implementation."""
    key_length = key_length or length
    keys = np.arange(key_length, dtype=np.int32)[None]
    return {"query_positions": keys[:, key_length - length :], "key_positions": keys}


# The columns


def encoded_error(m, scale, length):
    """Return by how much the encoded biases of some pairs miss, in roundings of slope * length."""
    rows = np.array([0, length // 3, length - 1])
    keys = np.union1d(rows, np.random.default_rng(0).integers(0, length, 10_000))
    middle = length // 2
    # Compiled, since XLA may simplify what rounds. A new function, since `_split` is replaced.
    of_queries, of_keys = jax.jit(
        lambda m, i, j: (columns.query_columns(m / np.float32(scale), i), columns.key_columns(j))
    )(m, *(jnp.asarray(x - middle)[None] for x in (rows, keys)))
    for found in (of_queries, of_keys):
        np.testing.assert_array_equal(found, found.astype(jnp.bfloat16).astype(jnp.float32))
    got = np.einsum("thc,sc->hts", *(np.float64(x)[0] for x in (of_queries, of_keys))) * scale
    m64 = np.float64(m)[:, None, None]
    wrong = got + m64 * (rows[:, None] - keys)
    wrong -= wrong[:, np.arange(3), np.searchsorted(keys, rows)][
        ..., None
    ]  # what a row shares, softmax ignores
    return np.abs(wrong / (m64 * length)).max() / 2.0**-24


LEARNED = np.random.default_rng(0).lognormal(-3, 2, 64).astype(np.float32)


@pytest.mark.parametrize("m", [8, 12, 16, 40, LEARNED], ids=lambda m: str(np.shape(m) or m))
@pytest.mark.parametrize(("length", "head_dim"), [(2000, 80), (65536, 64), (1_000_001, 128)])
def test_columns_encode_the_bias_to_float32_rounding(m, length, head_dim, monkeypatch):
    m = slopes(m) if isinstance(m, int) else jnp.asarray(m)
    assert encoded_error(m, head_dim**-0.5, length) < 1.5
    monkeypatch.setattr(columns, "_split", one_rounding)
    assert encoded_error(m, head_dim**-0.5, length) > 1e3


def plain_attention(query, key, value, bias, scale):
    """Dense attention with a bias f32[H, T, S], with 16-bit weights and a float32 output."""
    group = query.shape[2] // key.shape[2]
    key, value = (jnp.repeat(x, group, axis=2) for x in (key, value))
    logits = jnp.einsum("bthd,bshd->bhts", query, key, preferred_element_type=jnp.float32)
    weights = jax.nn.softmax(np.float32(scale) * logits + bias[None]).astype(value.dtype)
    return jnp.einsum("bhts,bshd->bthd", weights, value, preferred_element_type=jnp.float32)


def with_exact_bias(query, key, value, m, scale):
    at = positions(query.shape[1], key.shape[1])
    exact = bias(m, at["query_positions"][0], at["key_positions"][0])
    return plain_attention(query, key, value, exact, scale)


def through_columns(query, key, value, m, scale):
    at = positions(query.shape[1], key.shape[1])
    only_mask = bias(jnp.zeros_like(m), at["query_positions"][0], at["key_positions"][0])
    query, key = columns.with_columns(query, key, m / np.float32(scale), **at)
    return plain_attention(query, key, value, only_mask, scale)


@pytest.mark.parametrize("length", [1000, 8192, 65536])
def test_attention_through_columns_is_as_exact_as_bfloat16_allows(length, monkeypatch):
    """The last rows, which have the largest positions and the most keys."""
    rng = np.random.default_rng(0)
    query, key, value = (
        jnp.asarray(rng.normal(size=shape).astype(ml_dtypes.bfloat16))
        for shape in ((1, 4, 16, 40), (1, length, 1, 40), (1, length, 1, 8))
    )
    m, scale = slopes(16), 40**-0.5
    exact = naive_attention(query, key, value, m, scale=scale)

    def error(f):
        return np.abs(np.float64(f(query, key, value, m, scale)) - exact).max()

    floor = error(with_exact_bias)
    assert error(through_columns) <= 1.1 * floor
    monkeypatch.setattr(columns, "_split", one_rounding)
    assert error(through_columns) > 10 * floor


@partial(jax.jit, static_argnums=0)
def gradients(f, *args):
    def loss(*args):
        return jnp.sum(jnp.sin(f(*args).astype(jnp.float32)))

    return jax.grad(loss, (0, 1, 2, 3))(*args)


def test_gradients_through_columns_are_those_of_dense_attention():
    args = inputs(length=70, heads=4, key_heads=2, dim=12, value_dim=5)
    got = gradients(partial(through_columns, scale=0.3), *args)
    expected = gradients(partial(attention, scale=0.3, implementation="dense"), *args)
    for x, y in zip(got, expected, strict=True):
        close(x, y, atol=2e-4)


def test_the_derivative_in_a_slope_is_minus_the_distance():
    m, keys = jnp.asarray([0.3]), jnp.arange(-300_000, 300_000)[None]
    rows = keys[:, ::199_999]
    _, tangent = jax.jvp(lambda m: columns.query_columns(m, rows), (m,), (jnp.ones(1),))
    got = np.einsum("thc,sc->ts", np.float64(tangent[0]), np.float64(columns.key_columns(keys)[0]))
    np.testing.assert_array_equal(got, np.asarray(keys) - np.asarray(rows).T)


@jax.custom_jvp
def round_gradient(x):
    """Return x; its gradient is rounded to bfloat16, as kernels do before they multiply with it."""
    return x


@round_gradient.defjvp
def _(primals, tangents):
    return primals[0], jax.lax.reduce_precision(tangents[0], 8, 7)


def test_slope_gradients_survive_bfloat16(monkeypatch):
    """They cancel between columns as large as positions, times gradients that are rounded."""
    softmax = jax.nn.softmax
    monkeypatch.setattr(jax.nn, "softmax", lambda x: softmax(round_gradient(x)))
    query, key, value, _ = inputs(batch=1, length=1024, heads=8, dim=16)
    args = [x.astype(jnp.bfloat16) for x in (query, key, value)]
    m = slopes(8)
    got = gradients(partial(through_columns, scale=0.25), *args, m)[3]
    args = [x.astype(jnp.float32) for x in args]
    expected = gradients(partial(attention, scale=0.25, implementation="dense"), *args, m)[3]
    np.testing.assert_allclose(got, expected, rtol=0.03)


# cuDNN, as far as it goes without a GPU: which kernels are called, with which operands


@pytest.fixture
def hopper(monkeypatch):
    """A GPU to lower for: JAX asks for its version and that of cuDNN."""
    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91300)
    for name, answer in (
        ("check_compute_capability", True),
        ("is_cuda_compute_capability_equal", False),
    ):
        monkeypatch.setattr(fused_attention_stablehlo, name, lambda _, answer=answer: answer)
    monkeypatch.setattr(choice, "platform", lambda: "gpu")
    monkeypatch.setattr(choice, "capability", lambda: HOPPER)


def lowered(f, *args):
    text = jax.jit(f).trace(*args).lower(lowering_platforms=("cuda",)).as_text()
    shapes = {
        tuple(map(int, s.split("x"))) for s in re.findall(r"tensor<(\d+(?:x\d+)*)x[a-z]", text)
    }
    return text, shapes


LENGTH = 1031  # odd, and a number that nothing else in the program is


@pytest.mark.parametrize(("head_dim", "value_dim", "width"), [(64, 64, 72), (20, 128, 128)])
def test_attention_on_a_gpu_lowers_to_cudnn(hopper, head_dim, value_dim, width):
    args = inputs(length=LENGTH, key_heads=2, dim=head_dim, value_dim=value_dim)
    args = [*(x.astype(jnp.bfloat16) for x in args[:3]), args[3]]
    text, shapes = lowered(attention, *args)
    assert "__cudnn$fmhaSoftmax" in text
    assert "__cudnn$fmhaSoftmaxBackward" not in text
    assert str(head_dim**-0.5) in text
    assert (2, LENGTH + 1, 4, width) in shapes

    text, of_gradients = lowered(partial(gradients, attention), *args)
    assert "__cudnn$fmhaSoftmaxBackward" in text
    for shape in shapes | of_gradients:
        assert sum(size in (LENGTH, LENGTH + 1) for size in shape) <= 1


def test_cudnn_is_called_on_each_device_of_a_mesh(hopper):
    args = inputs(length=LENGTH, key_heads=2, dim=64)
    mesh = jax.make_mesh((2, 2), ("data", "tensor"), devices=jax.devices()[:4])
    with jax.set_mesh(mesh):
        spec = P("data", None, "tensor", None)
        sharded = [jax.device_put(x.astype(jnp.bfloat16), spec) for x in args[:3]]
        m = jax.device_put(args[3], P(None))
        text, shapes = lowered(partial(gradients, attention), *sharded, m)
    assert "__cudnn$fmhaSoftmaxBackward" in text
    assert (1, LENGTH + 1, 2, 72) in shapes


@pytest.mark.parametrize(("dim", "value_dim", "scale"), [(16, 16, None), (12, 40, 0.3)])
def test_cudnn_pads_and_scales_rightly(hopper, monkeypatch, dim, value_dim, scale):
    """By value, with JAX's own XLA attention in the place of the kernel."""
    kernel = jax.nn.dot_product_attention
    called = []

    def stand_in(*args, implementation, **kwargs):
        called.append(implementation)
        return kernel(*args, implementation="xla", **kwargs)

    monkeypatch.setattr(jax.nn, "dot_product_attention", stand_in)
    *args, m = inputs(length=33, key_heads=2, dim=dim, value_dim=value_dim)
    args = [x.astype(jnp.bfloat16) for x in args]
    scale = scale and np.float64(scale)
    attend = partial(attention, scale=scale, implementation="cudnn")
    expected = naive_attention(*args, m, scale=scale)
    with jax.numpy_dtype_promotion("standard"):  # the stand-in relies on it
        close(jax.jit(attend)(*args, m).astype(jnp.float32), expected, atol=2e-2)
        found = gradients(attend, *args, m)
    args = [x.astype(jnp.float32) for x in args]
    expected = gradients(partial(attention, scale=scale, implementation="dense"), *args, m)
    for x, y in zip(found, expected, strict=True):
        close(x.astype(jnp.float32), y, atol=0.02 * np.abs(y).max())
    assert set(called) == {"cudnn"}


# Splash attention, interpreted


@pytest.fixture
def interpreted(monkeypatch):
    make = splash_attention.make_splash_mha
    monkeypatch.setattr(splash_attention, "make_splash_mha", partial(make, interpret=True))
    monkeypatch.setattr(columns, "SPLASH_BLOCK", 128)
    monkeypatch.setattr(choice, "platform", lambda: "tpu")


splash = partial(attention, implementation="splash")
dense = partial(attention, implementation="dense")


@pytest.mark.parametrize(("length", "key_length"), [(150, 150), (20, 280)])
def test_splash_matches_naive_float64(interpreted, length, key_length):
    args = inputs(length=length, key_length=key_length, key_heads=2, dim=16, value_dim=8)
    attend = partial(splash, scale=0.3)
    close(jax.jit(attend)(*args), naive_attention(*args, scale=0.3), atol=1e-4)
    expected = gradients(partial(dense, scale=0.3), *args)
    for x, y in zip(gradients(attend, *args), expected, strict=True):
        close(x, y, atol=1e-4 * np.abs(y).max())


def test_splash_takes_segments_and_bfloat16(interpreted):
    *args, m = inputs(length=200, dim=16)
    args = [x.astype(jnp.bfloat16) for x in args]
    ids = np.sort(np.random.default_rng(0).integers(0, 4, (2, 200)))
    got = jax.jit(partial(splash, segment_ids=ids))(*args, m)
    assert got.dtype == jnp.bfloat16
    expected = naive_attention(*args, m, segments=(ids, ids))
    close(got.astype(jnp.float32), expected, atol=2e-2)


def poisoned(seed, seen, *, length, heads, key_heads):
    """Return inputs with a NaN or infinity in one place, and what is to come of it in float64."""
    rng = np.random.default_rng(seed)
    args = [np.array(x) for x in inputs(seed, length=length, heads=heads, key_heads=key_heads)]
    args.append(rng.normal(size=args[0].shape).astype(np.float32))
    bad = args[[0, 1, 2, 4][seed % 4]]
    bad[rng.integers(2), rng.integers(length), 0, 3] = [np.nan, np.inf, -np.inf][seed % 3]
    distance = np.broadcast_to(np.abs(np.arange(length)[:, None] - np.arange(length)), seen.shape)
    return args, expected_of(*args, seen, distance)


@partial(jax.jit, static_argnames="implementation")
def value_and_gradients(query, key, value, m, cotangent, **options):
    output, pullback = jax.vjp(partial(attention, **options), query, key, value, m)
    return output, *pullback(cotangent.astype(output.dtype))


def test_splash_hides_nan_and_shows_it(interpreted):
    """Segments are in no order, and cannot be told apart by where they lie."""
    length = 40
    ids = np.random.default_rng(0).integers(0, 3, (2, length))
    seen = (ids[:, :, None] == ids[:, None]) & np.tril(np.ones((length, length), bool))
    for seed in range(8):
        args, wanted = poisoned(seed, seen, length=length, heads=2, key_heads=1)
        got = value_and_gradients(*args, implementation="splash", segment_ids=ids)
        for x, y in zip(got, wanted, strict=True):
            np.testing.assert_allclose(x, y, atol=2e-3, rtol=2e-3)


def test_cudnn_hides_nan_and_shows_it(hopper, monkeypatch):
    """By JAX's own XLA attention in the place of the kernel, which adds its mask as well."""
    kernel = jax.nn.dot_product_attention
    monkeypatch.setattr(
        jax.nn,
        "dot_product_attention",
        lambda *args, implementation, **kwargs: kernel(*args, implementation="xla", **kwargs),
    )
    length = 21
    seen = np.tril(np.ones((2, length, length), bool))
    for seed in range(8):
        args, wanted = poisoned(seed, seen, length=length, heads=2, key_heads=1)
        args = [*(jnp.asarray(x, jnp.bfloat16) for x in args[:3]), *args[3:]]
        with jax.numpy_dtype_promotion("standard"):  # the stand-in relies on it
            got = value_and_gradients(*args, implementation="cudnn")
        for x, y in zip(got, wanted, strict=True):
            np.testing.assert_array_equal(np.isnan(x.astype(jnp.float32)), np.isnan(y))
            size = np.nanmax(np.abs(y)) if np.isfinite(y).any() else 1
            close(x.astype(jnp.float32) / size, y / size, atol=0.04)


# Choosing

ON_GPU = Case(
    "gpu", jnp.dtype("bfloat16"), 1, 8, 4096, 4096, 128, 128, True, True, False, True, 0.1, HOPPER
)
ON_TPU = ON_GPU._replace(platform="tpu", capability=None)


def test_cudnn_is_chosen_on_a_gpu_and_splash_never():
    assert choice.choose(ON_GPU) == "cudnn"
    assert choice.choose(ON_GPU._replace(length=256, key_length=256)) == "dense"
    assert choice.choose(ON_GPU._replace(segmented=True)) == "dense"
    assert choice.choose(ON_GPU._replace(segmented=True, batch=8)) == "blockwise"
    long = ON_GPU._replace(length=16384, key_length=16384)
    assert choice.choose(long._replace(segmented=True)) == "blockwise"
    assert choice.choose(long._replace(capability=(8, 0))) == "blockwise"
    assert choice.choose(ON_GPU._replace(capability=(8, 0), head_dim=64)) == "cudnn"
    assert columns.refusal_splash(ON_TPU) is None
    assert choice.choose(ON_TPU) != "splash"


@pytest.mark.parametrize(
    ("name", "facts", "reason"),
    [
        ("cudnn", {"platform": "cpu"}, "needs an NVIDIA GPU;"),
        ("cudnn", {"capability": None}, "needs an NVIDIA GPU;"),
        ("cudnn", {"capability": (7, 5)}, "compute capability 8.0 or more, not 7.5;"),
        ("cudnn", {"dtype": jnp.dtype("float16")}, "needs bfloat16, not float16;"),
        ("cudnn", {"length": 1}, "as many queries as keys, not T = 1 and S = 4096;"),
        ("cudnn", {"segmented": True}, "takes no segment_ids;"),
        ("cudnn", {"head_dim": 256}, "at most 248, and 256 for values, on compute capability 9.0"),
        ("cudnn", {"value_dim": 264}, "not 128 and 264;"),
        ("cudnn", {"capability": (8, 6)}, "at most 120, and 128 for values"),
        ("cudnn", {"scale": None}, "a scale that is a Python number, and not 0"),
        ("cudnn", {"scale": 0.0}, "a scale that is a Python number, and not 0"),
        ("cudnn", {"causal": False}, "needs causal=True"),
        ("cudnn", {"aligned": False}, "takes no positions"),
        ("splash", {"platform": "gpu"}, "needs a TPU;"),
        ("splash", {"dtype": jnp.dtype("float16")}, "needs bfloat16 or float32, not float16;"),
        ("splash", {"key_length": 4}, "at least as many keys as queries, not T = 4096 and S = 4;"),
        ("splash", {"segmented": True, "shared_segments": False}, "takes no key_segment_ids"),
        ("splash", {"causal": False}, "needs causal=True"),
        ("splash", {"aligned": False}, "takes no positions"),
    ],
)
def test_refusals_say_why(name, facts, reason):
    case = {"cudnn": ON_GPU, "splash": ON_TPU}[name]
    choice.require_serves(name, case)
    with pytest.raises(ValueError, match="can serve, or None") as raised:
        choice.require_serves(name, case._replace(**facts))
    assert f"implementation={name!r} " in str(raised.value)
    assert reason in str(raised.value)


def test_an_array_of_a_scale_is_refused(hopper):
    args = [x.astype(jnp.bfloat16) for x in inputs(length=8)[:3]]
    with pytest.raises(ValueError, match="a scale that is a Python number"):
        attention(*args, jnp.ones(4), scale=jnp.ones(()), implementation="cudnn")
