"""Train position methods side by side, test them beyond their training length, and compare.

  alibi compare --config=configs/NAME.py[:VARIANT] --methods=alibi,rotary,... --workdir=DIR
                [--seeds=3] [--protocols=NAME,...] [--config.SECTION.FIELD=VALUE ...]

Every method is trained at the one budget of the config, once with each seed. A seed fixes the
initial parameters and the order of the data; parameters that methods share start equal to the last
bit. Every run is then evaluated on the same held-out tokens at every length. Methods take turns:
all of them have run with one seed before any does with the next.

--methods  names of position methods with commas between. Other fields of config.model are set with
           +FIELD=VALUE, or +FIELD for +FIELD=true:
             alibi,alibi+sink,alibi+learned_slopes,alibi+alibi_heads=4,rotary
           length_scaling and scaling_factor are of inference, so methods that differ in these
           alone are trained once, and evaluated with each:
             rotary,rotary+length_scaling=yarn+scaling_factor=8
           "alibi", or else the first, is the reference that the others are compared with.
--seeds    runs of each method. Their seeds count up from config.training.seed of the file.
--protocols
           how runs are evaluated, as of `alibi eval`; all of its protocols if left out, which may
           take longer than the training. nonoverlapping and fixed_targets are always among them.
--workdir  holds the runs in DIR/METHOD/seed-N, where METHOD is without fields of inference, which
           `alibi eval` and `alibi report` read as they do those of train.py, and the results:
             comparison.md    tables: mean and interval over seeds, paired differences to the
                              reference, verdicts, parameters, time and memory a step
             comparison.png   bits per byte against length, one line a method, one panel a protocol
             comparison.json  all numbers; "meanings" says what each is
           They are written again after every run, and say what is still missing.

The same command goes on where it was stopped or killed, to the same numbers. Methods, seeds and
protocols may be added to a DIR later: runs that lack a protocol are evaluated again, not trained.
Anything else that differs from what it holds is refused. A run whose loss is not finite is reported
as diverged, one that does not fit as out of memory, and the others go on. On Ctrl-C the run is
saved first.
"""

import contextlib
import json
import signal
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import tqdm
from jax.experimental.compilation_cache.compilation_cache import reset_cache

from alibi_jax import backend, data
from alibi_jax.cli import STOPPED, below, parse_flags
from alibi_jax.errors import UserError, require
from alibi_jax.evaluation import compare_runs
from alibi_jax.evaluation.assess import PROTOCOLS as ALL_PROTOCOLS
from alibi_jax.evaluation.compare_figure import comparison_figure
from alibi_jax.evaluation.compare_methods import Method, parse_methods, with_seed
from alibi_jax.evaluation.compare_summary import PROTOCOLS, Run, summarize
from alibi_jax.evaluation.compare_table import comparison_table
from alibi_jax.evaluation.report import versions, write_json
from alibi_jax.evaluation.run import numbers_file, parse_protocols
from alibi_jax.evaluation.windows import supported_lengths
from alibi_jax.files import given_path, write_text
from alibi_jax.training import compilation_cache, loop, workdir

ARGUMENTS = "arguments.json"  # of the comparison that a directory holds

_FLAGS = ("--config", "--methods", "--seeds", "--protocols", "--workdir", "--config.")
_MOST_SEEDS = 1000


def main(arguments: list[str]) -> int:
    """Exit code: 0 done; 130 stopped by a signal, all saved. Raises UserError for bad input."""
    flags = parse_flags(arguments, _FLAGS)
    for name in ("--config", "--methods", "--workdir"):
        require(
            bool(flags.get(name)),
            f"{name} is missing: give --config=FILE, --methods=METHOD,... and --workdir=DIR",
        )
    methods = parse_methods(flags["--methods"], flags["--config"], below("--config.", flags))
    seeds = flags.get("--seeds", "3")
    require(
        seeds.isdecimal() and 1 <= int(seeds) <= _MOST_SEEDS,
        f"--seeds={seeds}: a number of runs from 1 to {_MOST_SEEDS}",
    )
    protocols = parse_protocols(flags.get("--protocols"))
    directory = given_path("--workdir", flags["--workdir"])
    try:
        with _insistent_signals():
            complete = compare(methods, int(seeds), protocols, directory)
    except KeyboardInterrupt:
        complete = False
    if not complete:
        print("stopped; the same command goes on from there")
        return STOPPED
    names = ", ".join(str(directory / f"comparison.{kind}") for kind in ("md", "png", "json"))
    print(f"{(directory / 'comparison.md').read_text(encoding='utf-8')}\n{names}")
    return 0


def compare(
    methods: Sequence[Method], num_seeds: int, protocols: Sequence[str], directory: Path
) -> bool:
    """Trains, evaluates and compares methods in `directory`, or goes on with that.

    Args:
      methods: from `parse_methods`.
      num_seeds: runs of each.
      protocols: of `assess.PROTOCOLS`, beside those of the table.
      directory: of the comparison; made if it does not exist.

    Returns:
      Whether it is complete: False if a signal stopped a run, with all saved.

    Raises:
      UserError: something given cannot work; whatever can be is checked before anything is trained.
    """
    protocols = [name for name in ALL_PROTOCOLS if name in (*PROTOCOLS, *protocols)]
    for method in methods:
        method.config.validate(backend.device_count(), test_long=False)
    workdir.check_usable(directory)
    base = methods[0].config
    corpus = data.load_corpus(base.data)
    loop.check_data(base, corpus)
    _, note = supported_lengths(
        getattr(corpus, base.evaluation.split),
        base.evaluation.lengths(base.data.sequence_length),
        base.data.packing,
    )
    if note:
        print(note, flush=True)
    num_steps, seeds = base.training.num_steps, [base.training.seed + i for i in range(num_seeds)]
    planned = [(method, seed) for seed in seeds for method in methods]
    paths = {(m.name, seed): directory / m.trained_as / f"seed-{seed}" for m, seed in planned}
    with workdir.locked(directory), _compiled_once(directory):
        _claim(directory, methods, num_seeds)
        runs = {
            (m.name, seed): run
            for m, seed in planned
            if (run := compare_runs.recall(m.config, paths[m.name, seed], protocols))
        }
        summarize([m.name for m in methods], seeds, runs)  # so that no training comes before "no"
        costs: dict[str, compare_runs.Cost] = {}
        with tqdm.tqdm(
            total=len(planned) * num_steps,
            unit="step",
            smoothing=0,  # time left at the mean speed so far, with the evaluations so far
            dynamic_ncols=True,
        ) as bar:
            note = ", its evaluation not in the time left"  # until there is one to learn from
            for number, (method, seed) in enumerate(planned):
                _skip(bar, number * num_steps)
                if (method.name, seed) in runs:
                    continue
                what = f"{method.name} seed {seed} ({number + 1}/{len(planned)})"
                bar.set_description(what + note)
                if method.trained_as not in costs:
                    vocab_size = corpus.tokenizer.vocab_size
                    costs[method.trained_as] = compare_runs.cost(method.config, vocab_size)
                run = compare_runs.perform(
                    with_seed(method.config, seed),
                    paths[method.name, seed],
                    protocols,
                    costs[method.trained_as],
                    bar,
                )
                if run is None:
                    return False
                if run.evaluation is not None:
                    note = ""
                    # Steps of one that was evaluated only count, or its time would not.
                    bar.update((number + 1) * num_steps - bar.n)
                bar.write(f"{what}: {run.message or run.status}")
                runs[method.name, seed] = run
                _write(directory, methods, seeds, runs)
            _skip(bar, len(planned) * num_steps)
        _write(directory, methods, seeds, runs)
    return True


@contextlib.contextmanager
def _insistent_signals() -> Iterator[None]:
    """Ctrl-C and SIGTERM raise KeyboardInterrupt, and again each second until this ends.

    Callbacks of weak references, which JAX makes many of, and bare `except` swallow it. The
    training loop has a handler of its own, which saves the run.
    """

    def handle(number: int, frame: Any) -> None:
        signal.signal(signal.SIGALRM, lambda *_: signal.raise_signal(number))
        signal.setitimer(signal.ITIMER_REAL, 1.0)
        raise KeyboardInterrupt

    def unraisable(what: Any) -> None:
        if what.exc_type is not KeyboardInterrupt:  # it comes again: nothing to tell
            hook(what)

    hook, sys.unraisablehook = sys.unraisablehook, unraisable
    numbers = [signal.SIGTERM, signal.SIGINT]
    heard = [n for n in numbers if signal.getsignal(n) != signal.SIG_IGN]  # a job in the background
    previous = {number: signal.signal(number, handle) for number in heard}
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        sys.unraisablehook = hook
        for number, handler in previous.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _compiled_once(directory: Path) -> Iterator[None]:
    """Keeps compiled programs, which are the same for all seeds of a method.

    On a CPU, whose code another processor may not run, only until this process ends.
    """
    compilation_cache.use(directory)
    with tempfile.TemporaryDirectory() as folder:
        temporary = compilation_cache.directory() is None
        if temporary:
            jax.config.update("jax_compilation_cache_dir", folder)
        reset_cache()  # it looks at the directory once
        try:
            yield
        finally:
            if temporary:
                jax.config.update("jax_compilation_cache_dir", None)
                reset_cache()


def _skip(bar: tqdm.tqdm, step: int) -> None:
    """Sets the bar to a step of the job that was not taken now, so it does not count as speed."""
    bar.initial += step - bar.n
    bar.n = step


def _write(
    directory: Path,
    methods: Sequence[Method],
    seeds: Sequence[int],
    runs: Mapping[tuple[str, int], Run],
) -> None:
    """Writes the numbers, the tables and the figure of the runs that ended so far."""
    comparison = summarize([method.name for method in methods], seeds, runs)
    for method, entry in zip(methods, comparison["methods"], strict=True):
        numbers = numbers_file(directory, method.config).name
        entry |= {"directory": method.trained_as, "evaluation": numbers}
    comparison |= {"config": methods[0].config.to_dict(), "versions": versions()}
    with workdir.writing(directory):
        write_json(comparison, directory / "comparison.json")
        write_text(directory / "comparison.md", comparison_table(comparison))
        comparison_figure(comparison, directory / "comparison.png")


def _claim(directory: Path, methods: Sequence[Method], num_seeds: int) -> None:
    """Writes what is compared, or checks that `directory` holds the same, or part of it."""
    path, here = directory / ARGUMENTS, f"--workdir={directory} holds"
    record = {
        "methods": {method.name: method.config.to_dict() for method in methods},
        "seeds": num_seeds,
    }
    record = json.loads(json.dumps(record))
    if path.exists():
        there = _read(path)
        for name, config in there["methods"].items():
            require(
                name in record["methods"],
                f"{here} a comparison with {name}, which --methods leaves out: name it as well, or "
                "choose another directory",
            )
            for section, field, value in _fields(record["methods"][name]):
                # Not the default of a field newer than DIR: methods could begin otherwise now.
                before = config.get(section, {}).get(field)
                require(
                    before == value,
                    f"{here} a comparison with config.{section}.{field}={before}, this one has "
                    f"{value}: choose another directory, or the same value to go on",
                )
        require(
            num_seeds >= there["seeds"],
            f"{here} a comparison of {there['seeds']} seeds, this one has --seeds={num_seeds}: "
            "give at least as many, or choose another directory",
        )
    else:
        require(
            not (directory / workdir.CONFIG).exists(),
            f"{here} a run of train.py: choose another directory",
        )
    with workdir.writing(directory):
        write_text(path, json.dumps(record, indent=2) + "\n")


def _read(path: Path) -> dict[str, Any]:
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        if record["methods"].keys() and record["seeds"] >= 1:
            return record
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        pass
    raise UserError(
        f"--workdir={path.parent}: {path.name} there is damaged or not of this program: choose "
        "another directory"
    )


def _fields(config: Mapping[str, Any]) -> Iterator[tuple[str, str, Any]]:
    for section, values in config.items():
        for field, value in values.items():
            yield section, field, value
