"""Blockwise attention at its own tile sizes, at lengths that dense attention cannot hold."""

from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from alibi_jax import attention, slopes
from tests.attention.naive import close, inputs, naive_attention

blockwise = partial(attention, implementation="blockwise")
dense = partial(attention, implementation="dense")


def documents(batch, length):
    rng = np.random.default_rng(0)
    return np.sort(rng.integers(0, 6, (batch, length)), axis=1)


OPTIONS = {
    "causal": {},
    "symmetric": {"causal": False},
    "documents": {"segment_ids": documents(1, 1300)},
    "symmetric documents": {"segment_ids": documents(1, 1300), "causal": False},
    "gaps": {"query_positions": np.cumsum(np.random.default_rng(1).integers(1, 9, 1300))},
    "shuffled": {"query_positions": np.random.default_rng(1).permutation(1300)},
    "nothing left out": {"tolerance": 0.0},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_values_and_gradients_are_those_of_dense(name):
    args = inputs(batch=1, length=1300, heads=2, key_heads=1, value_dim=5)
    cotangent = jnp.asarray(np.random.default_rng(1).normal(size=(1, 1300, 2, 5)), jnp.float32)

    def both(f):
        output, pullback = jax.vjp(partial(f, **OPTIONS[name]), *args)
        return output, *pullback(cotangent)

    for got, expected in zip(
        *(jax.jit(partial(both, f))() for f in (blockwise, dense)), strict=True
    ):
        largest = jnp.abs(expected).max()
        assert largest > 0.1
        close(got / largest, expected / largest, atol=2e-6)


@pytest.mark.parametrize("lengths", [(700, 1500), (1500, 700), (1, 2000)])
def test_other_numbers_of_keys_than_queries(lengths):
    args = inputs(batch=1, length=lengths[0], key_length=lengths[1], heads=2)
    close(jax.jit(blockwise)(*args), jax.jit(dense)(*args), atol=2e-6)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_16_bit_inputs_lose_no_more_than_the_rounding_of_the_output(dtype):
    query, key, value, m = inputs(length=600, batch=1)
    args = [x.astype(dtype) for x in (query, key, value)]
    exact = naive_attention(*args, m)
    got = np.float64(jax.jit(blockwise)(*args, m))
    rounding = np.abs(np.float64(jnp.asarray(exact, jnp.float32).astype(dtype)) - exact)
    assert np.sqrt(np.mean((got - exact) ** 2)) < 1.1 * np.sqrt(np.mean(rounding**2))


def test_memory_grows_with_length_and_not_its_square():
    """What the compiled program needs above its inputs and outputs, forward and backward."""

    def temporaries(length):
        x = jax.ShapeDtypeStruct((1, length, 8, 64), jnp.float32)

        def gradients(query, key, value, cotangent):
            run = partial(blockwise, slopes=slopes(8))
            return jax.vjp(run, query, key, value)[1](cotangent)

        return jax.jit(gradients).lower(x, x, x, x).compile().memory_analysis().temp_size_in_bytes

    at_64k = temporaries(2**16)
    assert at_64k < 2**29
    assert temporaries(2**18) < 4.5 * at_64k


def test_128k_tokens():
    """The last rows against float64: a flat head and a steep one."""
    length, last = 2**17, 64
    query, key, value, _ = inputs(batch=1, length=length, heads=2, key_heads=1, dim=4)
    m = np.float32([0.25, 0.03])
    got = jax.jit(blockwise)(query, key, value, m)
    assert got.shape == query.shape and np.isfinite(got).all()
    exact = naive_attention(query[:, -last:], key[:, -4096:], value[:, -4096:], m)
    close(got[:, -last:], exact, atol=1e-5)


def test_one_program_for_all_values():
    @jax.jit
    @chex.assert_max_traces(n=1)
    def run(*args):
        return blockwise(*args)

    for seed in range(3):
        run(*inputs(seed, length=20))


def test_shardings_that_need_communication_are_refused():
    args = inputs(batch=4, length=8, key_heads=2)
    mesh = jax.make_mesh((2, 4), ("data", "tensor"))
    with jax.set_mesh(mesh):
        for specs, words in (
            ((P(None, None, None, "data"), P(), P()), "query is sharded as"),
            ((P(None, "data"), P(), P()), "must be sharded alike along batch, length and heads"),
            ((P(None, None, "tensor"), P(), P()), "the 2 key heads over "),
            ((P("data"), P(), P()), "must be sharded alike along batch, length and heads"),
        ):
            placed = [jax.device_put(x, s) for x, s in zip(args, specs, strict=False)]
            with pytest.raises(ValueError, match=words):
                blockwise(*placed, args[3])


@pytest.mark.parametrize("key_heads", [4, 1])
def test_devices_share_batch_and_heads(key_heads):
    args = inputs(batch=4, length=300, key_heads=key_heads)
    at = np.arange(300) * 3

    def both(query, key, value, m):
        run = partial(blockwise, query_positions=at)
        output, pullback = jax.vjp(run, query, key, value, m)
        return output, *pullback(output)

    alone = jax.jit(both)(*args)
    spec = P("data", None, "tensor", None)
    of_key = spec if key_heads == 4 else P("data")
    with jax.set_mesh(jax.make_mesh((2, 4), ("data", "tensor"))):
        placed = [
            jax.device_put(x, s) for x, s in zip(args, (spec, of_key, of_key, P()), strict=True)
        ]
        together = jax.jit(both)(*placed)
    assert together[0].sharding.spec == spec
    for got, expected in zip(together, alone, strict=True):
        close(np.asarray(got), np.asarray(expected), atol=1e-5)


@pytest.mark.parametrize("check_vma", [True, False])
def test_inside_a_shard_map(check_vma):
    query, *_, m = inputs(batch=8, length=40, heads=2)

    def loss(attend, query, m):
        return jnp.mean(jnp.square(attend(query, query, query, m)))

    expected = jax.jit(jax.value_and_grad(partial(loss, dense), (0, 1)))(query, m)
    mesh = jax.make_mesh((8,), ("data",))
    with jax.set_mesh(mesh):
        attend = jax.shard_map(
            blockwise,
            in_specs=(P("data"), P("data"), P("data"), P()),
            out_specs=P("data"),
            check_vma=check_vma,
        )
        placed = jax.device_put(query, P("data")), jax.device_put(m, P())
        got = jax.jit(jax.value_and_grad(partial(loss, attend), (0, 1)))(*placed)
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        close(np.asarray(x), np.asarray(y), atol=1e-6)


def test_op_by_op_under_a_mesh():
    args = inputs(batch=2, length=40, heads=2)
    with jax.set_mesh(jax.make_mesh((2,), ("data",), devices=jax.devices()[:2])):
        placed = [jax.device_put(x, P("data")) for x in args[:3]]
        got = blockwise(*placed, args[3])
    close(np.asarray(got), dense(*args))


@pytest.mark.parametrize("causal", [True, False])
def test_positions_that_wrap_round(causal):
    """In the middle of a tile: only differences matter."""
    args = inputs(batch=1, length=1024, heads=2)
    at = np.uint32(2**31 - 500) + np.arange(1024, dtype=np.uint32)
    got = jax.jit(partial(blockwise, causal=causal, query_positions=at))(*args)
    np.testing.assert_array_equal(got, jax.jit(partial(blockwise, causal=causal))(*args))


def test_accelerators_are_told_to_multiply_in_float32():
    """Left to themselves they round float32 factors to 16 bits: no CPU would show it."""
    run = jax.jit(lambda *x: jax.vjp(blockwise, *x)[1](x[0]))
    text = run.trace(*inputs(length=1100)).lower(lowering_platforms=("tpu",)).as_text()
    products = [line for line in text.splitlines() if "dot_general" in line]
    assert len(products) >= 8 and all("HIGHEST, HIGHEST" in line for line in products)
