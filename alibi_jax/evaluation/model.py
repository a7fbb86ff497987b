"""A trained decoder as the functions of tokens that the protocols ask for, in bounded memory.

Rows of at most `tokens_per_batch` tokens are one program. Longer ones are read in chunks of so
many, with the keys and values of the tokens before in a cache: two numbers a token, layer and
key/value dimension, and the activations of one chunk.
"""

import operator
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from alibi_jax.config import Config
from alibi_jax.errors import require
from alibi_jax.evaluation.assess import Scorer
from alibi_jax.models import Decoder
from alibi_jax.models.cache import Cache
from alibi_jax.sharding import MeshConfig, make_mesh
from alibi_jax.training import checkpoint
from alibi_jax.training.optimizer import make_optimizer
from alibi_jax.training.state import abstract_state
from alibi_jax.training.workdir import checkpoint_steps


def restore_decoder(
    directory: Path, config: Config, step: int | None = None
) -> tuple[Decoder, int, dict[Path, str]]:
    """Read a checkpoint on one device, whatever mesh it was trained on; training may be going on.

    Args:
        directory: Of the checkpoints.
        config: Of the run.
        step: Of the checkpoint; None: the newest that can be read.

    Returns:
        The decoder, the step, and newer checkpoints that are damaged, with what is wrong.

    Raises:
        UserError: There is no such checkpoint, or it cannot be read.
    """
    mesh = make_mesh(MeshConfig(data=1), jax.devices()[:1])
    optimizer = make_optimizer(config.optimizer, config.training.num_steps)
    with jax.set_mesh(mesh):
        graphdef, abstract = abstract_state(config.model, optimizer, config.training.seed, mesh)
        restored = None
        while restored is None:  # training may remove a checkpoint as it is read
            steps = _steps(directory, step)
            restored = checkpoint.restore(directory, abstract, steps=steps, repair=False)
    # Off the mesh: one device needs none.
    params = jax.tree.map(lambda x: x.addressable_data(0), restored.state.params)
    return nnx.merge(graphdef, params), restored.step, restored.unreadable


def _steps(directory: Path, step: int | None) -> list[int]:
    """Steps to try, newest first."""
    steps, here = checkpoint_steps(directory), f"--workdir={directory.parent} holds no checkpoint"
    require(bool(steps), f"{here} yet: train it first")
    if step is None:
        return steps
    there = ", ".join(map(str, reversed(steps)))
    require(step in steps, f"{here} of --step={step}: there is {there}")
    return [step]


@partial(jax.jit, donate_argnames="cache")
def _chunk_losses(
    decoder: Decoder, tokens: jax.Array, cache: Cache, window: jax.Array | None
) -> tuple[jax.Array, Cache]:
    losses, cache = decoder.chunk_losses(tokens[:, :-1], tokens[:, 1:], cache, window=window)
    return losses[0], cache


@partial(jax.jit, donate_argnames="cache")
def _chunk_hidden(decoder: Decoder, tokens: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
    return decoder.chunk_hidden(tokens, cache)


def make_scorer(decoder: Decoder, tokens_per_batch: int) -> Scorer:
    """Turn a decoder into what the protocols ask for.

    Args:
        decoder: Off any mesh.
        tokens_per_batch: Tokens of a row that are computed at once; divides the longer rows best
            if it is a multiple of the training length.
    """

    def losses(tokens: np.ndarray, window: int | None) -> np.ndarray:
        rows, length = tokens.shape[0], tokens.shape[1] - 1
        limit = None if window is None else np.int32(window)
        size = chunk_length(length, tokens_per_batch)
        if size == length:
            given, targets = jnp.asarray(tokens[:, :-1]), jnp.asarray(tokens[:, 1:])
            return np.asarray(decoder.token_losses(given, targets, window=window)[0])
        cache, parts = decoder.init_cache(rows, length), []
        for start in range(0, length, size):
            part, cache = _chunk_losses(decoder, tokens[:, start : start + size + 1], cache, limit)
            parts.append(np.asarray(part))
        return np.concatenate(parts, axis=1)

    def logits(tokens: np.ndarray, count: int) -> np.ndarray:
        rows, length = tokens.shape
        size = chunk_length(length, tokens_per_batch)
        if size == length:
            return np.asarray(decoder.logits(decoder.hidden(jnp.asarray(tokens))[:, -count:]))
        cache, last = decoder.init_cache(rows, length), np.zeros((rows, 0, 0))
        for start in range(0, length, size):
            hidden, cache = _chunk_hidden(decoder, tokens[:, start : start + size], cache)
            tail = np.asarray(hidden[:, -count:])
            last = np.concatenate([last, tail], axis=1)[:, -count:] if start else tail
        return np.asarray(decoder.logits(jnp.asarray(last)))

    return Scorer(
        losses,
        logits,
        lambda tokens, edges, count: decoder.attention_mass(jnp.asarray(tokens), edges, count),
        lambda length: slopes_of(decoder, length),
        decoder.config.sink,
    )


def chunk_length(length: int, tokens_per_batch: int) -> int:
    """Return the largest divisor of `length` that is at most `tokens_per_batch`."""
    return next(size for size in range(min(length, tokens_per_batch), 0, -1) if length % size == 0)


def slopes_of(decoder: Decoder, length: int) -> np.ndarray | None:
    """Return the slope of every head in a row of `length` tokens, f32[layers, H].

    None where the bias is not linear.
    """
    if decoder.config.position != "alibi":
        return None
    layers = decoder.blocks.attention.position
    nothing = jnp.zeros((1, length, decoder.config.embed_dim))  # slopes do not depend on it

    def slopes(index: int) -> np.ndarray:
        layer = None if layers is None else jax.tree.map(operator.itemgetter(index), layers)
        bias = decoder.position.bias(layer, nothing, length, None)
        return np.asarray(getattr(bias, "slopes", bias))

    return np.stack([slopes(index) for index in range(decoder.config.num_layers)])
