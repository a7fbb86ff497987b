"""The state of a run: everything that a step reads and writes."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from alibi_jax.models import Decoder, DecoderConfig
from alibi_jax.typing import Array, Int

Params = dict[str, Any]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Attributes.

    step: i32, optimizer steps taken.
    params: float32 parameters of the decoder, as nested dicts: JAX flattens these in C++, and the
      three trees of a state (parameters and two of Adam) in a third of the time of `nnx.State`.
    opt_state: the optimizer's.
    key: of dropout; each step folds its number in.
    """

    step: Int[Array, ""]
    params: Params
    opt_state: optax.OptState
    key: jax.Array


def init_state(
    config: DecoderConfig, optimizer: optax.GradientTransformation, seed: int, mesh: Mesh
) -> tuple[nnx.GraphDef, TrainState]:
    """Structure of the model, and a state drawn from the seed, sharded from the start.

    Call it under `jax.set_mesh(mesh)`.
    """
    graphdef, init = _initializer(config, optimizer, seed)
    return graphdef, jax.jit(init, out_shardings=_shardings(jax.eval_shape(init), mesh))()


def abstract_state(
    config: DecoderConfig, optimizer: optax.GradientTransformation, seed: int, mesh: Mesh
) -> tuple[nnx.GraphDef, TrainState]:
    """What `init_state` returns, with shapes, dtypes and shardings in place of arrays."""
    graphdef, init = _initializer(config, optimizer, seed)
    shapes = jax.eval_shape(init)
    return graphdef, jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        shapes,
        _shardings(shapes, mesh),
    )


def _initializer(config: DecoderConfig, optimizer: optax.GradientTransformation, seed: int):
    def init() -> TrainState:
        params_key, key = jax.random.split(jax.random.key(seed))
        model = Decoder(config, nnx.Rngs(params_key))
        params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
        return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params), key)

    shapes = jax.eval_shape(lambda: Decoder(config, nnx.Rngs(0)))
    return nnx.split(shapes, nnx.Param)[0], init


def _shardings(shapes: TrainState, mesh: Mesh) -> TrainState:
    """Shardings that follow the parameters' own; scalars have none, so they are replicated."""

    def place(leaf) -> NamedSharding:
        partition = leaf.sharding.spec if leaf.sharding is not None else PartitionSpec()
        return NamedSharding(mesh, partition)

    return jax.tree.map(place, shapes)
