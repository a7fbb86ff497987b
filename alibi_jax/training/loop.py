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
import optax
import tqdm
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from alibi_jax import data
from alibi_jax.config import Config
from alibi_jax.distributed import any_process, from_main, make_vote, print_once, wait_for_all
from alibi_jax.errors import UserError, require
from alibi_jax.sharding import local_rows, spec, to_devices, to_host
from alibi_jax.training import checkpoint, workdir
from alibi_jax.training.chips import peak_flops
from alibi_jax.training.flops import flops_per_token
from alibi_jax.training.goodput import Clock
from alibi_jax.training.logs import Logs
from alibi_jax.training.loss import target_mask
from alibi_jax.training.optimizer import learning_rate_schedule, make_optimizer
from alibi_jax.training.profiling import DIRECTORY, NEVER, Profiler
from alibi_jax.training.state import Params, TrainState, abstract_state, init_state
from alibi_jax.training.step import Batch, Metrics, make_loss_fn, make_train_step

MAX_SKIPPED_IN_A_ROW = 10


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


class LoweredStep(NamedTuple):
    """A training step before XLA compiles it, with what it reads."""

    graphdef: nnx.GraphDef
    optimizer: optax.GradientTransformation
    state: TrainState  # shapes, dtypes and shardings
    batch: Batch  # shapes, dtypes and shardings
    batch_sharding: NamedSharding
    step: jax.stages.Lowered


def lower_step(config: Config, mesh: Mesh) -> LoweredStep:
    """Traces the training step for the devices of a mesh, which need not be here.

    Call it under `jax.set_mesh(mesh)`.
    """
    training = config.training
    optimizer = make_optimizer(config.optimizer, training.num_steps)
    graphdef, abstract = abstract_state(config.model, optimizer, training.seed, mesh)
    step = make_train_step(
        graphdef,
        optimizer,
        learning_rate_schedule(config.optimizer, training.num_steps),
        z_loss=training.z_loss,
        gradient_accumulation=training.gradient_accumulation,
        use_dropout=config.model.uses_dropout,
        skip_nonfinite=training.on_nonfinite == "skip",
        one_segment=config.data.packing == "stream",
    )
    partition = spec("batch", None)
    assert partition is not None, "lower_step needs a mesh"
    sharding = NamedSharding(mesh, partition)
    shape = (config.data.batch_size, config.data.sequence_length + 1)
    ids = jax.ShapeDtypeStruct(shape, np.int32, sharding=sharding)
    batch: Any = {"tokens": ids, "segment_ids": ids, "token_bytes": ids}
    lowered = step.lower(abstract, batch)
    return LoweredStep(graphdef, optimizer, abstract, batch, sharding, lowered)


def compile_program(config: Config, mesh: Mesh) -> Program:
    """Compiles the training step, and the losses that validation needs, ahead of time.

    Call it under `jax.set_mesh(mesh)`.
    """
    start = time.perf_counter()
    lowered = lower_step(config, mesh)
    compiled = lowered.step.compile()
    memory = compiled.memory_analysis()
    loss_fn = make_loss_fn(lowered.graphdef)
    if config.training.validate_every:
        # A call of this shape finds it.
        tokens, segment_ids = lowered.batch["tokens"], lowered.batch["segment_ids"]
        loss_fn.lower(lowered.state.params, tokens, segment_ids).compile()

    def init() -> TrainState:
        return init_state(config.model, lowered.optimizer, config.training.seed, mesh)[1]

    return Program(
        state=lowered.state,
        init=init,
        step=compiled,
        loss_fn=loss_fn,
        batch_sharding=lowered.batch_sharding,
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
    config: Config,
    corpus: data.Corpus,
    program: Program,
    directory: Path,
    *,
    clock: Clock | None = None,
    profile: range = NEVER,
    bar: tqdm.tqdm | None = None,
) -> tuple[TrainState, bool]:
    """Trains to `config.training.num_steps`, resuming what `directory` holds.

    Args:
      config: the run's.
      corpus: its text.
      program: what `compile_program` gave for it.
      directory: the run's.
      clock: what the time of the run is counted on; None: one of its own.
      profile: the steps to trace, counted from 0.
      bar: counts the steps of several runs; None: one of this run's own is shown.

    Returns:
      The state, and whether training is complete: False after Ctrl-C or SIGTERM, with everything
      saved.

    Raises:
      Diverged: the loss is nan or infinite, or too often in a row where that is skipped.
      UserError: no checkpoint can be read, or nothing can be written.
    """
    training = config.training
    clock = clock or Clock()
    clock.resume(directory)
    checkpoints = directory / workdir.CHECKPOINTS
    with clock.spend("checkpoint"):
        for line in from_main(lambda: _leave_decay(checkpoints, config)):
            print_once(line)
        restored = checkpoint.restore(checkpoints, program.state)
    start = 0 if restored is None else restored.step
    with clock.spend("compile"):
        state = program.init() if restored is None else restored.state
    for path, reason in restored.unreadable.items() if restored else ():
        print_once(f"a damaged checkpoint is now {path} ({reason}): falling back to step {start}")
    if restored:
        print_once(f"resuming at step {start} of {training.num_steps}")
        if jump := _learning_rate_jump(config, restored):
            print_once(jump)

    num_rows = config.data.batch_size
    stream = _stream(config, corpus.train, program.batch_sharding)
    batches = data.training_iterator(stream)
    if restored:
        batches.set_state(restored.position)
    validate = _validation(config, corpus, program)
    decay_start = config.optimizer.decay_start(training.num_steps)
    saver = checkpoint.Checkpointer(
        checkpoints,
        training.keep_checkpoints,
        config.to_dict(),
        keep_best=training.keep_best,
        keep_step=decay_start,
    )
    with workdir.writing(directory), contextlib.ExitStack() as stack:
        stack.callback(clock.write, directory)
        stack.enter_context(saver)
        stack.callback(batches.close)
        profiler = Profiler(directory / DIRECTORY, profile)
        stack.callback(profiler.close)
        logs = Logs(
            directory,
            start=start,
            num_steps=training.num_steps,
            clock=clock,
            peak_seconds=_peak_seconds(config),
            bar=bar,
        )
        stack.callback(logs.close)
        in_a_row = 0  # steps whose loss or gradient was not finite

        def report(step: int, metrics: Metrics) -> None:
            nonlocal in_a_row
            write = step % training.log_every == 0 or step == training.num_steps
            loss = logs.train(step, metrics, write=write)
            if math.isfinite(loss) and math.isfinite(float(metrics["grad_norm"])):
                in_a_row = 0
                return
            in_a_row += 1
            if training.on_nonfinite == "stop" or in_a_row == MAX_SKIPPED_IN_A_ROW:
                raise Diverged(_divergence(step, loss, saver.latest, in_a_row))
            logs.note(f"step {step}: {_nonfinite(loss)}: skipped")

        step, saved, pending = start, start, None
        vote = make_vote(program.batch_sharding)
        wait_for_all()
        with _stop_signal() as stopped, clock.spend("steps"):
            while step < training.num_steps and not vote(stopped()):
                saver.check()
                profiler.at(step, state)
                with clock.spend("input"):
                    batch = to_devices(next(batches), program.batch_sharding, num_rows)
                with jax.profiler.StepTraceAnnotation("train", step_num=step):
                    state, metrics = program.step(state, batch)
                # The step before is reported while this one runs.
                if pending is not None:
                    report(*pending)
                step, pending = step + 1, (step + 1, metrics)
                due = step % training.checkpoint_every == 0 or step == decay_start
                validation_due = training.validate_every and step % training.validate_every == 0
                if due or validation_due:
                    report(*pending)  # so that a state that diverged is never saved
                    pending = None
                validation_loss = None
                if validation_due:
                    with clock.spend("validation"):
                        validation_loss = logs.validation(step, *validate(state.params))
                    due = due or (training.keep_best and saver.is_best(validation_loss))
                if due:
                    with clock.spend("checkpoint"):
                        saver.save(step, state, batches.get_state(), validation_loss)
                        clock.write(directory)
                    saved = step
            if pending is not None:
                report(*pending)
            with clock.spend("checkpoint"):
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


def _leave_decay(checkpoints: Path, config: Config) -> list[str]:
    """Moves checkpoints aside whose learning rate decayed for an end that has moved since.

    A run goes on without a jump, as if its decay had never begun, from a checkpoint before it.

    Returns:
      Lines that say so.

    Raises:
      UserError: there is none from before.
    """
    if config.optimizer.schedule != "wsd":
        return []
    decayed: dict[int, int] = {}  # step: where its decay had begun
    found = checkpoint.metadata(checkpoints)
    for step, about in found.items():
        num_steps = _num_steps(about.get("config")) or config.training.num_steps
        start = config.optimizer.decay_start(num_steps) or 0
        if num_steps != config.training.num_steps and step > start:
            decayed[step] = start
    sound = [step for step, about in found.items() if about and step not in decayed]
    require(
        bool(sound) or not decayed,
        f"the learning rate of {checkpoints.parent} has decayed from step "
        f"{min(decayed.values(), default=0)} on, and no checkpoint from before is left to go on "
        "from: give config.training.num_steps as it was, or another --workdir",
    )
    return [
        f"step {step} has a learning rate that decays from step {start} on: kept as "
        f"{checkpoint.set_aside(checkpoints / str(step), 'decayed')}"
        for step, start in decayed.items()
    ]


def _num_steps(config: dict[str, Any] | None) -> int | None:
    """The number of steps of the run that a checkpoint is of; None if it does not say."""
    return None if config is None else config["training"]["num_steps"]


def _learning_rate_jump(config: Config, restored: checkpoint.Restored) -> str | None:
    """A line about a learning rate that another number of steps changes; None if it does not."""
    before, now = _num_steps(restored.config), config.training.num_steps
    if before is None:
        return None
    with jax.numpy_dtype_promotion("standard"):
        old, new = (
            float(learning_rate_schedule(config.optimizer, number)(restored.step))
            for number in (before, now)
        )
    if math.isclose(old, new, rel_tol=1e-5):
        return None
    advice = "; a longer run of config.optimizer.schedule=wsd goes on without a jump"
    return (
        f"learning rate at step {restored.step}: {old:.3g} under num_steps={before}, {new:.3g} "
        f"under num_steps={now}{'' if config.optimizer.schedule == 'wsd' else advice}"
    )


def _validation(
    config: Config, corpus: data.Corpus, program: Program
) -> Callable[[Params], tuple[float, float, float]]:
    """Nats of the same few validation batches, and of how many targets and bytes they are."""

    def validate(params: Params) -> tuple[float, float, float]:
        stream = _stream(config, corpus.valid, program.batch_sharding)
        sums = np.zeros(3)
        for index in range(config.training.validation_batches):
            batch = to_devices(stream[index], program.batch_sharding, config.data.batch_size)
            losses = to_host(program.loss_fn(params, batch["tokens"], batch["segment_ids"]))
            mask = to_host(target_mask(batch["segment_ids"]))
            token_bytes = to_host(batch["token_bytes"])[:, 1:]
            scored = mask > 0
            sums += losses[scored].sum(), scored.sum(), token_bytes[scored].sum()
        nats, targets, num_bytes = sums.tolist()
        return nats, targets, num_bytes

    return validate


def _peak_seconds(config: Config) -> float | None:
    """Seconds that a step would take at the peak of all devices; None where that is not known."""
    peak = peak_flops(jax.devices()[0].device_kind)
    if peak is None:
        return None
    length = config.data.sequence_length
    flops = config.data.batch_size * length * flops_per_token(config.model, length)
    return flops / (peak * jax.device_count())


def _nonfinite(loss: float) -> str:
    return f"loss is {loss}" if not math.isfinite(loss) else "the gradient is not finite"


def _divergence(step: int, loss: float, latest: Path | None, in_a_row: int) -> str:
    again = f", as {in_a_row} times in a row" if in_a_row > 1 else ""
    skip = "" if again else "; --config.training.on_nonfinite=skip passes over single steps"
    saved = f"the last good checkpoint is {latest}" if latest else "there is no checkpoint yet"
    return (
        f"{_nonfinite(loss)} at step {step}{again}: stopped; {saved}. A lower "
        "--config.optimizer.learning_rate, a longer warmup_steps or a smaller clip_norm may help, "
        f"in a new --workdir{skip}"
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
