"""What a report is made of: the files that runs and comparisons leave in their directories."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from alibi_jax.errors import UserError, require

EVALUATION, EXTRAPOLATION = "evaluation.json", "extrapolation.json"
CONFIG, METRICS = "config.json", "metrics.jsonl"
COMPARISON, ARGUMENTS = "comparison.json", "arguments.json"

Json = dict[str, Any]


class Run(NamedTuple):
    """One training run; what its directory lacks is None, or empty."""

    name: str
    group: str  # what it shares a colour with: the method, in a comparison
    directory: Path
    evaluation: Json | None
    config: Json | None
    metrics: Sequence[Json]
    missing: Sequence[str]


class Comparison(NamedTuple):
    """Several methods and seeds, and the runs that are still there."""

    name: str
    directory: Path
    numbers: Json
    configs: dict[str, Json]  # by method
    runs: Sequence[Run]


def read(directories: Sequence[Path]) -> tuple[list[Run], list[Comparison]]:
    """Read runs and comparisons, each under a name of its own.

    Args:
        directories: Of runs (`train.py`, `alibi eval`) or comparisons (`alibi compare`).

    Returns:
        The runs and the comparisons, in the order given.

    Raises:
        UserError: A directory holds neither, or a file in it cannot be read.
    """
    runs, comparisons = [], []
    for directory, name in zip(directories, _names(directories), strict=True):
        require(directory.is_dir(), f"{directory}: no such directory")
        if (directory / COMPARISON).exists():
            comparisons.append(_comparison(directory, name))
            continue
        require(
            any((directory / file).exists() for file in (EVALUATION, EXTRAPOLATION, CONFIG)),
            f"{directory} holds neither a run nor a comparison: there is none of {EVALUATION}, "
            f"{EXTRAPOLATION}, {CONFIG} and {COMPARISON}; give the --workdir of train.py or of "
            "`alibi compare`",
        )
        runs.append(_run(directory, name, name))
        for file in sorted(directory.glob("evaluation-*.json")):  # positions scaled at inference
            if ".old" not in file.name:
                scaled = name + file.stem.removeprefix("evaluation")
                runs.append(_run(directory, scaled, scaled, file.name)._replace(metrics=()))
    return runs, comparisons


def _names(directories: Sequence[Path]) -> list[str]:
    """The shortest ends of the paths that tell them apart."""
    parts = [directory.resolve().parts for directory in directories]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(path[-length:]) for path in parts]
        if len(set(names)) == len(names):
            return names
    raise UserError("a directory is given twice: name each once")


def _comparison(directory: Path, name: str) -> Comparison:
    numbers = _json(directory / COMPARISON)
    arguments = _json(directory / ARGUMENTS) if (directory / ARGUMENTS).exists() else {}
    # A file of an earlier version names neither directories nor evaluations.
    runs = [
        _run(path, f"{name} {path.name}", name, method.get("evaluation", EVALUATION))
        for method in numbers.get("methods", [])
        for name in [method["name"]]
        for path in sorted((directory / method.get("directory", name)).glob("seed-*"), key=_seed)
    ]
    return Comparison(name, directory, numbers, arguments.get("methods", {}), runs)


def _seed(path: Path) -> tuple[int, str]:
    number = path.name.removeprefix("seed-")
    return (int(number) if number.isdecimal() else 0, number)


def _run(directory: Path, name: str, group: str, evaluated: str = EVALUATION) -> Run:
    found = {
        file: _json(directory / file)
        for file in (evaluated, EXTRAPOLATION, CONFIG)
        if (directory / file).exists()
    }
    # Never both: they may be of other steps, windows and settings.
    evaluation = found.get(evaluated, found.get(EXTRAPOLATION))
    config = found.get(CONFIG, {}).get("config") or (evaluation or {}).get("config")
    metrics = _metrics(directory / METRICS)
    absent = {
        f"{evaluated} (made by `alibi eval`)": evaluated not in found,
        f"{EXTRAPOLATION} (made at the end of training)": evaluation is None,
        CONFIG: CONFIG not in found,
        METRICS: not metrics,
    }
    missing = [file for file, lacks in absent.items() if lacks]
    return Run(name, group, directory, evaluation, config, metrics, missing)


def _json(path: Path) -> Json:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {error}") from error
    require(isinstance(value, dict), f"cannot read {path}: it holds no JSON object")
    return value


def _metrics(path: Path) -> list[Json]:
    """The lines of a file that may be missing, or torn where a process was killed."""
    try:
        written = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    entries = []
    for line in written:
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if isinstance(entry, dict) and "step" in entry:
            entries.append(entry)
    return entries
