"""What longer inputs buy a trained model: every protocol, and a verdict.

  alibi eval --workdir=DIR [--protocols=NAME,...] [--lengths=N,...]
             [--config.evaluation.FIELD=VALUE ...] [--config.data.source=SOURCE]

Evaluates the newest checkpoint of a run of train.py on its own held-out text, writes
DIR/evaluation.json and DIR/evaluation.png and prints the numbers and a verdict: to which length the
loss holds, to which it uses context, and from how far back it retrieves.

  --protocols=NAME,...  some of nonoverlapping, fixed_targets, sliding_window, by_position,
                        truncated_input, truncation, attention_mass, needle, recall; all of them if
                        left out
  --lengths=N,...       window lengths in tokens, each a multiple of the one before, the first of
                        the training length; if left out, config.evaluation.multiples of that
  --config.evaluation.FIELD=VALUE
                        in place of what the run was trained with; tokens_per_batch bounds memory,
                        num_windows and num_trials decide how long it takes
  --config.data.source=SOURCE, --config.data.cache_dir=DIR
                        where the same text is now, if it has moved

It runs on one device. Windows longer than tokens_per_batch go through in chunks, with cached keys.
"""

import difflib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax

from alibi_jax import data
from alibi_jax.cli import below, parse_flags
from alibi_jax.config import Config, from_dict, override
from alibi_jax.errors import UserError, require
from alibi_jax.evaluation.assess import PROTOCOLS, assess
from alibi_jax.evaluation.config import check_chain
from alibi_jax.evaluation.model import make_scorer, restore_decoder
from alibi_jax.evaluation.panels import evaluation_figure
from alibi_jax.evaluation.report import versions, write_json
from alibi_jax.evaluation.tables import evaluation_table
from alibi_jax.training import compilation_cache, workdir

FLAGS = (
    "--workdir",
    "--protocols",
    "--lengths",
    "--config.evaluation.",
    "--config.data.source",
    "--config.data.cache_dir",
)
NUMBERS, FIGURE = "evaluation.json", "evaluation.png"


def evaluate_run(
    directory: Path,
    *,
    wanted: Sequence[str] = PROTOCOLS,
    lengths: Sequence[int] | None = None,
    overrides: dict[str, str] | None = None,
    say: Callable[[str], object] = lambda text: None,
) -> dict[str, Any]:
    """Evaluate a trained run and write `evaluation.json` and `evaluation.png` in its directory.

    Args:
        directory: What train.py was given as --workdir.
        wanted: Some of `PROTOCOLS`.
        lengths: Tokens per window, each a multiple of the one before; None: those of the config.
        overrides: Fields of the config by name, as "evaluation.num_windows".
        say: Called with a line for what is left out and why, for a person to read.

    Returns:
        What evaluation.json holds.

    Raises:
        UserError: The directory holds no run that can be evaluated, or a value cannot work.
    """
    config, stream = read_run(directory)
    config = override(config, overrides or {})
    lengths = check_lengths(config, lengths)
    workdir.check_usable(directory)
    corpus = data.load_corpus(config.data)
    require(
        corpus.fingerprint == stream["corpus"],
        f"--workdir={directory} holds a run on other text than config.data.source="
        f"{config.data.source!r} has now: bring that back, or say where it is with "
        "--config.data.source",
    )
    with workdir.locked(directory):
        compilation_cache.use(directory)
        decoder, step, unreadable = restore_decoder(directory / workdir.CHECKPOINTS, config)
        for path, reason in unreadable.items():
            say(f"a damaged checkpoint is now {path} ({reason}): evaluating step {step}")
        found = assess(
            make_scorer(decoder, config.evaluation.tokens_per_batch),
            getattr(corpus, config.evaluation.split),
            corpus.tokenizer,
            config.evaluation,
            train_length=config.data.sequence_length,
            lengths=lengths,
            packing=config.data.packing,
            wanted=wanted,
            say=say,
        )
        found |= {"step": step, "config": config.to_dict(), "versions": versions()}
        with workdir.writing(directory):
            write_json(found, directory / NUMBERS)
            title = f"{config.model.position}, trained at {config.data.sequence_length} tokens"
            evaluation_figure(found, directory / FIGURE, title)
    return found


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
        record = json.loads(path.read_text())
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
    directory = Path(flags["--workdir"]).expanduser()
    try:
        found = evaluate_run(
            directory,
            wanted=parse_protocols(flags.get("--protocols")),
            lengths=parse_lengths(flags.get("--lengths")),
            overrides=below("--config.", flags),
            say=lambda text: print(text, flush=True),
        )
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise UserError(
            "out of memory on the device: lower --config.evaluation.tokens_per_batch or shorten "
            "--lengths"
        ) from error
    print(f"\n{evaluation_table(found)}")
    print(f"\nfigure {directory / FIGURE}, numbers {directory / NUMBERS}")
    return 0


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
        all(word.isascii() and word.isdecimal() and int(word) > 0 for word in words),
        f"--lengths={text}: must be whole numbers of tokens with commas between, such as 128,1024",
    )
    return tuple(map(int, words))
