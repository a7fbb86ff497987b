"""The runs of a comparison: each trains and evaluates in a directory of its own, once."""

import gc
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import tqdm

from alibi_jax import backend
from alibi_jax.config import Config
from alibi_jax.errors import UserError
from alibi_jax.evaluation.compare_methods import trained
from alibi_jax.evaluation.compare_summary import Run
from alibi_jax.evaluation.report import write_json
from alibi_jax.evaluation.run import evaluate_run, numbers_file
from alibi_jax.run import completed, train_short_test_long
from alibi_jax.sharding import make_mesh
from alibi_jax.training import loop, workdir
from alibi_jax.training.logs import Logs

RESULT = "result.json"  # there once a run has ended
FINISHED = "finished"


class Cost(NamedTuple):
    """What a training step takes."""

    parameters: int
    memory_bytes: int | None  # of one device: state, batch and temporaries; None: not known


def cost(config: Config, vocab_size: int) -> Cost:
    """Compiles the training step and asks XLA; raises UserError for a model that cannot be.

    One that does not fit in memory as it is compiled has a cost all the same: its run says so.
    """
    mesh = make_mesh(config.mesh)
    with jax.set_mesh(mesh):
        lowered = loop.lower_step(completed(trained(config), vocab_size), mesh)
    try:
        memory = lowered.step.compile().memory_analysis()
    except jax.errors.JaxRuntimeError as error:
        if not backend.is_out_of_memory(error):
            raise
        memory = None
    return Cost(
        parameters=sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(lowered.state.params)),
        memory_bytes=memory
        and memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
        + memory.temp_size_in_bytes,
    )


def recall(config: Config, directory: Path, protocols: Sequence[str]) -> Run | None:
    """The run that ended in `directory`; None if none has, or some protocol is still wanted of it.

    Args:
      config: of its method.
      directory: the run's.
      protocols: those wanted, of `assess.PROTOCOLS`.
    """
    path = directory / RESULT
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
        if result["status"] != FINISHED:
            return Run(**result, evaluation=None)
        path = numbers_file(directory, config)
        evaluation = json.loads(path.read_text(encoding="utf-8"))
        known = all(_has(evaluation, name) for name in protocols)
        return Run(**result, evaluation=evaluation) if known else None
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(
            f"{path} cannot be read ({error}): remove {directory / RESULT}, and the run goes on "
            "from its last checkpoint"
        ) from error


def _has(evaluation: Mapping[str, Any], protocol: str) -> bool:
    """Whether an evaluation holds a protocol, or says that its data cannot serve it."""
    left_out = f"{protocol} left out: "
    return protocol in evaluation["protocols"] or any(
        line.startswith(left_out) for line in evaluation["left_out"]
    )


def perform(
    config: Config, directory: Path, protocols: Sequence[str], cost: Cost, bar: tqdm.tqdm
) -> Run | None:
    """Trains and evaluates a run, or goes on with it, and keeps how it ended.

    One that has finished is evaluated only: by more protocols, or with positions scaled otherwise.

    Args:
      config: the run's, as it is evaluated.
      directory: the run's.
      protocols: some of `assess.PROTOCOLS`.
      cost: of its method.
      bar: counts the steps of all runs, and says when one is evaluated.

    Returns:
      The run: finished, diverged, or out of memory, which is not kept, so that the next time tries
      again. None: stopped by a signal, all saved.
    """
    run = recall(config, directory, protocols)  # a method that shares its training has just ended
    if run is not None:
        return run
    status, message, evaluation = FINISHED, None, None
    try:
        if not (directory / RESULT).exists():
            outcome = train_short_test_long(trained(config), directory, bar=bar, test_long=False)
            if not outcome.complete:
                return None
        scaling = {
            "model.length_scaling": config.model.length_scaling,
            "model.scaling_factor": str(config.model.scaling_factor),
        }
        bar.set_postfix_str("evaluating")
        evaluation = evaluate_run(directory, wanted=protocols, overrides=scaling)
    except loop.Diverged as error:
        status, message = "diverged", str(error).partition(": stopped")[0]
    except jax.errors.JaxRuntimeError as error:
        if not backend.is_out_of_memory(error):
            raise
        status, message = "out of memory", str(error).splitlines()[0]
    result = {
        "status": status,
        "message": message,
        **_seconds_per_step(directory),
        **cost._asdict(),
    }
    if status in (FINISHED, "diverged"):
        with workdir.writing(directory):
            write_json(result, directory / RESULT)
    gc.collect()  # the state of the run goes before that of the next comes
    return Run(**result, evaluation=evaluation)


def _seconds_per_step(directory: Path) -> dict[str, Any]:
    """The median of the steps of a run and the range that 80% of them lie in; None without any.

    Both are of the intervals of metrics.jsonl, by their median step; without the first, in which
    caches fill, if there are others.
    """
    path = directory / Logs.METRICS
    lines = map(json.loads, path.read_text(encoding="utf-8").splitlines() if path.exists() else [])
    times = [line["step_seconds_p50"] for line in lines if "step_seconds_p50" in line]
    if not times:
        return {"seconds_per_step": None, "seconds_per_step_range": None}
    low, median, high = np.percentile(times[1:] or times, (10, 50, 90)).tolist()
    return {"seconds_per_step": median, "seconds_per_step_range": [low, high]}
