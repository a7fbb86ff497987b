"""One run, from its config to its numbers: train short, then test long.

`train.py` is the command around `train_short_test_long`; `alibi compare` calls it for every run.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import tqdm

from alibi_jax import backend, data, distributed, evaluation
from alibi_jax.config import Config
from alibi_jax.errors import require
from alibi_jax.sharding import make_mesh, to_devices, to_host
from alibi_jax.training import compilation_cache, goodput, loop, profiling, workdir
from alibi_jax.training.resolved import resolved


class Outcome(NamedTuple):
    """What became of a run."""

    step: int  # optimizer steps taken
    complete: bool  # False: stopped by a signal, with all saved
    summary: dict[str, Any] | None  # of extrapolation.json, if it is complete and was tested
    spent: dict[str, Any]  # of goodput.json


def train_short_test_long(
    config: Config,
    directory: Path,
    *,
    profile: str | None = None,
    bar: tqdm.tqdm | None = None,
    test_long: bool = True,
    say: Callable[[str], object] = lambda text: None,
) -> Outcome:
    """Trains, evaluates beyond the training length and writes `extrapolation.json` and `.png`.

    Everything that can be wrong is checked before anything is trained. A directory that holds the
    run already goes on where it was.

    Args:
      config: the run's.
      directory: the run's, made if it does not exist.
      profile: "START:STOP", the steps to trace; None: none.
      bar: counts the steps of several runs; None: one of this run's own is shown.
      test_long: False: only trains.
      say: called with what was left out and what the run resolved to, for a person to read.

    Returns:
      The same on every process; files are written by the first.

    Raises:
      UserError: something given cannot work, in one line.
      loop.Diverged: the loss is nan or infinite.
    """
    # Check.
    clock = goodput.Clock()
    config.validate(backend.device_count(), test_long=test_long)
    traced = profiling.NEVER
    if profile is not None:
        traced = profiling.parse_steps(profile, config.training.num_steps)
    workdir.check_usable(directory)
    corpus = distributed.main_first(lambda: data.load_corpus(config.data))
    config = completed(config, corpus.tokenizer.vocab_size)
    held_out = getattr(corpus, config.evaluation.split)
    lengths, note = evaluation.supported_lengths(
        held_out,
        config.evaluation.lengths(config.data.sequence_length),
        config.data.packing,
    )
    if note:
        say(note)
    loop.check_data(config, corpus)
    stream = data.stream_identity(
        fingerprint=corpus.fingerprint,
        sequence_length=config.data.sequence_length,
        batch_size=config.data.batch_size,
        seed=config.training.seed,
        packing=config.data.packing,
    )

    mesh = make_mesh(config.mesh)
    with jax.set_mesh(mesh), workdir.locked(directory):
        workdir.claim(directory, config, stream)
        # Train short.
        compilation_cache.use(directory)
        with clock.spend("compile"):
            program = loop.compile_program(config, mesh)
        say(resolved(config, corpus, mesh, program))
        distributed.wait_for_all()
        state, complete = loop.train(
            config, corpus, program, directory, clock=clock, profile=traced, bar=bar
        )
        if not complete or not test_long:
            return Outcome(int(state.step), complete, None, clock.record())

        # Test long.
        windows = evaluation.longest_windows(
            held_out,
            longest=lengths[-1],
            num_windows=config.evaluation.num_windows,
            packing=config.data.packing,
        )
        with clock.spend("evaluation"):
            losses = evaluation.evaluate(
                lambda tokens: to_host(
                    program.loss_fn(
                        state.params, to_devices(tokens, program.batch_sharding, len(tokens))
                    )
                ),
                windows,
                lengths,
                tokens_per_batch=config.evaluation.tokens_per_batch,
                batch_multiple=mesh.shape["data"] * mesh.shape["fsdp"],
            )
            overlap = evaluation.training_overlap(
                corpus.train.tokens, windows.tokens, windows.bytes_per_token()
            )
            ngrams = evaluation.ngram_losses(
                corpus.train.tokens, windows.tokens, corpus.tokenizer.vocab_size
            )

        # Report.
        summary = evaluation.summarize(
            losses,
            ngrams,
            windows,
            overlap,
            train_length=config.data.sequence_length,
            num_targets=config.evaluation.num_targets,
            tokenizer=corpus.tokenizer,
            num_bootstrap=config.evaluation.num_bootstrap,
            left_out=[note] if note else [],
        )
        summary |= {"config": config.to_dict(), "versions": evaluation.versions()}
        if distributed.is_main():
            title = f"{config.model.position}, trained at {config.data.sequence_length} tokens"
            with workdir.writing(directory):
                evaluation.write_json(summary, directory / "extrapolation.json")
                evaluation.extrapolation_figure(summary, directory / "extrapolation.png", title)
        with workdir.writing(directory):
            return Outcome(int(state.step), True, summary, clock.write(directory))


def completed(config: Config, vocab_size: int) -> Config:
    """The config with what only the data say: the sizes of the vocabulary and of training rows."""
    given = config.model.vocab_size
    require(
        given is None or given >= vocab_size,
        f"config.model.vocab_size={given} is less than the tokenizer's {vocab_size}: leave it out",
    )
    model = dataclasses.replace(config.model, vocab_size=given or vocab_size)
    return dataclasses.replace(config, model=model).with_trained_length()
