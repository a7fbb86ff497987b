"""The TPU kernels: by value in interpret mode, and compiled ahead of time for each kind of chip."""

import importlib
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from alibi_jax.attention import attention as attention_op_by_op
from alibi_jax.attention import choice
from alibi_jax.attention.case import Case
from tests.attention.naive import close, inputs, naive_attention
from tests.attention.test_edges import compilations
from tests.attention.test_nonfinite import expected as expected_of

attention = jax.jit(attention_op_by_op, static_argnames=("causal", "tolerance", "implementation"))
kernels = importlib.import_module("alibi_jax.attention.pallas_tpu")


def use(patch, query_tile, key_tile, interpret):
    patch.setattr(kernels, "QUERY_TILE", query_tile)
    patch.setattr(kernels, "KEY_TILE", key_tile)
    patch.setattr(kernels, "INTERPRET", interpret)
    jax.clear_caches()


@pytest.fixture
def small_tiles(monkeypatch):
    """Run on the CPU, with tiles so small that short inputs have many."""
    use(monkeypatch, 8, 4, True)
    yield
    jax.clear_caches()


@partial(jax.jit, static_argnames=("implementation", "causal"))
def value_and_gradients(cotangent, args, *, implementation, **options):
    """Return the output, and the gradients of `sum(output * cotangent)` in all of `args`."""
    output, pullback = jax.vjp(
        lambda *x: attention(*x, implementation=implementation, **options), *args
    )
    return output, pullback(cotangent.astype(output.dtype))


def check_against_dense(args, **options):
    """Compare values and gradients with dense attention in float32, relative to their size."""
    shape = (*args[0].shape[:3], args[2].shape[3])
    cotangent = jnp.asarray(np.random.default_rng(5).normal(size=shape), jnp.float32)
    got = value_and_gradients(cotangent, args, implementation="pallas_tpu", **options)
    wide = [x.astype(jnp.float32) for x in args]
    expected = value_and_gradients(cotangent, wide, implementation="dense", **options)
    assert [g.dtype for g in got[1]] == [x.dtype for x in args]
    tolerance = 2e-2 if args[0].dtype == jnp.bfloat16 else 1e-5
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        size = max(1.0, float(np.abs(y).max()))
        np.testing.assert_allclose(x.astype(jnp.float32) / size, y / size, atol=tolerance)
    return got


# Against float64, and dense's gradients


@pytest.mark.parametrize(
    ("dtype", "causal", "lengths", "heads", "positions", "segmented"),
    [
        ("float32", True, (16, 16), (2, 2), None, False),  # whole tiles
        ("float32", True, (13, 19), (4, 2), None, False),  # ragged, grouped, T < S
        ("float32", True, (19, 13), (2, 1), None, True),  # the first queries see no key
        ("float32", False, (10, 17), (3, 3), None, False),
        ("float32", False, (17, 10), (4, 1), "batched", True),
        ("float32", True, (12, 15), (2, 2), "shared", False),
        ("bfloat16", True, (13, 19), (4, 2), None, False),
        ("bfloat16", False, (17, 10), (4, 1), "batched", True),
    ],
)
def test_matches_float64(small_tiles, dtype, causal, lengths, heads, positions, segmented):
    length, key_length = lengths
    args = inputs(
        3, length=length, key_length=key_length, heads=heads[0], key_heads=heads[1], value_dim=6
    )
    args = [*(x.astype(dtype) for x in args[:3]), args[3]]
    rng = np.random.default_rng(4)
    options, naive_options = {}, {}
    if positions:
        lead = (2,) if positions == "batched" else ()
        naive_options["positions"] = [rng.integers(0, 40, (*lead, n)) for n in lengths]
        options["query_positions"], options["key_positions"] = naive_options["positions"]
    if segmented:
        naive_options["segments"] = [np.sort(rng.integers(-1, 2, (2, n))) for n in lengths]
        options["segment_ids"], options["key_segment_ids"] = naive_options["segments"]
    got, _ = check_against_dense(args, causal=causal, **options)
    expected = naive_attention(
        *(x.astype(jnp.float32) for x in args), causal=causal, **naive_options
    )
    assert got.dtype == dtype
    close(got.astype(jnp.float32), expected, 1e-5 if dtype == "float32" else 2e-2)


def test_a_batch_with_nothing_to_see_is_zero_with_zero_gradients(small_tiles):
    ids = np.zeros((2, 9), int)
    found = check_against_dense(inputs(length=9), segment_ids=ids, key_segment_ids=ids + 1)
    for x in jax.tree.leaves(found):
        assert (x == 0).all()


@pytest.mark.parametrize("causal", [True, False])
def test_what_is_hidden_never_matters_and_what_is_seen_shows(small_tiles, causal):
    """Of packed documents, with a NaN or infinity in one place at a time, or a huge hidden key."""
    length, rng = 20, np.random.default_rng(0)
    segments = np.sort(rng.integers(0, 3, (2, length)), axis=1)
    keys_segments = np.where(rng.random((2, length)) < 0.1, 7, segments)
    signed = np.arange(length)[:, None] - np.arange(length)
    seen = (segments[:, :, None] == keys_segments[:, None]) & ((signed >= 0) | (not causal))
    hidden = np.argwhere(~seen.any(axis=1))
    assert len(hidden) > 2
    distance = np.broadcast_to(np.abs(signed), seen.shape)
    for seed in range(12):
        args = [np.array(x) for x in inputs(seed, length=length, heads=2, key_heads=1)]
        args.append(rng.normal(size=args[0].shape).astype(np.float32))
        bad = args[[0, 1, 2, 4][seed % 4]]
        bad[rng.integers(2), rng.integers(length), 0, 3] = [np.nan, np.inf, -np.inf][seed // 4]
        for x in args[1:3]:
            x[*hidden[seed % len(hidden)]] = 1e38
        got = value_and_gradients(
            args[4],
            args[:4],
            implementation="pallas_tpu",
            causal=causal,
            segment_ids=segments,
            key_segment_ids=keys_segments,
        )
        wanted = expected_of(*args, seen, distance)
        for x, y in zip(jax.tree.leaves(got), wanted, strict=True):
            np.testing.assert_allclose(x, y, atol=2e-5, rtol=1e-5)


def test_16_bit_gradients_come_from_the_output_before_it_is_rounded(small_tiles, monkeypatch):
    """They are differences from it, which outlier keys make small: as exact as dense ones."""
    use(monkeypatch, 128, 128, True)
    rng = np.random.default_rng(0)
    query, key, value, cotangent = rng.normal(size=(4, 1, 256, 2, 64))
    key[:, rng.integers(0, 256, 8)] *= 8
    value += 3
    *args, cotangent = (jnp.asarray(x, jnp.bfloat16) for x in (query, key, value, cotangent))
    args.append(jnp.float32([0.1, 0.01]))
    found = {
        name: value_and_gradients(cotangent, args, implementation=name)[1]
        for name in ("pallas_tpu", "dense")
    }
    seen = np.tril(np.ones((1, 256, 256), bool))
    distance = np.abs(np.arange(256)[:, None] - np.arange(256))[None]
    wide = [np.asarray(x, np.float64) for x in (*args, cotangent)]
    _, *wanted = expected_of(*wide, seen, distance)

    def errors(name):
        pairs = zip(found[name], wanted, strict=True)
        return [np.sqrt(np.mean((np.float64(x) - y) ** 2) / np.mean(y**2)) for x, y in pairs]

    for ours, of_dense in zip(errors("pallas_tpu"), errors("dense"), strict=True):
        assert ours < 1.2 * of_dense


def test_weights_are_normalised_at_huge_logits(small_tiles):
    """Of 9 equal keys each has a ninth, though 10^8 + log 9 is 10^8 in float32."""
    query, key, value, m = inputs(length=13, key_length=9, heads=2)
    args = [jnp.full_like(query, 1e4), jnp.full_like(key, 1e4), value, jnp.zeros_like(m)]
    cotangent = np.random.default_rng(1).normal(size=query.shape).astype(np.float32)
    _, gradients = value_and_gradients(cotangent, args, implementation="pallas_tpu", causal=False)
    expected = np.broadcast_to(cotangent.sum(axis=1, keepdims=True) / 9, value.shape)
    close(gradients[2], expected)


@pytest.mark.parametrize("second", [jax.jacrev, jax.jacfwd])
def test_a_second_derivative_is_refused_in_words(small_tiles, second):
    query, key, value, m = inputs(length=9)

    def loss(query):
        return jnp.sum(jnp.sin(attention(query, key, value, m, implementation="pallas_tpu")))

    with pytest.raises(NotImplementedError, match='implementation="dense"'):
        second(jax.grad(loss))(query)


def test_scale_has_a_gradient(small_tiles):
    args = inputs(length=9)
    found = [
        jax.grad(lambda s, i=i: jnp.sum(jnp.sin(attention(*args, scale=s, implementation=i))))(
            jnp.float32(0.3)
        )
        for i in ("pallas_tpu", "dense")
    ]
    assert abs(found[1]) > 0.1
    close(*found)


@pytest.mark.parametrize("causal", [True, False])
def test_on_a_simulated_tpu(monkeypatch, capfd, causal):
    """With real copies between memories, NaN wherever nothing was written, and a race detector."""
    interpret = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")
    use(monkeypatch, 8, 4, interpret)
    args = inputs(batch=1, length=19, heads=2, key_heads=1)
    ids = np.arange(19)[None] // 12
    check_against_dense(args, causal=causal, segment_ids=ids)
    assert "RACE" not in capfd.readouterr().out
    jax.clear_caches()


def test_an_eager_gradient_compiles_once(small_tiles):
    args = inputs(length=9)

    def loss(*args):
        return attention_op_by_op(*args, implementation="pallas_tpu").sum()

    for _ in range(2):
        with compilations() as count:
            jax.grad(loss, (0, 1, 2, 3))(*args)
    assert count() == 0


# Skipping


def test_tiles_left_out_are_never_read(small_tiles, monkeypatch):
    """Poison them after the choice: neither values nor gradients notice."""
    query, key, value, _ = inputs(batch=1, length=1024, heads=2, key_heads=1, dim=4)
    m = jnp.asarray([1.0, 0.25], jnp.float32)
    use(monkeypatch, 32, 32, True)
    seen = []
    attend = kernels._attend
    monkeypatch.setattr(
        kernels, "_attend", lambda plan, x: seen.append((plan, x)) or attend(plan, x)
    )
    at = np.arange(1024, dtype=np.int32)[None]
    got = kernels.pallas_tpu(
        *(query, key, value, m),
        causal=True,
        scale=0.5,
        query_positions=at,
        key_positions=at,
        segment_ids=None,
        key_segment_ids=None,
        tolerance=2.0**-24,
    )
    close(got, naive_attention(query, key, value, m))

    (plan, x), *_ = seen
    first, end = np.asarray(x.ranges[:, :, 0]), np.asarray(x.ranges[:, :, 1])
    assert (end == np.arange(1, 33)).all()
    assert (end - first).sum() < 0.25 * end.sum()

    # Only the last query tile counts: then its range says which keys and values do.
    last = (np.arange(1024) >= 992).astype(np.float32)[None, None, :, None]
    unused = (np.arange(1024) < 32 * first[0, :, -1].min())[None, None, :, None]
    assert unused.sum() > 512
    poisoned = x._replace(
        key=jnp.where(unused, jnp.nan, x.key), value=jnp.where(unused, jnp.nan, x.value)
    )
    # Other rows do read poison, whose gradient is NaN: leave their tiles out as well.
    alone = jnp.where(jnp.arange(32) == 31, x.ranges, 0)

    def loss(floats, x):
        output = attend(plan, x._replace(**floats))
        return jnp.sum(jnp.sin(output) * last), output[:, :, 992:]

    floats = ("query", "key", "value", "numbers")
    results = [
        jax.jit(jax.grad(loss, has_aux=True))(
            {name: getattr(i, name) for name in floats}, i._replace(ranges=alone)
        )
        for i in (x, poisoned)
    ]
    for clean, of_poisoned in zip(*map(jax.tree.leaves, results), strict=True):
        np.testing.assert_array_equal(clean, of_poisoned)
    assert (jnp.where(unused, results[0][0]["key"], 0) == 0).all()


def test_exactly_the_tiles_of_the_table_count(small_tiles):
    """Whatever the table, forward and backward: as dense attention with a mask of whole tiles."""
    query, key, value, m = (
        x.swapaxes(1, 2) if x.ndim == 4 else x
        for x in inputs(batch=1, length=32, heads=2, key_heads=1)
    )
    table = np.sort(np.random.default_rng(1).integers(0, 9, (1, 2, 2, 4)), axis=2)
    table[0, 0] = [[0, 3, 0, 2], [8, 4, 8, 2]]  # a gap between query tiles, and an empty range
    tile = np.arange(32) // 4
    kept = (np.repeat(table[:, :, 0], 8, axis=2)[..., None] <= tile) & (
        tile < np.repeat(table[:, :, 1], 8, axis=2)[..., None]
    )
    positions = jnp.arange(32)[None, None]
    rest = positions, positions, jnp.asarray(table)

    def of_kernels(query, key, value, m):
        numbers = jnp.stack([m, jnp.full(2, 0.4)], axis=1)[:, None]
        plan = kernels.Plan(False, 32, query_tile=8, key_tile=4)
        return kernels._attend(plan, kernels.Inputs(query, key, value, numbers, *rest))

    def of_dense(query, key, value, m):
        distance = jnp.abs(jnp.arange(32)[:, None] - jnp.arange(32)[None]).astype(jnp.float32)
        logits = (
            0.4 * jnp.einsum("bhtd,bkSd->bhtS", query, key)
            - m[None, :, None, None] * distance[None, None]
        )
        weights = jax.nn.softmax(jnp.where(kept, logits, -1e9), axis=-1)
        weights = jnp.where(kept.any(-1, keepdims=True), weights, 0)
        return jnp.einsum("bhtS,bkSd->bhtd", weights, value)

    def results(f):
        gradients = jax.grad(lambda *x: jnp.sum(jnp.sin(f(*x))), (0, 1, 2, 3))
        return jax.jit(lambda *x: (f(*x), gradients(*x)))(query, key, value, m)

    for x, y in zip(*map(jax.tree.leaves, map(results, (of_kernels, of_dense))), strict=True):
        assert np.isfinite(y).all()
        close(x, y)


def test_query_ranges_hold_all_that_key_ranges_need():
    rng = np.random.default_rng(0)
    first, end = np.sort(rng.integers(0, 8, (2, 3, 5, 2)), axis=-1).transpose(3, 0, 1, 2)
    low, high = np.moveaxis(kernels.query_ranges(jnp.asarray(np.stack([first, end], 2)), 7), 2, 0)
    for b, h, j in np.ndindex(2, 3, 7):
        needed = [i for i in range(5) if first[b, h, i] <= j < end[b, h, i]]
        expected = (needed[0], needed[-1] + 1) if needed else (0, 0)
        assert (low[b, h, j], high[b, h, j]) == expected


# Transformations and sharding


def test_vmap_jit_and_checkpoint_change_nothing(small_tiles):
    *arrays, m = (jnp.stack(x) for x in zip(inputs(0), inputs(1), strict=True))
    ids = jnp.asarray(np.random.default_rng(0).integers(0, 2, (2, 2, 6)))

    def loss(implementation, *args):
        def f(query, key, value, m, ids):
            return attention(query, key, value, m, segment_ids=ids, implementation=implementation)

        return jnp.sum(jnp.sin(jax.vmap(jax.checkpoint(f))(*args, ids)))

    found, expected = (
        jax.jit(jax.grad(partial(loss, i), (0, 1, 2, 3)))(*arrays, m)
        for i in ("pallas_tpu", "dense")
    )
    for x, y in zip(found, expected, strict=True):
        close(x, y)


def test_explicit_sharding_needs_no_annotation(small_tiles):
    args = inputs(length=9, key_heads=2)
    cotangent = jnp.asarray(np.random.default_rng(1).normal(size=args[0].shape), jnp.float32)
    expected = value_and_gradients(cotangent, args, implementation="dense")
    spec = P("data", None, "tensor", None)
    mesh = jax.make_mesh((2, 2), ("data", "tensor"), devices=jax.devices()[:4])
    with jax.set_mesh(mesh):
        sharded = [jax.device_put(x, spec) for x in (*args[:3], cotangent)]
        slopes = jax.device_put(args[3], P(None))
        got = value_and_gradients(sharded[3], (*sharded[:3], slopes), implementation="pallas_tpu")
    assert got[0].sharding.spec == spec
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        close(np.asarray(x), np.asarray(y))


# The choice

CASE = Case(*(None,) * len(Case._fields))._replace(
    platform="tpu",
    dtype=jnp.dtype(jnp.bfloat16),
    length=4096,
    key_length=4096,
    head_dim=128,
    value_dim=64,
)


def test_it_is_the_choice_on_a_tpu():
    assert choice.choose(CASE) == "pallas_tpu"
    assert choice.choose(CASE._replace(length=1)) == "dense"
    assert choice.choose(CASE._replace(dtype=jnp.dtype(jnp.float16))) == "blockwise"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"platform": "gpu"}, "needs a TPU, and this is a gpu"),
        ({"dtype": jnp.dtype(jnp.float16)}, "takes bfloat16 and float32, not float16"),
        ({"head_dim": 320}, "takes head dims up to 256, not 320"),
        ({"value_dim": 257}, "takes head dims up to 256, not 257"),
    ],
)
def test_it_says_why_it_cannot_serve(changes, message):
    assert kernels.refusal(CASE) is None
    assert kernels.refusal(CASE._replace(**changes)) == message


# Compiled ahead of time: all that a TPU's compiler checks, without a TPU


def compile_gradients(mesh, attend, shapes, dtypes, specs):
    """Compile `attend` and its gradients in floating arguments; return which kernels it has."""
    args = [
        jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))
        for shape, dtype, spec in zip(shapes, dtypes, specs, strict=True)
    ]
    floating = [i for i, d in enumerate(dtypes) if jnp.issubdtype(d, jnp.floating)]

    def loss(*args):
        return jnp.sum(attend(*args).astype(jnp.float32))

    with jax.set_mesh(mesh):
        lowered = jax.jit(jax.value_and_grad(loss, floating)).lower(*args)
        lowered.compile()
    text = lowered.as_text()
    return [
        name for name in ("forward", "query_gradient", "key_gradient") if f"alibi_{name}" in text
    ]


ALL = ["forward", "query_gradient", "key_gradient"]


@pytest.mark.parametrize(
    ("chip", "dim", "dtype", "length"),
    [
        ("v4", 64, "bfloat16", 1024),
        ("v4", 128, "float32", 1024),
        ("v4", 256, "bfloat16", 131072),
        ("v5e", 64, "float32", 131072),
        ("v5e", 128, "bfloat16", 1024),
        ("v5e", 256, "float32", 1024),
        ("v5p", 64, "bfloat16", 8192),
        ("v5p", 128, "bfloat16", 131072),
        ("v5p", 256, "float32", 1024),
        ("v6e", 64, "float32", 1024),
        ("v6e", 128, "bfloat16", 131072),
        ("v6e", 256, "bfloat16", 8192),
        ("tpu7x", 64, "bfloat16", 131072),
        ("tpu7x", 128, "float32", 8192),
        ("tpu7x", 256, "bfloat16", 1024),
    ],
)
def test_kernels_compile(chip_mesh, chip, dim, dtype, length):
    """The kernels alone: `key_ranges` is plain array code, and much slower to compile."""
    tiles = length // kernels.QUERY_TILE
    plan = kernels.Plan(True, length, kernels.QUERY_TILE, kernels.KEY_TILE)
    shapes = kernels.Inputs(
        query=(1, 32, length, dim),
        key=(1, 8, length, dim),
        value=(1, 8, length, dim),
        numbers=(32, 1, 2),
        query_tokens=(1, 2, length),
        key_tokens=(1, 2, length),
        ranges=(1, 32, 2, tiles),
    )
    dtypes = [dtype] * 3 + ["float32"] + ["int32"] * 3
    found = compile_gradients(
        chip_mesh(chip, (1, 1)),
        lambda *x: kernels._attend(plan, kernels.Inputs(*x)),
        shapes,
        [jnp.dtype(d) for d in dtypes],
        [P()] * 7,
    )
    assert found == ALL


@pytest.mark.parametrize(
    ("chip", "shape", "dim", "length", "options"),
    [
        ("v5e", (1, 1), 64, 1000, {"causal": False}),
        ("v6e", (1, 1), 80, 1024, {}),  # a head dim of no whole lanes
        ("v5p", (2, 2), 128, 2048, {}),
        ("tpu7x", (2, 2), 64, 2048, {}),
    ],
)
def test_attention_compiles_and_chooses_them(chip_mesh, chip, shape, dim, length, options):
    """Alone, and divided over a mesh, where each device must get kernels of its own."""
    spec = P("data", None, "tensor", None)
    kinds = [jnp.dtype(jnp.bfloat16)] * 3 + [jnp.dtype(jnp.float32)]
    heads = [(2, length, n, dim) for n in (4, 2, 2)]
    found = compile_gradients(
        chip_mesh(chip, shape),
        partial(attention_op_by_op, **options),
        [*heads, (4,)],
        kinds,
        [*[spec] * 3, P("tensor")],
    )
    assert found == ALL
