"""Every kind of bias, values and gradients, against float64 and numpy."""

import importlib
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from alibi_jax.attention import attention as attention_op_by_op
from alibi_jax.attention import choice
from alibi_jax.attention.biases import DistanceBias, LinearBias, Prefix, PrefixBias, prefix_sums
from alibi_jax.attention.case import Case
from alibi_jax.models.positions import kerple
from tests.attention.kinds import KINDS
from tests.attention.naive import close, inputs, naive_attention, naive_weights

attention = jax.jit(attention_op_by_op, static_argnames=("causal", "tolerance", "implementation"))


@pytest.fixture(scope="module", params=["dense", "blockwise"])
def implementation(request):
    """Each, with tiles so small that short inputs have many."""
    with pytest.MonkeyPatch.context() as patch:
        module = importlib.import_module("alibi_jax.attention.blockwise")
        for name, size in (("QUERY_TILE", 8), ("KEY_TILE", 4), ("STEP", 16)):
            patch.setattr(module, name, size)
        jax.clear_caches()
        yield request.param
    jax.clear_caches()


def positions_of(rng, length, key_length):
    return [np.sort(rng.integers(0, 60, shape)) for shape in ((2, length), key_length)]


OPTIONS = {
    "causal": (33, 33, {}),
    "symmetric": (33, 33, {"causal": False}),
    "fewer queries, a window": (5, 33, {"window": 7}),
    "packed, at positions": (33, 21, {"packed": True}),
    "symmetric, packed, at positions, a window": (
        *(21, 33),
        {"packed": True, "window": 30, "causal": False},
    ),
}


# All that a bias can meet at once, and the plain case; of each form one meets every case.
FEW = ("causal", "symmetric, packed, at positions, a window")
EACH_FORM = ("linear", "fire", "prefix")


@pytest.mark.parametrize(
    ("name", "case"),
    [(name, case) for name in KINDS for case in OPTIONS if case in FEW or name in EACH_FORM],
)
def test_values_and_gradients_are_those_of_float64(implementation, name, case):
    """Gradients by a step to either side, in float64, in one direction for each argument."""
    kind, (length, key_length, options) = KINDS[name], OPTIONS[case]
    if name == "prefix" and length > key_length:
        pytest.skip("each query of a prefix bias is a key")
    rng = np.random.default_rng(0)
    arrays = inputs(batch=2, length=length, key_length=key_length, heads=4, key_heads=2, dim=4)[:3]
    params = kind.params(rng, 2, key_length, 4)
    options = dict(options)
    naive_options = dict(options)
    if options.pop("packed", False):
        naive_options.pop("packed")
        naive_options["positions"] = positions_of(rng, length, key_length)
        naive_options["segments"] = [rng.integers(0, 2, (2, n)) for n in (length, key_length)]
        options["query_positions"], options["key_positions"] = naive_options["positions"]
        options["segment_ids"], options["key_segment_ids"] = naive_options["segments"]
    cotangent = rng.normal(size=arrays[0].shape)

    def attend(query, key, value, params):
        bias = kind.bias(params, length)
        return attention(query, key, value, bias, implementation=implementation, **options)

    @jax.jit
    def both(*args):
        output, pullback = jax.vjp(attend, *args)
        return output, pullback(jnp.float32(cotangent))

    def exact(query, key, value, params):
        def row(b, h, t, distance, position):
            return kind.formula(params, b, h, t, distance, position, length)

        return naive_attention(query, key, value, row, sink=kind.sink, **naive_options)

    args = (*arrays, params)
    output, gradients = both(*args)
    close(output, exact(*args))
    wide = jax.tree.map(np.float64, args)
    for at, gradient in enumerate(gradients):
        leaves, structure = jax.tree.flatten(wide[at])
        steps = [rng.normal(size=x.shape) for x in leaves]
        sides = []
        for step in (-1e-5, 1e-5):
            moved = structure.unflatten([x + step * s for x, s in zip(leaves, steps, strict=True)])
            sides.append(np.sum(cotangent * exact(*wide[:at], moved, *wide[at + 1 :])))
        expected = (sides[1] - sides[0]) / 2e-5
        terms = [
            np.sum(np.float64(g) * s) for g, s in zip(jax.tree.leaves(gradient), steps, strict=True)
        ]
        np.testing.assert_allclose(sum(terms), expected, rtol=1e-3, atol=1e-3)


def test_constant_gates_and_a_linear_function_are_alibi(implementation):
    query, key, value, m = inputs(length=30)
    attend = partial(attention, query, key, value, implementation=implementation)
    expected = attend(m)
    gates = jnp.broadcast_to(-m[None, None], (2, 30, 4))
    close(attend(PrefixBias.from_log_gates(gates)), expected)
    close(attend(LinearBias(m)), expected)
    zeros = jnp.zeros(4)
    close(attend(DistanceBias(kerple._log, (zeros, zeros))), attend(zeros))


def test_a_traced_window_is_one_program(implementation):
    query, key, value, m = inputs(length=30)

    @jax.jit
    @chex.assert_max_traces(n=1)
    def run(window):
        return attention(query, key, value, m, implementation=implementation, window=window)

    for window in (1, 8, 100):
        weights = naive_weights(query, key, m)
        distance = np.arange(30)[:, None] - np.arange(30)
        weights[..., distance >= window] = 0
        weights /= weights.sum(axis=-1, keepdims=True)
        expected = np.einsum("bhts,bshd->bthd", weights, np.float64(value))
        close(run(window), expected)


def test_the_sink_is_of_the_first_segment_alone(implementation):
    query, key, value, m = inputs(length=24)
    ids = np.repeat([[3, 1, 3]], 8, axis=1).repeat(2, axis=0)
    run = partial(attention, implementation=implementation, segment_ids=ids)
    linear, sink = (run(query, key, value, LinearBias(m, sink)) for sink in (False, True))
    moved = np.abs(np.asarray(sink - linear)).max(axis=(0, 2, 3)) > 1e-6
    np.testing.assert_array_equal(moved[1:], (ids[0] == 3)[1:])


@pytest.mark.parametrize("name", ["sink", "fire", "prefix"])
def test_a_cache_that_is_not_full(implementation, name):
    """Chunks of 8 queries against 32 keys, of which those to come are in the future."""
    kind, rng = KINDS[name], np.random.default_rng(0)
    query, key, value, _ = inputs(length=32, key_heads=2)
    params = kind.params(rng, 2, 32, 4)
    options = {"implementation": implementation, "window": 25}
    whole = attention(query, key, value, kind.bias(params, 32), **options)

    @jax.jit
    def chunk(start):
        at = start + jnp.arange(8)
        seen = jnp.arange(32)[None, :, None, None] < start + 8
        bias = kind.bias(params, 32)
        if name == "prefix":
            queries = jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, start, 8, 1), bias.key)
            bias = PrefixBias(queries, bias.key)
        return attention(
            jax.lax.dynamic_slice_in_dim(query, start, 8, 1),
            jnp.where(seen, key, 1e3),
            jnp.where(seen, value, 1e3),
            bias,
            query_positions=at,
            key_positions=jnp.arange(32),
            **options,
        )

    close(np.concatenate([chunk(start) for start in range(0, 32, 8)], axis=1), whole, atol=2e-5)


@pytest.mark.parametrize("name", ["fire", "prefix"])
def test_vmap_and_remat_change_nothing(implementation, name):
    kind, rng = KINDS[name], np.random.default_rng(0)
    args = [(*inputs(seed, length=20)[:3], kind.params(rng, 2, 20, 4)) for seed in range(2)]

    def run(query, key, value, params):
        bias = kind.bias(params, 20)
        return attention(query, key, value, bias, implementation=implementation, window=9)

    def loss(*args):
        return jnp.sum(jnp.sin(run(*args)))

    gradient = jax.grad(loss, argnums=(0, 1, 2, 3))
    alone = [jax.jit(gradient)(*x) for x in args]
    remat = jax.grad(jax.checkpoint(loss), argnums=(0, 1, 2, 3))
    together = jax.jit(jax.vmap(remat))(*jax.tree.map(lambda *x: jnp.stack(x), *args))
    for got, *expected in zip(*map(jax.tree.leaves, (together, *alone)), strict=True):
        close(got, np.stack(expected))


@pytest.mark.parametrize("name", ["kerple_log", "prefix"])
def test_devices_share_batch_and_heads(implementation, name):
    kind, rng = KINDS[name], np.random.default_rng(0)
    *arrays, _ = inputs(length=20)
    params = kind.params(rng, 2, 20, 4)

    def both(query, key, value, params, at, window):
        def run(*args):
            options = {"implementation": implementation, "query_positions": at, "window": window}
            return attention(*args[:3], kind.bias(args[3], 20), **options)

        output, pullback = jax.vjp(run, query, key, value, params)
        return output, *pullback(jnp.sin(output))

    at = 2 * np.arange(40).reshape(2, 20)
    expected = jax.jit(both)(*arrays, params, at, 9)
    mesh = jax.make_mesh((2, 2, 1), ("data", "tensor", "context"), devices=jax.devices()[:4])
    of_tokens = P("data", "context", "tensor")  # over a context axis of one
    of_params = of_tokens if name == "prefix" else P("tensor")
    with jax.set_mesh(mesh):
        placed = [jax.device_put(x, of_tokens) for x in arrays]
        params = jax.device_put(params, of_params)
        got = jax.jit(both)(*placed, params, jax.device_put(at, P("data")), 9)
    assert jax.tree.leaves(got[4])[0].sharding.spec[0] == of_params[0]
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        close(np.asarray(x), np.asarray(y))


@pytest.mark.parametrize("name", ["kerple_log", "fire"])
def test_sequences_over_devices(name):
    """Functions of distance and windows go round the ring as slopes do."""
    kind, rng = KINDS[name], np.random.default_rng(0)
    query, key, value, _ = inputs(length=64, heads=2, dim=4)
    params = kind.params(rng, 2, 64, 2)

    def both(query, key, value, params):
        def run(query, key, value, params):
            return attention(query, key, value, kind.bias(params, 64), window=40)

        output, pullback = jax.vjp(run, query, key, value, params)
        return output, *pullback(jnp.sin(output))

    expected = jax.jit(both)(query, key, value, params)
    with jax.set_mesh(jax.make_mesh((4,), ("context",), devices=jax.devices()[:4])):
        placed = [jax.device_put(x, P(None, "context")) for x in (query, key, value)]
        got = jax.jit(both)(*placed, jax.device_put(params, P()))
        sums = Prefix(jnp.zeros((2, 64, 2)), jnp.zeros((2, 64, 2)))
        for bias in (LinearBias(jnp.ones(2), True), PrefixBias(sums, sums)):
            with pytest.raises(ValueError, match="needs whole sequences for a"):
                attention_op_by_op(*placed, bias)
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        close(np.asarray(x), np.asarray(y), atol=3e-5)


# Prefix sums


def test_differences_of_prefix_sums_at_128k():
    """To 1e-5 of float64 wherever the difference is one that weighs anything, to float32 beyond."""
    rng = np.random.default_rng(0)
    gates = -rng.lognormal(-1, 1, (1, 2**17, 2)).astype(np.float32)
    exact = np.cumsum(np.float64(gates), axis=1)
    assert exact[0, -1].max() < -50_000  # where neighbouring float32 are 0.004 apart
    sums = prefix_sums(gates)
    i = rng.integers(200, 2**17, 10_000)
    j = i - rng.integers(0, 200, 10_000)
    at = jax.tree.map(lambda x: (x[0, i], x[0, j]), sums, is_leaf=lambda x: hasattr(x, "shape"))
    query, key = (Prefix(at.high[n], at.low[n]) for n in (0, 1))
    got = PrefixBias(query, key).at(None, query, key, i, i)
    np.testing.assert_allclose(got, exact[0, i] - exact[0, j], rtol=1e-6, atol=1e-5)


def test_prefix_sums_go_on_from_where_they_stopped():
    gates = -np.random.default_rng(0).lognormal(-1, 1, (2, 600, 2)).astype(np.float32)
    whole = prefix_sums(gates)
    first = prefix_sums(gates[:, :200])
    second = prefix_sums(gates[:, 200:], start=jax.tree.map(lambda x: x[:, -1:], first))
    for n, (got, expected) in enumerate(zip(second, whole, strict=True)):
        np.testing.assert_allclose(got, expected[:, 200:], atol=1e-6, rtol=2e-7 if n == 0 else 1)
    high, low = (np.float64(x) for x in second)
    close(high + low, np.cumsum(np.float64(gates), axis=1)[:, 200:], atol=1e-8)


# Refusals


@pytest.mark.parametrize("name", ["pallas_tpu", "cudnn", "splash"])
@pytest.mark.parametrize("beyond", ["PrefixBias", "DistanceBias", "sink", "window"])
def test_kernels_refuse_all_but_slopes(name, beyond):
    platform = {"pallas_tpu": "tpu", "cudnn": "gpu", "splash": "tpu"}[name]
    shape = (1, 8, 4096, 4096, 128, 128)
    case = Case(
        platform, jnp.dtype("bfloat16"), *shape, True, True, False, True, 0.1, (9, 0), False
    )
    choice.require_serves(name, case)
    with pytest.raises(ValueError, match=f"takes slopes alone, and no {beyond}; here .*blockwise"):
        choice.require_serves(name, case._replace(beyond_slopes=beyond))
    assert choice.choose(case._replace(beyond_slopes=beyond, batch=8)) == "blockwise"


def flat(p, distance, query_position=None):
    return p * jnp.ones_like(distance, p.dtype)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"window": 0}, ValueError, "from 1 to 2^31 - 1, or None; got 0"),
        ({"window": 2.5}, TypeError, "window must be integers, got float"),
        ({"window": jnp.ones(2, int)}, ValueError, "window must be"),
        ({"bias": LinearBias(jnp.ones(3))}, ValueError, "(4,); got (3,)"),
        ({"bias": LinearBias(-jnp.ones(4))}, ValueError, "head 0 has -1.0"),
        ({"bias": DistanceBias(kerple._log, (jnp.ones(4), jnp.ones(3)))}, ValueError, "[4, ...]"),
        ({"bias": DistanceBias(flat, jnp.ones(4, int))}, TypeError, "got int32"),
        (
            {"bias": DistanceBias(lambda p, d, i: p, jnp.ones(4))},
            ValueError,
            "function of a DistanceBias must return an array of the shape of the distances and the "
            "dtype of the params, float32[2, 3] for int32[2, 3]; got float32[]",
        ),
        (
            {"bias": DistanceBias(lambda p, d, i: d, jnp.ones(4))},
            ValueError,
            "float32[2, 3] for int32[2, 3]; got int32[2, 3]",
        ),
        ({"bias": DistanceBias(lambda p, d, i: None, jnp.ones(4))}, ValueError, "got None"),
        (
            {"bias": DistanceBias(flat, jnp.ones(4), upper=lambda p, d: flat(p, d)[0])},
            ValueError,
            "the upper of a DistanceBias must return",
        ),
        (
            {"bias": PrefixBias.from_log_gates(jnp.ones((2, 5, 4)))},
            ValueError,
            "of each query, (2, 6, 4); got (2, 5, 4)",
        ),
    ],
)
def test_bad_biases_are_named(options, error, words):
    *args, m = inputs()
    bias = options.pop("bias", m)
    with pytest.raises(error) as raised:
        attention_op_by_op(*args, bias, **options)
    assert words in str(raised.value)


def test_bad_gates_are_named():
    with pytest.raises(TypeError, match="log_gates must be floating, got int32"):
        prefix_sums(jnp.ones((2, 5, 4), int))
    with pytest.raises(ValueError, match="batch, length, heads"):
        prefix_sums(jnp.ones((5, 4)))
    with pytest.raises(ValueError, match="start must have the sums"):
        prefix_sums(jnp.ones((2, 5, 4)), start=Prefix(jnp.ones((2, 4)), jnp.ones((2, 4))))
    with pytest.raises(ValueError, match="from 1 to the number of keys, 5, got 6"):
        PrefixBias.from_log_gates(jnp.ones((2, 5, 4)), num_queries=6)
