"""What Python costs in a training step: the time until the call of a step returns.

  python benchmarks/dispatch.py

The state is ready before each call and JAX runs steps asynchronously, so that the call returns once
the step is handed to the device. Predicted: the same for any model, since layers are stacked and so
the number of arrays does not grow; below 1 ms. Both are in results/dispatch.json, with the number
of arrays and the time of a whole step beside them.
"""

import dataclasses
import statistics
import sys
import time
from pathlib import Path

import jax
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from alibi_jax.sharding import make_mesh
from alibi_jax.training.loop import compile_program
from benchmarks.common import write
from configs.quickstart import get_config

SIZES = {  # name: (layers, embed_dim)
    "2 layers x 64": (2, 64),
    "4 layers x 128": (4, 128),
    "24 layers x 128": (24, 128),
    "12 layers x 512": (12, 512),
}
CALLS = 30


def measure(num_layers: int, embed_dim: int) -> dict[str, float]:
    config = get_config()
    config = dataclasses.replace(
        config,
        model=dataclasses.replace(
            config.model,
            vocab_size=257,
            num_layers=num_layers,
            embed_dim=embed_dim,
            scan_layers=True,
        ),
        data=dataclasses.replace(config.data, batch_size=2),
    )
    mesh = make_mesh(config.mesh)
    with jax.set_mesh(mesh):
        program = compile_program(config, mesh)
        state = program.init()
        ids = np.ones((2, config.data.sequence_length + 1), np.int32)
        batch = dict.fromkeys(("tokens", "segment_ids", "token_bytes"), ids)
        batch = jax.device_put(batch, program.batch_sharding)
        dispatch, step = [], []
        for _ in range(CALLS):
            jax.block_until_ready(state)
            start = time.perf_counter()
            state, _ = program.step(state, batch)
            dispatch.append(time.perf_counter() - start)
            jax.block_until_ready(state)
            step.append(time.perf_counter() - start)
    return {
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(state.params)),
        "arrays": len(jax.tree.leaves(state)),
        "dispatch_ms_median": 1e3 * statistics.median(dispatch),
        "dispatch_ms_least": 1e3 * min(dispatch),
        "step_ms_median": 1e3 * statistics.median(step),
    }


if __name__ == "__main__":
    results = {}
    for name, size in SIZES.items():
        results[name] = measure(*size)
        print(name, results[name], flush=True)
    write("dispatch", {"calls": CALLS, "sizes": results})
