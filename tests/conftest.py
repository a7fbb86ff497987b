"""Strict JAX for every test: no silent promotion, eight devices, warnings are errors."""

import os

# Where libtpu is installed, to compile for TPUs, JAX would look for one first.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Tests compile much and compute little.
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_backend_optimization_level=0"

import jax

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
