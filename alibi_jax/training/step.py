"""One optimizer step, and the losses of held-out tokens: two pure jitted functions."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from alibi_jax.sharding import spec
from alibi_jax.training.loss import summed_loss, target_mask
from alibi_jax.training.state import Params, TrainState
from alibi_jax.typing import Array, Float, Int

Batch = dict[str, Int[Array, "B T+1"]]  # "tokens", "segment_ids" and "token_bytes"
Metrics = dict[str, Float[Array, ""]]


def make_train_step(
    graphdef: nnx.GraphDef,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    *,
    z_loss: float = 0.0,
    gradient_accumulation: int = 1,
    use_dropout: bool = False,
    skip_nonfinite: bool = False,
    one_segment: bool = False,
) -> jax.stages.Wrapped:
    """Returns the jitted `step(state, batch) -> (state, metrics)`; it consumes the state given.

    The loss is the mean over all target tokens of the batch, whatever the number of microbatches
    and however targets are spread over them. Metrics are float32 scalars: loss (nats per token),
    grad_norm (before clipping), learning_rate, tokens (targets in the batch) and bytes (of the text
    for which these stand).

    With `skip_nonfinite` a step whose loss or grad_norm is not finite leaves parameters and
    optimizer as they were; the step's number and the learning rate's schedule move on. The metric
    "skipped" is then 1, else 0.

    `one_segment` promises that the tokens of a sequence are all of one segment, so that attention
    may go without segment ids, which not every implementation takes.
    """

    def loss_fn(params: Params, batch: Batch, key: jax.Array | None):
        model = nnx.merge(graphdef, params)
        tokens, segment_ids = batch["tokens"], batch["segment_ids"]
        ids = None if one_segment else segment_ids[:, :-1]
        losses = model.token_losses(tokens[:, :-1], tokens[:, 1:], segment_ids=ids, key=key)
        total, sums = summed_loss(losses, segment_ids, z_loss)
        num_bytes = target_mask(segment_ids) * batch["token_bytes"][:, 1:].astype(jnp.float32)
        return total, sums | {"bytes": jnp.sum(num_bytes)}

    def gradients(params: Params, batch: Batch, key: jax.Array | None):
        (_, sums), grads = jax.value_and_grad(loss_fn, has_aux=True)(params, batch, key)
        return grads, sums

    def accumulated_gradients(params: Params, batch: Batch, key: jax.Array | None):
        # Every n-th sequence makes a microbatch, so that each stays spread over all devices.
        def split(x: Int[Array, "B T+1"]) -> Int[Array, "N B/N T+1"]:
            shape = (x.shape[0] // gradient_accumulation, gradient_accumulation, x.shape[1])
            return jnp.swapaxes(x.reshape(shape, out_sharding=spec("batch", None, None)), 0, 1)

        keys = None if key is None else jax.random.split(key, gradient_accumulation)
        microbatches = jax.tree.map(split, batch)

        def add(total, microbatch):
            return jax.tree.map(jnp.add, total, gradients(params, *microbatch)), None

        zeros = (jax.tree.map(jnp.zeros_like, params), {"nats": 0.0, "tokens": 0.0, "bytes": 0.0})
        return jax.lax.scan(add, zeros, (microbatches, keys))[0]

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(state.key, state.step) if use_dropout else None
        compute = gradients if gradient_accumulation == 1 else accumulated_gradients
        grads, sums = compute(state.params, batch, key)
        tokens = jnp.maximum(sums["tokens"], 1.0)  # a batch without targets changes nothing
        grads = jax.tree.map(lambda grad: grad / tokens, grads)
        with jax.numpy_dtype_promotion("standard"):  # optax mixes integers and floats
            updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
            learning_rate = jnp.asarray(schedule(state.step), jnp.float32)
        params = optax.apply_updates(state.params, updates)
        metrics = {
            "loss": sums["nats"] / tokens,
            "grad_norm": optax.tree.norm(grads),
            "learning_rate": learning_rate,
            "tokens": sums["tokens"],
            "bytes": sums["bytes"],
        }
        if skip_nonfinite:
            finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(metrics["grad_norm"])
            params, opt_state = _choose(
                finite, (params, opt_state), (state.params, state.opt_state)
            )
            metrics["skipped"] = 1.0 - finite.astype(jnp.float32)
        return TrainState(state.step + 1, params, opt_state, state.key), metrics

    return jax.jit(train_step, donate_argnames="state")


def _choose(finite: jax.Array, after: Any, before: Any) -> Any:
    """`after` where a step was finite, else `before`, but for the schedule's own step counter."""

    def is_schedule(node) -> bool:
        return isinstance(node, optax.ScaleByScheduleState)

    def choose(new, old):
        return new if is_schedule(new) else jnp.where(finite, new, old)

    return jax.tree.map(choose, after, before, is_leaf=is_schedule)


def make_loss_fn(
    graphdef: nnx.GraphDef,
) -> jax.stages.Wrapped:
    """Returns the jitted `losses(params, tokens, segment_ids=None, window=None) -> f32[B, T]`.

    tokens and segment_ids are i32[B, T+1]; losses[b, t] is that of tokens[b, t+1] in nats, given
    those before it, or given the last `window` of them. It compiles once for each shape, and once
    more for all windows.
    """

    @jax.jit
    def losses(params, tokens, segment_ids=None, window=None):
        model = nnx.merge(graphdef, params)
        ids = None if segment_ids is None else segment_ids[:, :-1]
        return model.token_losses(tokens[:, :-1], tokens[:, 1:], segment_ids=ids, window=window)[0]

    return losses
