"""A program of test_multiprocess.py: reads the newest checkpoint, sharded, and saves it elsewhere.

python copy_checkpoint.py --config=FILE [--distributed.FLAG=VALUE ...] --from=DIR --to=DIR
"""

import sys
from pathlib import Path

import jax

from alibi_jax import distributed
from alibi_jax.config import load_config
from alibi_jax.sharding import MeshConfig, make_mesh
from alibi_jax.training import checkpoint
from alibi_jax.training.optimizer import make_optimizer
from alibi_jax.training.state import abstract_state

flags = dict(argument.removeprefix("--").split("=", 1) for argument in sys.argv[1:])
distributed.initialize(
    {
        name.removeprefix("distributed."): value
        for name, value in flags.items()
        if name.startswith("distributed.")
    }
)
config = load_config(flags["config"], {"model.vocab_size": "257"})
optimizer = make_optimizer(config.optimizer, config.training.num_steps)
mesh = make_mesh(MeshConfig(data=1, fsdp=-1))
with jax.set_mesh(mesh):
    _, abstract = abstract_state(config.model, optimizer, config.training.seed, mesh)
    restored = checkpoint.restore(Path(flags["from"]), abstract)
    assert restored is not None and not restored.unreadable
    with checkpoint.Checkpointer(Path(flags["to"]), 1) as saver:
        saver.save(restored.step, restored.state, restored.position)
distributed.finish()
