"""Any mesh, with axes of any name and kind, and whether or not it is set."""

from contextlib import nullcontext
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from alibi_jax import attention
from tests.attention.naive import close, inputs, naive_attention

AUTO, EXPLICIT = AxisType.Auto, AxisType.Explicit
CASES = {
    "batch": (("rows",), (EXPLICIT,), P("rows")),
    "batch and length": (("x", "y"), (EXPLICIT, EXPLICIT), P("x", "y")),
    "explicit batch and automatic heads": (("x", "y"), (EXPLICIT, AUTO), P("x", None, "y")),
    "automatic batch and explicit length": (("x", "y"), (AUTO, EXPLICIT), P("x", "y")),
    "automatic": (("x", "y"), (AUTO, AUTO), P("x", "y")),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("is_set", [False, True])
def test_any_mesh_will_do(name, is_set):
    axes, kinds, spec = CASES[name]
    mesh = jax.make_mesh((2,) * len(axes), axes, kinds, devices=jax.devices()[: 2 ** len(axes)])
    *arrays, m = inputs(length=10, heads=2)
    placed = [jax.device_put(x, NamedSharding(mesh, spec)) for x in arrays]
    attend = partial(attention, implementation="blockwise")
    with jax.set_mesh(mesh) if is_set else nullcontext():
        got = attend(*placed, m), jax.jit(attend)(*placed, m)
        grads = jax.jit(jax.grad(lambda *x: jnp.sum(jnp.sin(attend(*x, m))), (0, 1, 2)))(*placed)
    for x in got:
        close(np.asarray(x), naive_attention(*arrays, m))
    expected = jax.grad(lambda *x: jnp.sum(jnp.sin(attention(*x, m))), (0, 1, 2))(*arrays)
    for x, y in zip(grads, expected, strict=True):
        close(np.asarray(x), y)
