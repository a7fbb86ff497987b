"""Strict JAX for every test: no silent promotion, eight devices, warnings are errors."""

import os

# Where libtpu is installed, to compile for TPUs, JAX would look for one first.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Tests compile much and compute little.
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_backend_optimization_level=0"

import chex
import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(autouse=True)
def _no_traces_yet():
    """`chex.assert_max_traces` counts those of a function in this test, not in those before."""
    chex.clear_trace_counter()
