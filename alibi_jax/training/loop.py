"""The training loop: from a config and a corpus to a trained state, through any interruption."""

import contextlib
import math
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from alibi_jax import data
from alibi_jax.config import Config
from alibi_jax.distributed import any_process, make_vote, print_once, wait_for_all
from alibi_jax.errors import UserError
from alibi_jax.sharding import local_rows, spec, to_devices, to_host
from alibi_jax.training import checkpoint, workdir
from alibi_jax.training.logs import Logs
from alibi_jax.training.loss import target_mask
from alibi_jax.training.optimizer import learning_rate_schedule, make_optimizer
from alibi_jax.training.state import Params, TrainState, abstract_state, init_state
from alibi_jax.training.step import Batch, Metrics, make_loss_fn, make_train_step


class Diverged(Exception):
    """The loss is no longer a finite number; the message says where and what is left."""


class Program(NamedTuple):
    """A compiled run, with nothing allocated on the devices yet."""

    state: TrainState  # shapes, dtypes and shardings
    init: Callable[[], TrainState]
    step: Callable[[TrainState, Batch], tuple[TrainState, Metrics]]
    loss_fn: Callable[..., jax.Array]  # losses(params, tokens, segment_ids)
    batch_sharding: NamedSharding
    temporary_bytes: int  # of a step on one device, above state and batch
    compile_seconds: float


def compile_program(config: Config, mesh: Mesh) -> Program:
    """Compiles the training step ahead of time. Call it under `jax.set_mesh(mesh)`."""
    start = time.perf_counter()
    training = config.training
    optimizer = make_optimizer(config.optimizer, training.num_steps)
    graphdef, abstract = abstract_state(config.model, optimizer, training.seed, mesh)
    step = make_train_step(
        graphdef,
        optimizer,
        learning_rate_schedule(config.optimizer, training.num_steps),
        z_loss=training.z_loss,
        gradient_accumulation=training.gradient_accumulation,
        use_dropout=config.model.dropout > 0.0,
    )
    partition = spec("batch", None)
    assert partition is not None, "compile_program needs a mesh"
    sharding = NamedSharding(mesh, partition)
    shape = (config.data.batch_size, config.data.sequence_length + 1)
    ids = jax.ShapeDtypeStruct(shape, np.int32, sharding=sharding)
    compiled = step.lower(abstract, {"tokens": ids, "segment_ids": ids}).compile()
    memory = compiled.memory_analysis()

    def init() -> TrainState:
        return init_state(config.model, optimizer, training.seed, mesh)[1]

    return Program(
        state=abstract,
        init=init,
        step=compiled,
        loss_fn=make_loss_fn(graphdef),
        batch_sharding=sharding,
        temporary_bytes=getattr(memory, "temp_size_in_bytes", 0),
        compile_seconds=time.perf_counter() - start,
    )


def check_data(config: Config, corpus: data.Corpus) -> None:
    """Raises UserError if a split that training reads is too short for a single window."""
    for name in ("train", "valid") if config.training.validate_every else ("train",):
        try:
            _stream(config, getattr(corpus, name))
        except UserError as error:
            raise UserError(f"the {name} split of {config.data.source!r}: {error}") from error


def train(
    config: Config, corpus: data.Corpus, program: Program, directory: Path
) -> tuple[TrainState, bool]:
    """Trains to `config.training.num_steps`, resuming what `directory` holds.

    Returns:
      The state, and whether training is complete: False after Ctrl-C or SIGTERM, with everything
      saved.

    Raises:
      Diverged: the loss is nan or infinite.
      UserError: no checkpoint can be read, or nothing can be written.
    """
    training = config.training
    checkpoints = directory / workdir.CHECKPOINTS
    restored = checkpoint.restore(checkpoints, program.state)
    start = 0 if restored is None else restored.step
    state = program.init() if restored is None else restored.state
    for path, reason in restored.unreadable.items() if restored else ():
        print_once(f"a damaged checkpoint is now {path} ({reason}): falling back to step {start}")
    if restored:
        print_once(f"resuming at step {start} of {training.num_steps}")

    num_rows = config.data.batch_size
    stream = _stream(config, corpus.train, program.batch_sharding)
    batches = data.training_iterator(stream)
    if restored:
        batches.set_state(restored.position)
    validate = _validation(config, corpus, program)
    saver = checkpoint.Checkpointer(checkpoints, training.keep_checkpoints, config.to_dict())
    with workdir.writing(directory), contextlib.ExitStack() as stack:
        stack.callback(saver.close)
        stack.callback(batches.close)
        logs = Logs(
            directory,
            start=start,
            num_steps=training.num_steps,
            bytes_per_token=corpus.train.bytes_per_token(config.data.packing),
            validation_bytes_per_token=corpus.valid.bytes_per_token(config.data.packing),
        )
        stack.callback(logs.close)

        def report(step: int, metrics: Metrics) -> None:
            write = step % training.log_every == 0 or step == training.num_steps
            loss = logs.train(step, metrics, write=write)
            if not (math.isfinite(loss) and math.isfinite(float(metrics["grad_norm"]))):
                raise Diverged(_divergence(step, loss, saver.latest))

        step, saved, pending = start, start, None
        vote = make_vote(program.batch_sharding)
        wait_for_all()
        with _stop_signal() as stopped:
            while step < training.num_steps and not vote(stopped()):
                batch = to_devices(next(batches), program.batch_sharding, num_rows)
                state, metrics = program.step(state, batch)
                # The step before is reported while this one runs.
                if pending is not None:
                    report(*pending)
                step, pending = step + 1, (step + 1, metrics)
                due = step % training.checkpoint_every == 0
                validation_due = training.validate_every and step % training.validate_every == 0
                if due or validation_due:
                    report(*pending)  # so that a state that diverged is never saved
                    pending = None
                if validation_due:
                    logs.validation(step, validate(state.params))
                if due:
                    saver.save(step, state, batches.get_state())
                    saved = step
            if pending is not None:
                report(*pending)
            if step > saved:
                saver.save(step, state, batches.get_state())
            saver.wait()
            complete = step == training.num_steps and not any_process(stopped())
    return state, complete


def _stream(config: Config, split: data.TokenizedSplit, sharding: NamedSharding | None = None):
    """The batches of a split; with their sharding only the rows that this process needs."""
    shape = (config.data.batch_size, config.data.sequence_length + 1)
    return data.batches(
        split,
        sequence_length=config.data.sequence_length,
        batch_size=config.data.batch_size,
        seed=config.training.seed,
        packing=config.data.packing,
        rows=None if sharding is None else local_rows(sharding, shape),
    )


def _validation(config: Config, corpus: data.Corpus, program: Program) -> Callable[[Params], float]:
    """The mean loss of the same few validation batches, in nats per token."""

    def validate(params: Params) -> float:
        stream = _stream(config, corpus.valid, program.batch_sharding)
        nats = targets = 0.0
        for index in range(config.training.validation_batches):
            batch = to_devices(stream[index], program.batch_sharding, config.data.batch_size)
            losses = to_host(program.loss_fn(params, batch["tokens"], batch["segment_ids"]))
            mask = to_host(target_mask(batch["segment_ids"]))
            nats, targets = nats + float((losses * mask).sum()), targets + float(mask.sum())
        return nats / max(targets, 1.0)

    return validate


def _divergence(step: int, loss: float, latest: Path | None) -> str:
    what = f"loss is {loss}" if not math.isfinite(loss) else "the gradient is not finite"
    saved = f"the last good checkpoint is {latest}" if latest else "there is no checkpoint yet"
    return (
        f"{what} at step {step}: stopped; {saved}. A lower --config.optimizer.learning_rate, a "
        "longer warmup_steps or a smaller clip_norm may help, in a new --workdir"
    )


@contextlib.contextmanager
def _stop_signal() -> Iterator[Callable[[], bool]]:
    """Gives a function that says whether Ctrl-C or SIGTERM came; a second one ends at once."""
    received: list[int] = []

    def handle(number: int, frame: Any) -> None:
        received.append(number)
        restore()

    def restore() -> None:
        for number, handler in previous.items():
            signal.signal(number, handler)

    previous = {int(n): signal.signal(n, handle) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(received)
    finally:
        restore()
