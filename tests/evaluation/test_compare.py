"""The command: what it refuses, what it writes on the way, and what cannot disturb its numbers."""

import contextlib
import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from alibi_jax.errors import UserError
from alibi_jax.evaluation import compare, compare_runs
from alibi_jax.evaluation.compare_methods import parse_methods, with_seed
from alibi_jax.run import Outcome, completed
from alibi_jax.sharding import make_mesh
from alibi_jax.training import loop
from alibi_jax.training.optimizer import make_optimizer
from alibi_jax.training.state import init_state
from tests.evaluation.test_compare_summary import run as planted_run
from tests.texts import draw_words, write_texts

ROOT = pathlib.Path(__file__).parents[2]
STEPS = 40
CONFIG = """
from alibi_jax.config import Config, OptimizerConfig, TrainingConfig
from alibi_jax.data import DataConfig
from alibi_jax.evaluation import EvaluationConfig
from alibi_jax.models import DecoderConfig


def get_config():
    return Config(
        model=DecoderConfig(num_layers=1, embed_dim=16, num_heads=2),
        data=DataConfig(
            source="files:{folder}/text/{{split}}/*.txt",
            sequence_length=16,
            batch_size=8,
            cache_dir="{folder}/cache",
        ),
        optimizer=OptimizerConfig(warmup_steps=10),
        training=TrainingConfig(num_steps={steps}, checkpoint_every=10, validate_every=0),
        evaluation=EvaluationConfig(
            multiples=(1, 2, 4), num_windows=6, num_targets=8, num_bootstrap=100,
            tokens_per_batch=32,  # so the longest windows go through in two chunks
        ),
    )
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A config file and its text."""
    folder, rng = tmp_path_factory.mktemp("compare"), random.Random(0)
    (folder / "config.py").write_text(CONFIG.format(folder=folder, steps=STEPS))
    words = draw_words(rng)
    for split, count in (("train", 20), ("valid", 2), ("test", 4)):
        write_texts(folder / "text" / split, rng, words, count=count, length=400)
    return folder


def arguments(folder, workdir, *more, methods="alibi,none", seeds=2):
    return [
        f"--config={folder / 'config.py'}",
        f"--methods={methods}",
        f"--seeds={seeds}",
        f"--workdir={workdir}",
        *more,
    ]


@pytest.fixture
def performed(monkeypatch):
    """In place of training: the runs asked for, and a function that says how each ends."""
    asked, outcome = [], [lambda config: planted_run([0, 0, 0])]

    def perform(config, directory, protocols, cost, bar):
        asked.append((config.model.position, config.training.seed, directory, protocols))
        asked[-1] += ((bar.n, bar.initial, bar.desc),)
        return outcome[0](config)

    monkeypatch.setattr(compare_runs, "perform", perform)
    monkeypatch.setattr(compare_runs, "cost", lambda config, size: compare_runs.Cost(1, 1))
    return asked, outcome


@pytest.mark.parametrize(
    ("times", "median", "spread"),
    [
        ([9.0, *range(1, 12)], 6, [2, 10]),  # the first interval does not count
        ([9.0], 9, [9, 9]),  # unless it is the only one
    ],
)
def test_the_time_of_a_step_has_a_spread(tmp_path, times, median, spread):
    lines = [{"step": step, "step_seconds_p50": time} for step, time in enumerate(times)]
    lines.insert(1, {"step": 0, "validation_loss": 3.0})
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert compare_runs._seconds_per_step(tmp_path) == {
        "seconds_per_step": median,
        "seconds_per_step_range": spread,
    }


def test_all_methods_come_with_one_seed_before_any_with_the_next(folder, tmp_path, performed):
    assert compare.main(arguments(folder, tmp_path, "--protocols=truncation")) == 0
    asked, _ = performed
    assert [run[:3] for run in asked] == [
        (position, seed, tmp_path / position / f"seed-{seed}")
        for seed in (0, 1)
        for position in ("alibi", "none")
    ]
    assert {tuple(run[3]) for run in asked} == {("nonoverlapping", "fixed_targets", "truncation")}


def test_tables_and_figure_are_there_after_every_run(folder, tmp_path, performed):
    _, outcome = performed
    missing = []

    def see(config):
        path = tmp_path / "comparison.md"
        missing.append(path.read_text().count(" seed ") if path.exists() else None)
        (tmp_path / "comparison.png").unlink(missing_ok=True)
        return planted_run([0, 0, 0]) if len(missing) < 4 else None

    outcome[0] = see
    assert compare.main(arguments(folder, tmp_path)) == 130  # the fourth was stopped by a signal
    assert missing == [None, 3, 2, 1]
    comparison = json.loads((tmp_path / "comparison.json").read_text())
    assert comparison["missing"] == [{"method": "none", "seed": 1}]
    assert comparison["config"]["training"]["num_steps"] == STEPS
    assert comparison["versions"]["jax"] == jax.__version__


def test_a_signal_that_was_swallowed_comes_again(folder, tmp_path, performed):
    def swallow(config):
        with contextlib.suppress(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)
        time.sleep(30)
        raise AssertionError("it did not come again")

    performed[1][0] = swallow
    before = signal.getsignal(signal.SIGTERM)
    assert compare.main(arguments(folder, tmp_path)) == 130
    assert signal.getsignal(signal.SIGTERM) == before
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


@pytest.fixture
def begun(folder, tmp_path, performed):
    """A comparison that was stopped in its first run."""
    performed[1][0] = lambda config: None
    assert compare.main(arguments(folder, tmp_path)) == 130
    return tmp_path


@pytest.mark.parametrize(
    ("more", "changed", "words"),
    [
        (["--config.training.num_steps=50"], {}, "config.training.num_steps=40, this one has 50"),
        (["--config.evaluation.num_windows=9"], {}, "config.evaluation.num_windows=6"),
        ([], {"methods": "alibi"}, "a comparison with none, which --methods leaves out"),
        ([], {"methods": "alibi,alibi+bias_max=4"}, "a comparison with none"),
        ([], {"seeds": 1}, "a comparison of 2 seeds, this one has --seeds=1"),
        ([], {"seeds": 0}, "--seeds=0: a number of runs from 1"),
        ([], {"seeds": "many"}, "--seeds=many: a number of runs from 1"),
        (["--protocols=needles"], {}, "did you mean needle?"),
        (["--methds=alibi"], {}, "--methds is not known"),
        (["--config.model.num_heads=3"], {}, "embed_dim=16 is not a multiple of num_heads=3"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(folder, begun, performed, more, changed, words):
    before = {path: path.read_bytes() for path in begun.rglob("*") if path.is_file()}
    performed[0].clear()
    with pytest.raises(UserError) as raised:
        compare.main(arguments(folder, begun, *more, **changed))
    assert words in str(raised.value) and "\n" not in str(raised.value)
    assert not performed[0]
    assert before == {path: path.read_bytes() for path in begun.rglob("*") if path.is_file()}


@pytest.mark.parametrize("name", ["--config", "--methods", "--workdir"])
def test_what_is_missing_is_named(folder, tmp_path, name):
    given = [word for word in arguments(folder, tmp_path) if not word.startswith(name)]
    with pytest.raises(UserError, match=f"{name} is missing"):
        compare.main(given)


def test_methods_and_seeds_may_be_added(folder, begun, performed):
    asked, _ = performed
    asked.clear()
    assert compare.main(arguments(folder, begun, methods="sinusoidal,none,alibi", seeds=3)) == 130
    assert [run[0] for run in asked] == ["sinusoidal"]


def finish(directory, evaluation):
    """Leaves what a finished run does."""
    directory.mkdir(parents=True, exist_ok=True)
    result = {"status": "finished", "message": None, "seconds_per_step": 0.1}
    result |= {"parameters": 1, "memory_bytes": 1}
    (directory / "result.json").write_text(json.dumps(result))
    (directory / "evaluation.json").write_text(json.dumps(evaluation))


@pytest.mark.parametrize("left_out", [[], ["truncation left out: too short to cut"]])
def test_protocols_may_be_added(folder, begun, performed, left_out):
    """Only runs that lack one are evaluated again, unless that said why it has none."""
    asked, outcome = performed
    evaluation = planted_run([0, 0, 0]).evaluation
    for name, have in (("alibi", {"truncation": []}), ("none", {})):
        own = {"protocols": evaluation["protocols"] | have, "left_out": left_out}
        finish(begun / name / "seed-0", evaluation | own)
    outcome[0] = lambda config: planted_run([0, 0, 0])
    asked.clear()
    assert compare.main(arguments(folder, begun, "--protocols=truncation")) == 0
    missing = [("alibi", 1), ("none", 1)]
    assert [run[:2] for run in asked] == ([] if left_out else [("none", 0)]) + missing
    asked.clear()
    assert compare.main(arguments(folder, begun, "--protocols=needle")) == 0
    assert [run[:2] for run in asked] == [("alibi", 0), ("none", 0), *missing]
    assert set(asked[0][3]) == {"nonoverlapping", "fixed_targets", "needle"}


def test_runs_on_other_tokens_are_refused_before_anything_is_trained(folder, begun, performed):
    evaluation = planted_run([0, 0, 0]).evaluation
    finish(begun / "alibi" / "seed-0", evaluation)
    finish(begun / "none" / "seed-0", evaluation | {"tokens_sha256": "cd"})
    performed[0].clear()
    with pytest.raises(UserError, match="tokens_sha256 differ"):
        compare.main(arguments(folder, begun, "--protocols=fixed_targets"))
    assert not performed[0]


def test_a_step_that_does_not_fit_as_it_is_compiled_does_not_end_the_comparison(
    folder, monkeypatch
):
    (method,) = parse_methods("alibi", str(folder / "config.py"), {})
    known = compare_runs.cost(method.config, 257)
    assert known.parameters > 0 and known.memory_bytes > 0
    said = ["RESOURCE_EXHAUSTED: Out of memory", "INTERNAL: no such kernel"]

    def compile_(self, *args, **options):
        raise jax.errors.JaxRuntimeError(said.pop(0))

    monkeypatch.setattr(jax.stages.Lowered, "compile", compile_)
    assert compare_runs.cost(method.config, 257) == known._replace(memory_bytes=None)
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
        compare_runs.cost(method.config, 257)


def test_the_time_left_counts_runs_that_are_evaluated_only(folder, begun, performed):
    """The second of four is there already; none of the others takes a step."""
    asked, outcome = performed
    finish(begun / "none" / "seed-0", planted_run([0, 0, 0]).evaluation)
    outcome[0] = lambda config: planted_run([0, 0, 0])
    asked.clear()
    assert compare.main(arguments(folder, begun, "--protocols=fixed_targets")) == 0
    done = [(n, initial) for *_, (n, initial, _) in asked]
    assert done == [(0, 0), (2 * STEPS, STEPS), (3 * STEPS, STEPS)]  # steps, and those of before
    unknown = ["evaluation not in the time left" in what for *_, (_, _, what) in asked]
    assert unknown == [True, False, False]


@pytest.fixture
def pretended(monkeypatch):
    """In place of the training and the evaluation of a run: what they were given."""
    trained, evaluated, bars = [], [], []

    def train(config, directory, *, bar, test_long):
        bars.append(bar)
        trained.append((config.model.length_scaling, config.model.scaling_factor, directory))
        directory.mkdir(parents=True)
        if directory.name == "seed-1":
            raise loop.Diverged("loss is nan at step 3: stopped")
        return Outcome(STEPS, True, None, {})

    def evaluate(directory, *, wanted, overrides):
        evaluated.append((*overrides.values(), directory))
        assert bars[-1].postfix == "evaluating"
        return planted_run([0, 0, 0]).evaluation

    monkeypatch.setattr(compare_runs, "train_short_test_long", train)
    monkeypatch.setattr(compare_runs, "evaluate_run", evaluate)
    monkeypatch.setattr(compare_runs, "cost", lambda config, size: compare_runs.Cost(1, 1))
    return trained, evaluated


def test_scaled_positions_are_evaluated_in_the_run_that_trained_without(
    folder, tmp_path, pretended
):
    trained, evaluated = pretended
    methods = "alibi+length_scaling=linear+scaling_factor=4,alibi"
    assert compare.main(arguments(folder, tmp_path, methods=methods)) == 0
    run, diverged = (tmp_path / "alibi" / f"seed-{seed}" for seed in (0, 1))
    assert trained == [("none", 1.0, run), ("none", 1.0, diverged)]
    assert evaluated == [("linear", "4.0", run), ("none", "1.0", run)]
    written = json.loads((tmp_path / "comparison.json").read_text())["methods"]
    names = [(method["directory"], method["evaluation"]) for method in written]
    assert names == [("alibi", "evaluation-linear-4.json"), ("alibi", "evaluation.json")]
    for method in written:
        assert [run["status"] for run in method["runs"]] == ["finished", "diverged"]
    # Each is remembered by its own evaluation.
    numbers = planted_run([0, 0, 0]).evaluation
    (run / "evaluation-linear-4.json").write_text(json.dumps(numbers | {"protocols": {}}))
    (run / "evaluation.json").write_text(json.dumps(numbers))
    assert (
        compare.main(arguments(folder, tmp_path, "--protocols=fixed_targets", methods=methods)) == 0
    )
    assert len(trained) == 2 and evaluated[2:] == evaluated[:1]


def test_a_run_that_needs_too_much_memory_is_told_and_tried_again(folder, tmp_path, monkeypatch):
    def train(config, directory, **options):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes")

    monkeypatch.setattr(compare_runs, "train_short_test_long", train)
    (method,) = parse_methods("alibi", str(folder / "config.py"), {})
    run = compare_runs.perform(method.config, tmp_path, (), compare_runs.Cost(1, 2), None)
    assert (run.status, run.evaluation, run.parameters) == ("out of memory", None, 1)
    assert run.message == "RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes"
    assert compare_runs.recall(method.config, tmp_path, ()) is None


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("config.json", "{}", "holds a run of train.py"),
        ("arguments.json", "{", "arguments.json there is damaged"),
        ("alibi/seed-0/result.json", "{", "result.json cannot be read"),
    ],
)
def test_directories_of_something_else(folder, tmp_path, performed, name, text, words):
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=words):
        compare.main(arguments(folder, tmp_path))


def test_a_comparison_of_before_a_field_was_there(folder, tmp_path, performed):
    """Other methods could begin from other parameters than those that are there."""
    assert compare.main(arguments(folder, tmp_path)) == 0
    path = tmp_path / "arguments.json"
    record = json.loads(path.read_text())
    for config in record["methods"].values():
        del config["training"]["keep_best"]
    path.write_text(json.dumps(record))
    with pytest.raises(UserError, match="keep_best=None, this one has False: choose another"):
        compare.main(arguments(folder, tmp_path))


def test_methods_start_from_the_same_parameters(folder):
    """And seeds from others."""
    methods = parse_methods("alibi+learned_slopes,none", str(folder / "config.py"), {})

    def start(config):
        config, mesh = completed(config, 257), make_mesh(config.mesh)
        optimizer = make_optimizer(config.optimizer, STEPS)
        with jax.set_mesh(mesh):
            state = init_state(config.model, optimizer, config.training.seed, mesh)[1]
        leaves = jax.tree_util.tree_leaves_with_path(state.params)
        return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}

    shared = start(methods[1].config)  # none: no parameters but those of all
    assert len(shared) > 10
    for method in methods:
        own = start(method.config)
        for path, value in shared.items():
            assert own[path].tobytes() == value.tobytes(), (method.name, path)
    other = start(with_seed(methods[1].config, 1))
    assert any(other[path].tobytes() != value.tobytes() for path, value in shared.items())


# Real comparisons. The second method computes what the first does, the fourth is trained as the
# third, and the last overflows.
SCALED = "alibi+length_scaling=linear+scaling_factor=4"
METHODS = f"none,alibi+slope_scale=0,alibi,{SCALED},none+logit_scale=1e38"
FLAGS = "--protocols=truncation"


# Where the tests run in the background, processes would be born deaf to Ctrl-C.
MAIN = """
import signal, sys
from alibi_jax.cli import main
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.exit(main())
"""


class Command:
    """`alibi compare` in a process of its own, on one CPU device."""

    def __init__(self, folder):
        self.folder = folder
        self.environment = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "PYTHONPATH": str(ROOT),
            "XLA_FLAGS": "--xla_backend_optimization_level=0",
            # Starting again compiles nothing again.
            "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        }

    def start(self, workdir):
        """Starts the comparison of `METHODS`."""
        words = arguments(self.folder, workdir, FLAGS, methods=METHODS)
        return subprocess.Popen(
            [sys.executable, "-c", MAIN, "compare", *words],
            cwd=ROOT,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, workdir):
        """Runs it to the end; gives what was printed on stdout and on stderr."""
        process = self.start(workdir)
        out, err = process.communicate(timeout=600)
        assert process.returncode == 0, err[-3000:]
        assert "Traceback" not in err, err[-3000:]
        return out, err


def numbers(workdir):
    """comparison.json without what time decides."""

    def without_seconds(value):
        if isinstance(value, dict):
            return {k: without_seconds(v) for k, v in value.items() if "second" not in k}
        return [without_seconds(item) for item in value] if isinstance(value, list) else value

    return without_seconds(json.loads((workdir / "comparison.json").read_text()))


@pytest.fixture(scope="module")
def command(folder):
    return Command(folder)


@pytest.fixture(scope="module")
def undisturbed(command):
    workdir = command.folder / "undisturbed"
    return workdir, *command.run(workdir)


@pytest.mark.slow
def test_end_to_end(command, undisturbed):
    workdir, out, err = undisturbed
    comparison = numbers(workdir)
    zero, same, alibi, scaled, diverged = comparison["methods"]
    finished = zero["runs"] + alibi["runs"] + scaled["runs"]
    assert [run["status"] for run in finished] == ["finished"] * 6
    assert [run["status"] for run in diverged["runs"]] == ["diverged"] * 2
    assert "none+logit_scale=1e38 seed 1 diverged (loss is nan at step 1)" in out
    assert not comparison["missing"] and comparison["lengths"] == [16, 32, 64]
    # Equal functions give equal numbers to the last bit: one start and one order of the data.
    assert zero["protocols"]["nonoverlapping"] == same["protocols"]["nonoverlapping"]
    assert zero["protocols"] != alibi["protocols"] != scaled["protocols"]
    assert not (workdir / SCALED).exists()
    assert zero["parameters"] == alibi["parameters"] > 0
    assert zero["memory_bytes"] > 3 * 4 * zero["parameters"]  # parameters and two moments
    for name in ("none", "alibi+slope_scale=0", "alibi", "none+logit_scale=1e38"):
        streams = [
            json.loads((workdir / name / f"seed-{seed}" / "config.json").read_text())["stream"]
            for seed in (0, 1)
        ]
        assert [stream["seed"] for stream in streams] == [0, 1]
    assert (workdir / "comparison.md").read_text() in out
    assert f"{10 * STEPS}/{10 * STEPS}" in err
    assert not list(workdir.rglob("*.tmp"))
    seconds = json.loads((workdir / "comparison.json").read_text())["methods"][0][
        "seconds_per_step"
    ]
    assert 0 < seconds < 10


@pytest.mark.slow
def test_a_finished_comparison_is_only_read(command, undisturbed):
    workdir = undisturbed[0]
    before = {path: path.stat().st_mtime_ns for path in workdir.glob("*/seed-*/**/*")}
    out, _ = command.run(workdir)
    assert before == {path: path.stat().st_mtime_ns for path in workdir.glob("*/seed-*/**/*")}
    assert out.endswith(undisturbed[1][-200:]) and "finished\n" not in out


@pytest.mark.slow
def test_a_run_evaluated_in_another_way_is_evaluated_again(command, undisturbed, tmp_path):
    workdir = shutil.copytree(undisturbed[0], tmp_path / "copy")
    path = workdir / "alibi" / "seed-1" / "evaluation.json"
    before = path.read_bytes()
    evaluation = json.loads(before)
    del evaluation["protocols"]["nonoverlapping"]
    path.write_text(json.dumps(evaluation))
    out, _ = command.run(workdir)
    assert out.count("finished\n") == 1 and "alibi seed 1 (8/10): finished\n" in out
    assert path.read_bytes() == before
    assert numbers(workdir) == numbers(undisturbed[0])


@pytest.mark.slow
def test_interrupted_at_random_moments(command, undisturbed, tmp_path):
    """Killed or stopped by Ctrl-C, wherever that is in the life of the job."""
    workdir, rng, ended = tmp_path / "disturbed", random.Random(1), []
    for number in (signal.SIGKILL, signal.SIGINT, signal.SIGKILL, signal.SIGTERM, signal.SIGKILL):
        process = command.start(workdir)
        begun = len(list(workdir.glob("*/seed-*/result.json")))
        # A random while after a run ends, but not when all is done.
        while len(list(workdir.glob("*/seed-*/result.json"))) == begun < 7:
            assert process.poll() is None, process.communicate()[1][-3000:]
            time.sleep(0.02)
        time.sleep(rng.uniform(0.0, 3.0))
        process.send_signal(number)
        _, err = process.communicate(timeout=120)
        assert "Traceback" not in err, err[-3000:]
        assert process.returncode in (-signal.SIGKILL, 130, 0)
        ended.append(process.returncode)
    command.run(workdir)
    assert len([code for code in ended if code != 0]) >= 3, ended
    assert numbers(workdir) == numbers(undisturbed[0])
