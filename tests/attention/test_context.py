"""Sequences divided over devices: the attention of one device, and no hop that nobody needs."""

import importlib
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from alibi_jax import attention, slopes
from alibi_jax.attention import context
from alibi_jax.attention.tiles import key_ranges
from tests.attention import test_tiles
from tests.attention.naive import close, inputs
from tests.attention.test_nonfinite import expected as expected_of

blockwise = importlib.import_module("alibi_jax.attention.blockwise")
pallas_tpu = importlib.import_module("alibi_jax.attention.pallas_tpu")
AXES = ("data", "tensor", "context")


def use_small_tiles(patch):
    for name, size in (("QUERY_TILE", 8), ("KEY_TILE", 4), ("STEP", 8)):
        patch.setattr(blockwise, name, size)
    jax.clear_caches()


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles so small that a chunk of a short input has many."""
    use_small_tiles(monkeypatch)
    yield
    jax.clear_caches()


def mesh_of(*sizes):
    return jax.make_mesh(sizes, AXES, devices=jax.devices()[: np.prod(sizes)])


def value_and_gradients(cotangent, *args, **options):
    """Return the output, and the gradients of `sum(output * cotangent)` in all of `args`."""
    output, pullback = jax.vjp(lambda *x: attention(*x, **options), *args)
    return output, *pullback(cotangent)


def on_mesh(sizes, cotangent, *args, of_key=None, **options):
    """`value_and_gradients` with sequences, and batch and heads, over a mesh of these sizes."""
    spec = P("data", "context", "tensor")
    of_key = spec if of_key is None else of_key
    with jax.set_mesh(mesh_of(*sizes)):
        placed = [
            jax.device_put(x, s)
            for x, s in zip((cotangent, *args), (spec, spec, of_key, of_key, P()), strict=True)
        ]
        got = jax.jit(partial(value_and_gradients, **options))(*placed)
    assert got[0].sharding.spec == P("data", "context", "tensor", None)
    return got


def ids(batch, length):
    return np.sort(np.random.default_rng(0).integers(0, 4, (batch, length)), axis=1)


SHUFFLED = np.stack([np.random.default_rng(b).permutation(48) * 3 for b in range(2)])
CASES = {
    "causal": ((1, 1, 8), {}, {}),
    "documents": ((1, 1, 8), {"key_heads": 2}, {"segment_ids": ids(2, 48)}),
    "ragged chunks": ((1, 2, 4), {"length": 44}, {"segment_ids": ids(2, 44)}),
    "symmetric": ((1, 1, 8), {"key_heads": 1}, {"causal": False}),
    "symmetric documents": (
        (2, 1, 4),
        {"key_heads": 2},
        {"causal": False, "segment_ids": ids(2, 48)},
    ),
    "symmetric, of two": ((2, 2, 2), {"key_heads": 2}, {"causal": False, "tolerance": 0.0}),
    "shuffled": ((2, 2, 2), {}, {"query_positions": SHUFFLED, "tolerance": 0.0}),
    "more keys": ((1, 1, 4), {"key_length": 64}, {}),
    "one key head for all": ((1, 2, 4), {"key_heads": 1}, {}),
}


@pytest.mark.parametrize("name", CASES)
def test_it_is_the_attention_of_one_device(small_tiles, name):
    """In float64, in which nothing but an error is as large as 1e-12."""
    sizes, shape, options = CASES[name]
    of_key = P("data", "context") if shape.get("key_heads") == 1 else None
    with jax.enable_x64(True):
        args = [
            jnp.asarray(x, jnp.float64) for x in inputs(**{"length": 48, "value_dim": 5} | shape)
        ]
        cotangent = jnp.asarray(np.random.default_rng(1).normal(size=(*args[0].shape[:3], 5)))
        expected = jax.jit(partial(value_and_gradients, implementation="dense", **options))(
            cotangent, *args
        )
        got = on_mesh(sizes, cotangent, *args, of_key=of_key, **options)
        for x, y in zip(got, expected, strict=True):
            assert x.dtype == jnp.float64 and np.abs(y).max() > 0.1
            np.testing.assert_allclose(x / np.abs(y).max(), y / np.abs(y).max(), atol=1e-12)


@pytest.mark.parametrize(
    ("sizes", "shape", "options"),
    [
        ((1, 2, 4), {"length": 44, "key_heads": 2}, {"segment_ids": ids(2, 44)}),
        ((2, 1, 2), {"length": 48}, {"causal": False}),
    ],
)
def test_kernels_go_round_as_well(monkeypatch, sizes, shape, options):
    for name, value in (("QUERY_TILE", 8), ("KEY_TILE", 4), ("INTERPRET", True)):
        monkeypatch.setattr(pallas_tpu, name, value)
    args = inputs(value_dim=5, **shape)
    cotangent = jnp.asarray(np.random.default_rng(1).normal(size=(*args[0].shape[:3], 5)))
    expected = jax.jit(partial(value_and_gradients, implementation="dense", **options))(
        cotangent, *args
    )
    got = on_mesh(sizes, cotangent, *args, implementation="pallas_tpu", **options)
    for x, y in zip(got, expected, strict=True):
        size = np.abs(y).max()
        np.testing.assert_allclose(x / size, y / size, atol=1e-5)


def test_16_bit_inputs_lose_no_more_than_on_one_device(small_tiles):
    """However many chunks a row's output and gradients come from."""
    *args, m = inputs(length=128, heads=2, key_heads=1)
    m, args = 0.05 * m, [x.astype(jnp.bfloat16) for x in args]
    wide = [x.astype(jnp.float32) for x in args]
    exact = jax.jit(partial(value_and_gradients, implementation="dense"))(wide[0], *wide, m)
    alone = jax.jit(partial(value_and_gradients, implementation="blockwise"))(args[0], *args, m)
    together = on_mesh((2, 1, 4), args[0], *args, m)
    for *both, truth in zip(together, alone, exact, strict=True):
        assert both[0].dtype == both[1].dtype
        ours, theirs = (
            np.sqrt(np.mean(np.square(np.float64(x) - np.float64(truth)))) for x in both
        )
        # That of the slopes is a float32 sum, as the truth is.
        assert 0 < ours < max(1.1 * theirs, 1e-5 * np.abs(truth).max())


def test_rows_that_see_nothing_are_zero_with_zero_gradients(small_tiles):
    *args, m = inputs(length=32)
    options = {"segment_ids": np.zeros((2, 32), int), "key_segment_ids": np.ones((2, 32), int)}
    for x in on_mesh((2, 1, 4), args[0], *args, m, **options):
        assert (np.asarray(x) == 0).all()


@pytest.mark.parametrize("kernel", [False, True])
def test_nan_of_another_device_is_seen_or_does_not_matter(monkeypatch, small_tiles, kernel):
    """Keys 0 to 7 are on the first of four devices, and two documents go over three of them."""
    for name, value in (("QUERY_TILE", 8), ("KEY_TILE", 4), ("INTERPRET", True)):
        monkeypatch.setattr(pallas_tpu, name, value)
    implementation = "pallas_tpu" if kernel else "blockwise"
    length, rng = 32, np.random.default_rng(0)
    segments = np.repeat([[1, 2], [1, 1]], [19, 13], axis=1)
    signed = np.arange(length)[:, None] - np.arange(length)
    seen = (segments[:, :, None] == segments[:, None]) & (signed >= 0)
    distance = np.broadcast_to(np.abs(signed), seen.shape)
    for where, at, bad in (
        (0, 30, np.inf),
        (1, 2, np.nan),
        (2, 2, -np.inf),
        (2, 31, np.nan),
        (4, 20, np.nan),
    ):
        *args, m = inputs(where, length=length, heads=2, key_heads=1)
        m = 100 * m  # of itself, the decay would stop the ring
        args = [np.array(x) for x in (*args, m, rng.normal(size=args[0].shape))]
        args[where][0, at, 0, 1] = bad
        got = on_mesh(
            (1, 1, 4),
            jnp.asarray(args[4], jnp.float32),
            *args[:4],
            of_key=P("data", "context"),
            implementation=implementation,
            segment_ids=segments,
            tolerance=0.0 if where in (0, 4) else None,
        )
        wanted = expected_of(*args, seen, distance)
        assert np.isnan(wanted[1]).any() and not np.isnan(wanted[1]).all()
        for x, y in zip(got[: 2 if where in (1, 2) else 5], wanted, strict=False):
            np.testing.assert_allclose(x, y, atol=2e-5, rtol=1e-5)


def test_heads_have_the_slopes_of_their_number_among_all():
    """Not among those of their device. Keys of zero leave weights that only slopes decide."""
    length, m = 16, np.asarray(slopes(8))
    weights = np.exp(-m[:, None] * np.arange(length))  # by distance
    expected = np.cumsum(weights, axis=1)
    # Values are 1 for the row itself and the keys before it as far as the distance is even.
    even = np.cumsum(weights * (np.arange(length) % 2 == 0), axis=1)
    value = np.zeros((1, length, 8, 2), np.float32)
    value[0, ::2, :, 0] = value[0, 1::2, :, 1] = 1
    zeros = jnp.zeros((1, length, 8, 4))
    with jax.set_mesh(mesh_of(1, 4, 2)):
        placed = [jax.device_put(x, P(None, "context", "tensor")) for x in (zeros, zeros, value)]
        got = jax.jit(attention)(*placed, jax.device_put(slopes(8), P()))
    rows = np.arange(length)
    own = np.asarray(got)[0, rows, :, rows % 2]  # the share of keys at an even distance
    close(own, (even / expected).T)


# Hops


def brute_force_hops(first, end, causal, devices, tiles):
    """Move numbered chunks round the rings until every device has met all that it needs."""
    needed = [set() for _ in range(devices)]
    for d, (low, high) in enumerate(zip(first, end, strict=True)):
        for one, other in zip(low.ravel(), high.ravel(), strict=True):
            needed[d] |= {tile // tiles for tile in range(one, other)}
    counts = []
    for step in (1,) if causal else (1, -1):
        at, count = list(range(devices)), 0  # which chunk each device holds
        for hop in range(1, devices):
            at = [at[(d - step) % devices] for d in range(devices)]
            nearer = hop <= devices // 2 if step == 1 else hop <= (devices - 1) // 2
            if causal or nearer:
                count = hop if any(at[d] in needed[d] for d in range(devices)) else count
        counts.append(count)
    return counts


@pytest.mark.parametrize("devices", [2, 3, 4, 8])
@pytest.mark.parametrize("causal", [True, False])
def test_hops_are_as_many_as_the_table_asks_for(devices, causal):
    rng, tiles, found = np.random.default_rng(devices), 3, set()
    for density in (0, 1, 3, 100):
        middle = np.arange(devices)[:, None, None] * tiles + 1  # near a device's own chunk
        spread = rng.integers(-density, density + 1, (2, devices, 2, 5))
        first, end = np.sort(np.clip(middle + spread, 0, devices * tiles), axis=0)
        per_device = jax.vmap(
            partial(context.hops, causal=causal, devices=devices, key_tiles=tiles)
        )((first, end), jnp.arange(devices))
        got = [int(x.max()) for x in per_device]
        assert got == brute_force_hops(first, end, causal, devices, tiles)
        found.add(tuple(got))
    assert len(found) > 1


@pytest.mark.parametrize("devices", range(2, 9))
def test_rings_bring_every_chunk_once(devices):
    for causal in (True, False):
        met = [
            step * hop % devices
            for step, most in context._rings(causal, devices)
            for hop in range(1, most + 1)
        ]
        assert sorted(met) == list(range(1, devices))


@pytest.mark.parametrize(
    ("causal", "expected"),
    [(True, [[0], [1], [2], [7]]), (False, [[0, 0], [1, 1], [2, 2], [4, 3]])],
)
def test_transfers_stop_where_the_slope_does(small_tiles, monkeypatch, causal, expected):
    """Count them as they happen, forward and backward, head by head: chunks are of 32 tokens."""
    counts = {"chunk": 0, "gradients": 0}

    def count(name):
        counts[name] += 1

    shift = context._shift

    def counted(tree, axis, step):
        if jax.tree.leaves(tree):
            name = "chunk" if isinstance(tree, context.Chunk) else "gradients"
            jax.debug.callback(partial(count, name))
        return shift(tree, axis, step)

    monkeypatch.setattr(context, "_shift", counted)
    cases = zip((100.0, 2.0, 0.8, 0.0), expected, strict=True)
    *args, _ = inputs(batch=1, length=256, heads=1)
    compiled = None
    for slope, hops in cases:
        counts.update(chunk=0, gradients=0)
        with jax.set_mesh(mesh_of(1, 1, 8)):
            placed = [jax.device_put(x, P(None, "context")) for x in args]
            m = jax.device_put(np.float32([slope]), P())
            if compiled is None:
                compiled = jax.jit(partial(value_and_gradients, causal=causal))
            jax.block_until_ready(compiled(placed[0], *placed, m))
        jax.effects_barrier()
        home = sum(hop.bit_count() for hop in hops)
        assert counts == {"chunk": 2 * 8 * sum(hops), "gradients": 8 * (sum(hops) + home)}, slope


# The table


@partial(jax.jit, static_argnames=("causal", "tolerance", "query_tile", "key_tile"))
def ranges_of_devices(query, key, bias, scale, query_positions, key_positions, **static):
    def of_device(query, key, *positions):
        return key_ranges(
            *(query, key, bias, scale),
            query_positions=positions[0],
            key_positions=positions[1],
            segment_ids=None,
            key_segment_ids=None,
            axis="context",
            **static,
        )

    along, out_specs = P(None, "context"), P(None, None, "context")
    ranges = jax.shard_map(of_device, in_specs=along, out_specs=out_specs, check_vma=False)
    return ranges(query, key, query_positions, key_positions)


def ranges_over_devices(
    *arrays, query_positions, key_positions, segment_ids, key_segment_ids, **static
):
    """`key_ranges` of sequences over 8 devices, whose chunks are of whole tiles."""
    assert segment_ids is None and key_segment_ids is None
    query, key, bias, scale = arrays
    with jax.set_mesh(mesh_of(1, 1, 8)):
        along = P(None, "context")
        query, key, *at = jax.device_put((query, key, query_positions, key_positions), along)
        return jax.tree.map(np.asarray, ranges_of_devices(query, key, bias, scale, *at, **static))


NAMES = [
    "normal",
    "huge norms in one tile",
    "a far key wins",
    "all keys alike but for little",
    "content all but undoes the decay",
    "queries loud where keys are quiet",
]


def test_the_table_is_that_of_the_whole_sequence(monkeypatch):
    """And so leaves out as much, and no more than the tolerance.

    Also where half of the devices hold keys that only queries of others see.
    """
    rng = np.random.default_rng(0)
    kept, one_device = [], test_tiles.ranges
    for name, back in [*((name, 0) for name in NAMES), ("normal", 300), ("a far key wins", 300)]:
        query, key = (rng.normal(size=(1, 512, 2, 8)).astype(np.float32) for _ in range(2))
        m = np.float32([0.5, 0.06])
        test_tiles.adversary(name, rng, query, key, m)
        at = np.arange(512)[None]
        options = {"scale": 0.35, "query_positions": at - back * (at < 256), "key_positions": at}
        alone = test_tiles.kept_ranges(query, key, m, 1e-3, **options)
        monkeypatch.setattr(test_tiles, "ranges", ranges_over_devices)
        together = test_tiles.kept_ranges(query, key, m, 1e-3, **options)
        assert test_tiles.worst_dropped(query, key, m, 1e-3, **options) <= 1e-3
        monkeypatch.setattr(test_tiles, "ranges", one_device)
        # Rounding may move a range by a tile of 32, if rarely.
        apart = np.abs(np.stack(alone) - np.stack(together))
        assert apart.max() <= 32 and (apart > 0).mean() < 0.02
        kept.append(float((together[1] - together[0]).mean()))
    assert min(kept) < 0.5 * max(kept)


# Size


def compile_program(mesh, length, *, heads=2, dim=8, dtype="float32", **options):
    """Compile output and gradients of sequences over all devices of a mesh."""
    shapes = [(1, length, heads, dim)] * 4 + [(heads,)]
    specs, dtypes = [P(None, "context")] * 4 + [P()], [dtype] * 4 + ["float32"]
    args = [
        jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))
        for shape, dtype, spec in zip(shapes, dtypes, specs, strict=True)
    ]
    with jax.set_mesh(mesh):
        return jax.jit(partial(value_and_gradients, **options)).lower(*args).compile()


def test_memory_grows_with_length_and_not_its_square():
    """What the program of one device needs above its inputs and outputs."""
    at_64k, at_256k = (
        compile_program(mesh_of(1, 1, 8), length).memory_analysis().temp_size_in_bytes
        for length in (2**16, 2**18)
    )
    assert at_64k < 2**25
    assert at_256k < 4.5 * at_64k


@pytest.mark.parametrize(
    ("dtype", "causal", "kernel"),
    [("bfloat16", True, True), ("bfloat16", False, True), ("float16", True, False)],
)
def test_it_compiles_for_tpus(chip_mesh, dtype, causal, kernel):
    """With kernels of our own where they can serve."""
    mesh = chip_mesh("v5e", (4,), ("context",))
    text = compile_program(mesh, 4096, dim=128, dtype=dtype, causal=causal).as_text()
    assert "collective-permute-start" in text  # under way while something else is computed
    for name in ("forward", "query_gradient", "key_gradient"):
        assert (f"alibi_{name}" in text) == kernel


# What it refuses


@pytest.mark.parametrize(
    ("specs", "implementation", "message"),
    [
        ((P("data", "context"), P("data")), None, "sharded alike along batch, length and heads"),
        ((P(None, ("data", "context")),) * 2, None, "length over one mesh axis"),
        ((P(None, "context"),) * 2, "dense", "needs whole sequences"),
        ((P(None, "context"),) * 2, "cudnn", "needs an NVIDIA GPU"),
    ],
)
def test_what_cannot_be_is_refused(specs, implementation, message):
    query, key, value, m = inputs(length=8)
    with jax.set_mesh(mesh_of(2, 1, 4)):
        query, key, value = (
            jax.device_put(x, s)
            for x, s in zip((query, key, value), (specs[0], specs[1], specs[1]), strict=True)
        )
        with pytest.raises(ValueError, match=message):
            attention(query, key, value, m, implementation=implementation)


def test_an_axis_of_one_divides_nothing():
    *args, m = inputs(length=6, key_heads=2)
    with jax.set_mesh(mesh_of(2, 1, 1)):
        placed = [jax.device_put(x, P("data", "context")) for x in args]
        for implementation in (None, "dense", "blockwise"):
            got = jax.jit(partial(attention, implementation=implementation))(*placed, m)
            close(np.asarray(got), attention(*args, m))
