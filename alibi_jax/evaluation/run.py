"""What longer inputs buy a trained model: every protocol, and a verdict.

  alibi eval --workdir=DIR [--step=N|best] [--protocols=NAME,...] [--lengths=N,...]
             [--config.evaluation.FIELD=VALUE ...] [--config.data.source=SOURCE]

Evaluates the newest checkpoint of a run of train.py on its own held-out text, writes
DIR/evaluation.json and DIR/evaluation.png and prints the numbers and a verdict: to which length the
loss holds, to which it uses context, and from how far back it retrieves. A model whose loss is not
clearly below that of n-grams of its training text, n up to 3, learned too little for one. The run
may still be training.

  --step=N, --step=best the checkpoint of a step, or that of the lowest validation loss, which
                        config.training.keep_best=true keeps; such numbers go into files of their
                        own, evaluation-step-N.json and .png
  --protocols=NAME,...  some of nonoverlapping, fixed_targets, sliding_window, by_position,
                        truncated_input, truncation, attention_mass, needle, recall; all of them if
                        left out
  --lengths=N,...       window lengths in tokens, each a multiple of the one before, the first of
                        the training length; if left out, config.evaluation.multiples of that
  --config.evaluation.FIELD=VALUE
                        in place of what the run was trained with; tokens_per_batch bounds memory,
                        num_windows and num_trials decide how long it takes
  --config.model.length_scaling=NAME, --config.model.scaling_factor=FACTOR
                        scale positions at inference, as DecoderConfig says; such numbers go into
                        files of their own, such as evaluation-yarn-8.json and .png
  --config.data.source=SOURCE, --config.data.cache_dir=DIR
                        where the same text is now, if it has moved

Numbers are written after every protocol. Those that are there of the same checkpoint with the same
settings are kept, and only what is missing is measured: so the same command goes on where it was
stopped, and protocols can be added. Numbers with other settings, or of an earlier checkpoint, are
renamed, never overwritten.

It runs on one device. Windows longer than tokens_per_batch go through in chunks, with cached keys.
"""

import difflib
import itertools
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jax

from alibi_jax import backend, data
from alibi_jax.cli import below, parse_flags
from alibi_jax.config import Config, from_dict, override
from alibi_jax.errors import UserError, require
from alibi_jax.evaluation.assess import PROTOCOLS, assess
from alibi_jax.evaluation.config import check_chain
from alibi_jax.evaluation.model import make_scorer, restore_decoder
from alibi_jax.evaluation.panels import evaluation_figure
from alibi_jax.evaluation.report import versions, write_json
from alibi_jax.evaluation.tables import evaluation_table
from alibi_jax.evaluation.windows import supported_lengths
from alibi_jax.files import given_path
from alibi_jax.training import checkpoint, compilation_cache, workdir

FLAGS = (
    "--workdir",
    "--step",
    "--protocols",
    "--lengths",
    "--config.evaluation.",
    "--config.model.length_scaling",
    "--config.model.scaling_factor",
    "--config.data.source",
    "--config.data.cache_dir",
)
# Fields of the config that no number depends on, apart from how far attention can be read at once:
# `assess` sees to that itself.
_OF_NO_NUMBER = {
    "data": ("source", "cache_dir"),
    "evaluation": ("multiples", "tokens_per_batch"),  # "lengths" holds what comes of multiples
}


def evaluate_run(
    directory: Path,
    *,
    step: int | Literal["best"] | None = None,
    wanted: Sequence[str] = PROTOCOLS,
    lengths: Sequence[int] | None = None,
    overrides: dict[str, str] | None = None,
    say: Callable[[str], object] = lambda text: None,
) -> dict[str, Any]:
    """Evaluate a trained run and write its numbers and figure in its directory.

    Args:
        directory: What train.py was given as --workdir.
        step: Of the checkpoint; "best": of that with the lowest validation loss; None: the newest.
        wanted: Some of `PROTOCOLS`.
        lengths: Tokens per window, each a multiple of the one before; None: those of the config.
        overrides: Fields of the config by name, as "evaluation.num_windows".
        say: Called with a line for what is left out and why, for a person to read.

    Returns:
        What `numbers_file` now holds: also what was measured before with the same settings.

    Raises:
        UserError: The directory holds no run that can be evaluated, or a value cannot work.
    """
    config, stream = read_run(directory)
    config = override(config, overrides or {})
    config.model.validate()
    lengths = check_lengths(config, lengths)
    backend.device_count()
    workdir.check_usable(directory)
    corpus = data.load_corpus(config.data)
    advice = "bring that back, or say where it is with --config.data.source"
    if "data.source" in (overrides or {}):
        advice = "it has to be a copy, byte for byte, of what the run was trained on"
    elif config.data.source == "stdlib":
        advice = "these are the sources of the running Python: use that of the training"
    require(
        corpus.fingerprint == stream["corpus"],
        f"--workdir={directory} holds a run on other text than config.data.source="
        f"{config.data.source!r} has now, or of a version that tokenized it otherwise: {advice}",
    )
    held_out = getattr(corpus, config.evaluation.split)
    checkpoints = directory / workdir.CHECKPOINTS
    given = best_step(checkpoints, config) if step == "best" else step
    path = numbers_file(directory, config, given)
    with workdir.locked(directory, workdir.EVALUATION_LOCK):
        compilation_cache.use(directory)
        decoder, step, unreadable = restore_decoder(checkpoints, config, given)
        for damaged, reason in unreadable.items():
            say(f"{damaged} is damaged ({reason}): evaluating step {step}")
        num_steps = config.training.num_steps
        if step < num_steps:
            unfinished = "" if given else ": the run is unfinished"
            say(f"evaluating step {step} of {num_steps}{unfinished}")
        identity = {"step": step, "config": config.to_dict(), "versions": versions()}
        kept, _ = supported_lengths(held_out, lengths, config.data.packing)
        earlier = _read_numbers(path)
        settings = _settings(identity | {"lengths": list(kept)})
        if path.exists() and (earlier is None or _settings(earlier) != settings):
            say(f"{path.name} is not of these settings: renamed to {_rename(path).name}")
            earlier = None

        def keep(found: dict[str, Any]) -> None:
            with workdir.writing(directory):
                write_json(found | identity, path)

        found = assess(
            make_scorer(decoder, config.evaluation.tokens_per_batch),
            held_out,
            corpus.train.tokens,
            corpus.tokenizer,
            config.evaluation,
            train_length=config.data.sequence_length,
            lengths=lengths,
            packing=config.data.packing,
            wanted=wanted,
            earlier=earlier,
            keep=keep,
            say=say,
        )
        found |= identity
        title = f"{config.model.position}{_scaling(config)}"
        title += f", trained at {config.data.sequence_length} tokens"
        with workdir.writing(directory):
            write_json(found, path)
            evaluation_figure(found, path.with_suffix(".png"), title)
    return found


def best_step(checkpoints: Path, config: Config) -> int:
    """The step of the lowest validation loss; UserError if the run does not keep it."""
    losses = checkpoint.validation_losses(checkpoint.metadata(checkpoints))
    require(
        bool(losses) and config.training.keep_best,
        "--step=best: the run keeps no checkpoint of the lowest validation loss: train it with "
        "config.training.keep_best=true",
    )
    return min((loss, step) for step, loss in losses.items())[1]


def numbers_file(directory: Path, config: Config, step: int | None = None) -> Path:
    """Where the evaluation of a run is: scaled positions and given steps have their own files."""
    of_step = "" if step is None else f"-step-{step}"
    return directory / f"evaluation{_scaling(config)}{of_step}.json"


def _scaling(config: Config) -> str:
    """How positions are scaled at inference: "-yarn-8", or nothing where they are not."""
    name, factor = config.model.length_scaling, config.model.scaling_factor
    if name == "none":
        return ""
    return f"-{name}" if name == "dynamic" else f"-{name}-{factor:g}"


def _settings(found: Mapping[str, Any]) -> dict[str, Any]:
    """What an evaluation depends on, apart from the text, which a run has but one of."""
    config = {
        section: {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in fields.items()
            if name not in _OF_NO_NUMBER.get(section, ())
        }
        for section, fields in found["config"].items()
    }
    versions = {name: found["versions"][name] for name in ("alibi_jax", "jax", "device")}
    return {"step": found["step"], "lengths": found["lengths"], **versions, **config}


def _read_numbers(path: Path) -> dict[str, Any] | None:
    """An earlier evaluation; None if there is none that can be read."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if _settings(found) and found["protocols"].keys() and found["verdict"].keys():
            return found
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        pass
    return None


def _rename(path: Path) -> Path:
    """Moves numbers and their figure out of the way: evaluation.json to evaluation.old1.json."""
    number = next(n for n in itertools.count(1) if not path.with_suffix(f".old{n}.json").exists())
    with workdir.writing(path.parent):
        for kind in ("png", "json"):
            file = path.with_suffix(f".{kind}")
            if file.exists():
                file.rename(path.with_suffix(f".old{number}.{kind}"))
    return path.with_suffix(f".old{number}.json")


def read_run(directory: Path) -> tuple[Config, dict[str, Any]]:
    """Return the config of a run and what identifies its data.

    Raises:
        UserError: The directory holds no run, or one that this version cannot read.
    """
    path = directory / workdir.CONFIG
    require(directory.is_dir(), f"--workdir={directory} is not a directory: give that of a run")
    require(
        path.is_file(),
        f"--workdir={directory} holds no run, which has a {workdir.CONFIG}: give what train.py was "
        "given as --workdir",
    )
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        config, stream = record["config"], record["stream"]
        if stream.keys() >= {"corpus"} and config.keys():
            return from_dict(config), stream
    except UserError as error:
        raise UserError(f"--workdir={directory}: {error}") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        pass
    raise UserError(
        f"--workdir={directory}: {workdir.CONFIG} there is damaged or not of this program: give "
        "the directory of a run"
    )


def check_lengths(config: Config, given: Sequence[int] | None) -> tuple[int, ...]:
    """Return the lengths to evaluate, from the training length on; UserError if they cannot be."""
    train_length = config.data.sequence_length
    config.evaluation.validate_counts(train_length)
    if given is None:
        config.evaluation.validate_multiples()
        return config.evaluation.lengths(train_length)
    lengths = tuple(given) if given[:1] == (train_length,) else (train_length, *given)
    check_chain("--lengths, from the training length on,", lengths)
    return lengths


def main(arguments: list[str]) -> int:
    """`alibi eval`: 0 if done."""
    flags = parse_flags(arguments, FLAGS)
    require(bool(flags.get("--workdir")), "--workdir is missing: give --workdir=DIR, that of a run")
    directory = given_path("--workdir", flags["--workdir"])
    step = parse_step(flags.get("--step"))
    try:
        found = evaluate_run(
            directory,
            step=step,
            wanted=parse_protocols(flags.get("--protocols")),
            lengths=parse_lengths(flags.get("--lengths")),
            overrides=below("--config.", flags),
            say=lambda text: print(text, flush=True),
        )
    except jax.errors.JaxRuntimeError as error:
        if not backend.is_out_of_memory(error):
            raise
        raise UserError(
            "out of memory on the device: lower --config.evaluation.tokens_per_batch or shorten "
            "--lengths"
        ) from error
    print(f"\n{evaluation_table(found)}")
    path = numbers_file(directory, from_dict(found["config"]), found["step"] if step else None)
    print(f"\nfigure {path.with_suffix('.png')}, numbers {path}")
    return 0


def parse_step(text: str | None) -> int | Literal["best"] | None:
    """The checkpoint of `--step`, None without it; UserError for what names none."""
    if text is None:
        return None
    if text == "best":
        return "best"
    require(
        re.fullmatch("0*[1-9][0-9]{0,9}", text) is not None,
        f"--step={text}: must be a number of steps, or best",
    )
    return int(text)


def parse_protocols(text: str | None) -> tuple[str, ...]:
    """The protocols of `--protocols`, all without it; UserError for one that is not known."""
    if text is None:
        return PROTOCOLS
    names = tuple(text.split(","))
    for name in names:
        close = difflib.get_close_matches(name, PROTOCOLS, n=1)
        hint = f"did you mean {close[0]}?" if close else f"there is {', '.join(PROTOCOLS)}"
        require(name in PROTOCOLS, f"--protocols={text}: {name!r} is not known: {hint}")
    return names


def parse_lengths(text: str | None) -> tuple[int, ...] | None:
    """The lengths of `--lengths`, None without it; UserError for anything but whole numbers."""
    if text is None:
        return None
    words = text.split(",")
    require(
        all(re.fullmatch("0*[1-9][0-9]{0,9}", word) for word in words),
        f"--lengths={text}: must be whole numbers of tokens, of up to ten digits, with commas "
        "between, such as 128,1024",
    )
    return tuple(map(int, words))
