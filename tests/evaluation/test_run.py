"""`alibi eval`: a run that was trained on eight devices, and whatever else it is given."""

import json
import random
import shutil
from types import SimpleNamespace

import pytest

from alibi_jax.cli import main
from alibi_jax.config import Config, OptimizerConfig, TrainingConfig, from_dict, override
from alibi_jax.data import DataConfig
from alibi_jax.errors import UserError
from alibi_jax.evaluation import EvaluationConfig, run
from alibi_jax.evaluation.assess import PROTOCOLS
from alibi_jax.evaluation.run import (
    best_step,
    check_lengths,
    evaluate_run,
    parse_lengths,
    parse_protocols,
)
from alibi_jax.models import DecoderConfig
from alibi_jax.run import train_short_test_long
from alibi_jax.training import workdir


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    rng = random.Random(0)
    for split, count in (("train", 20), ("valid", 2), ("test", 6)):
        for number in range(count):
            text = " ".join(rng.choices(["alibi", "bias", "slope", "key", "query"], k=120))
            path = folder / "text" / split / f"{number}.txt"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
    config = Config(
        model=DecoderConfig(num_layers=1, embed_dim=16, num_heads=2),
        data=DataConfig(
            source=f"files:{folder}/text/{{split}}/*.txt",
            sequence_length=64,
            batch_size=8,
            cache_dir=str(folder / "cache"),
        ),
        optimizer=OptimizerConfig(warmup_steps=2),
        training=TrainingConfig(num_steps=20, validate_every=0, checkpoint_every=10),
        evaluation=EvaluationConfig(
            multiples=(1, 2, 4),
            num_windows=6,
            num_targets=16,
            tokens_per_batch=256,
            num_bootstrap=100,
            num_trials=2,
        ),
    )
    outcome = train_short_test_long(config, folder / "run")
    assert outcome.step == 20 and outcome.summary is not None
    return folder


@pytest.mark.slow
def test_end_to_end_in_chunks(trained, capsys):
    directory = trained / "run"
    before = set(directory.iterdir())
    arguments = ["eval", f"--workdir={directory}", "--config.evaluation.tokens_per_batch=128"]
    assert main(arguments) == 0
    out = capsys.readouterr().out
    assert set(directory.iterdir()) - before == {
        directory / "evaluation.json",
        directory / "evaluation.png",
        directory / workdir.EVALUATION_LOCK,
    }
    found = json.loads((directory / "evaluation.json").read_text())
    assert tuple(found["protocols"]) == PROTOCOLS
    assert found["train_length"] == 64 and found["step"] == 20
    assert found["config"]["evaluation"]["tokens_per_batch"] == 128
    assert found["config"]["model"]["trained_length"] == 64
    assert found["verdict"]["text"] in " ".join(out.split())
    assert (directory / "evaluation.png").read_bytes().startswith(b"\x89PNG")
    # The same numbers as without chunks, on eight devices, right after training.
    result = json.loads((directory / "extrapolation.json").read_text())
    for name in ("nonoverlapping", "fixed_targets"):
        for ours, theirs in zip(found["protocols"][name], result["protocols"][name], strict=True):
            assert ours["length"] == theirs["length"]
            assert ours["nats_per_token"] == pytest.approx(theirs["nats_per_token"], rel=1e-5)


@pytest.fixture
def fresh(trained, tmp_path):
    """A copy of the run that was not evaluated."""
    return shutil.copytree(
        trained / "run", tmp_path / "run", ignore=lambda *_: {"evaluation.json", "evaluation.png"}
    )


@pytest.mark.slow
def test_protocols_add_up_and_nothing_is_overwritten(fresh):
    whole = ("nonoverlapping", "fixed_targets", "recall")
    expected = evaluate_run(shutil.copytree(fresh, fresh.parent / "whole"), wanted=whole)
    evaluate_run(fresh, wanted=("recall",))
    assert evaluate_run(fresh, wanted=whole[:2]) == expected
    path, expected = fresh / "evaluation.json", json.loads(json.dumps(expected))
    assert json.loads(path.read_text()) == expected
    # How many tokens are computed at once is no setting that numbers depend on; a length is.
    said = []
    less = {"evaluation.tokens_per_batch": "128"}
    again = evaluate_run(fresh, wanted=("recall",), overrides=less, say=said.append)
    assert again["protocols"] == expected["protocols"] and not said
    other = evaluate_run(fresh, wanted=("recall",), lengths=(64, 128), say=said.append)
    assert tuple(other["protocols"]) == ("recall",) and other["lengths"] == [64, 128]
    assert said == ["evaluation.json is not of these settings: renamed to evaluation.old1.json"]
    kept = json.loads((fresh / "evaluation.old1.json").read_text())
    assert kept["protocols"] == expected["protocols"]
    assert (fresh / "evaluation.old1.png").exists()
    path.write_text("{")
    evaluate_run(fresh, wanted=("recall",), lengths=(64, 128))
    assert (fresh / "evaluation.old2.json").read_text() == "{"
    assert json.loads(path.read_text())["protocols"] == other["protocols"]


@pytest.mark.slow
def test_any_checkpoint_while_training_goes_on(fresh, monkeypatch):
    said, name = [], "nonoverlapping"
    with workdir.locked(fresh):  # as a run holds it
        newest = evaluate_run(fresh, wanted=(name,), say=said.append)
        first = evaluate_run(fresh, wanted=(name,), step=10, say=said.append)
    assert said == ["evaluating step 10 of 20"] and (newest["step"], first["step"]) == (20, 10)
    for file, found in (("evaluation.json", newest), ("evaluation-step-10.json", first)):
        assert json.loads((fresh / file).read_text())["protocols"] == found["protocols"]
    assert first["protocols"] != newest["protocols"]

    config = override(from_dict(newest["config"]), {"training.keep_best": "true"})
    with pytest.raises(UserError, match="keeps no checkpoint of the lowest validation loss"):
        best_step(fresh / "checkpoints", config)
    found = {20: {"validation_loss": 2.0}, 10: {"validation_loss": 1.0}, 5: {}}
    with monkeypatch.context() as patch:
        patch.setattr(run.checkpoint, "metadata", lambda path: found)
        assert best_step(fresh / "checkpoints", config) == 10
    with pytest.raises(UserError, match=r"train it with config\.training\.keep_best=true"):
        evaluate_run(fresh, step="best")

    shutil.rmtree(fresh / "checkpoints" / "20")
    again = evaluate_run(fresh, wanted=(name,), say=said.append)
    assert said[1:] == [
        "evaluating step 10 of 20: the run is unfinished",
        "evaluation.json is not of these settings: renamed to evaluation.old1.json",
    ]
    assert again["protocols"] == first["protocols"]


@pytest.mark.slow
def test_positions_are_scaled_at_inference(fresh):
    """Slopes that are divided by 4 are those of a model that was given them."""
    scaling = {"model.length_scaling": "linear", "model.scaling_factor": "4"}
    scaled = evaluate_run(fresh, wanted=("fixed_targets",), overrides=scaling)
    plain = evaluate_run(fresh, wanted=("fixed_targets",))
    for name, numbers in (("evaluation-linear-4.json", scaled), ("evaluation.json", plain)):
        assert json.loads((fresh / name).read_text())["protocols"] == numbers["protocols"]
    record = json.loads((fresh / "config.json").read_text())
    record["config"]["model"]["slopes"] = [2.0**-4 / 4, 2.0**-8 / 4]  # of two heads
    (fresh / "config.json").write_text(json.dumps(record))
    given = evaluate_run(fresh, wanted=("fixed_targets",))
    for ours, theirs, other in zip(
        *(found["protocols"]["fixed_targets"] for found in (scaled, given, plain)), strict=True
    ):
        assert ours["nats_per_token"] == pytest.approx(theirs["nats_per_token"], rel=1e-6)
        assert ours["nats_per_token"] != pytest.approx(other["nats_per_token"], rel=1e-6)


def tree(folder):
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path: path.read_bytes() for path in files if path.name != workdir.EVALUATION_LOCK}


def no_run(folder):
    pass


def damaged(folder):
    (folder / "config.json").write_text('{"config": {"mod')


def foreign(folder):
    (folder / "config.json").write_text('{"name": "another program"}')


def of_a_later_version(folder):
    record = json.loads((folder / "config.json").read_text())
    record["config"]["model"]["telepathy"] = True
    (folder / "config.json").write_text(json.dumps(record))


def of_other_text(folder):
    record = json.loads((folder / "config.json").read_text())
    record["stream"]["corpus"] = "other"
    (folder / "config.json").write_text(json.dumps(record))


def no_checkpoint(folder):
    shutil.rmtree(folder / "checkpoints")


def damaged_checkpoint(folder):
    for path in (folder / "checkpoints").rglob("*"):
        if path.is_file():
            path.write_bytes(b"")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "flags", "words"),
    [
        (damaged, [], "is damaged or not of this program"),
        (foreign, [], "is damaged or not of this program"),
        (of_a_later_version, [], "config.model.telepathy is not known to this version"),
        (of_other_text, [], "holds a run on other text"),
        (no_checkpoint, [], "holds no checkpoint yet: train it first"),
        (damaged_checkpoint, [], "can be read"),
        (no_run, ["--step=7"], "holds no checkpoint of --step=7: there is 10, 20"),
        (no_run, ["--step=last"], "--step=last: must be a number of steps, or best"),
        (no_run, ["--protocols=needles"], "did you mean needle?"),
        (no_run, ["--lengths=64,x"], "whole numbers of tokens"),
        (no_run, ["--lengths=100"], "has 100 after 64"),
        (no_run, ["--config.evaluation.windows=3"], "did you mean config.evaluation.num_windows"),
        (no_run, ["--config.evaluation.num_trials=0"], "num_trials=0: must be at least 1"),
        (no_run, ["--config.model.num_layers=2"], "--config.model.num_layers is not known"),
        (no_run, ["--config.model.length_scaling=yarn"], "length_scaling=yarn is rotary's"),
        (no_run, ["--lengths=64,99999999999999999999"], "of up to ten digits"),
        (no_run, ["--config.data.source=files:/nowhere/*.txt"], "/nowhere"),
    ],
)
def test_what_cannot_be_evaluated_ends_in_one_line(fresh, capsys, change, flags, words):
    change(fresh)
    before = tree(fresh)
    assert main(["eval", f"--workdir={fresh}", *flags]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and words in error, error
    assert tree(fresh) == before


@pytest.mark.parametrize(
    ("source", "overrides", "words"),
    [
        ("files:a", {}, "bring that back, or say where it is with --config.data.source"),
        ("files:a", {"data.source": "files:b"}, "it has to be a copy, byte for byte"),
        ("stdlib", {}, "sources of the running Python: use that of the training"),
    ],
)
def test_other_text(tmp_path, monkeypatch, source, overrides, words):
    """It never asks for what was just done."""
    stream = {"corpus": "this one"}
    workdir.claim(tmp_path, override(Config(), {"data.source": source}), stream)
    monkeypatch.setattr(run.data, "load_corpus", lambda _: SimpleNamespace(fingerprint="another"))
    with pytest.raises(
        UserError, match=f"holds a run on other text than .* has now, .*: .*{words}"
    ):
        evaluate_run(tmp_path, overrides=overrides)


@pytest.mark.parametrize(
    ("name", "words"),
    [("missing", "is not a directory"), ("empty", "holds no run"), ("file", "is not a directory")],
)
def test_no_run_at_all(tmp_path, capsys, name, words):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    assert main(["eval", f"--workdir={tmp_path / name}"]) == 2
    assert words in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["empty", "file"]


def test_flags(capsys):
    assert main(["eval", "--protocols=needle"]) == 2
    assert "--workdir is missing" in capsys.readouterr().err
    assert main(["eval", "--help"]) == 0
    assert "--lengths=N,..." in capsys.readouterr().out
    assert parse_protocols(None) == PROTOCOLS
    assert parse_protocols("needle,recall") == ("needle", "recall")
    assert parse_lengths("128,4096") == (128, 4096)


def test_lengths_start_at_the_training_length():
    config = Config()
    assert check_lengths(config, None)[:3] == (128, 256, 512)
    assert check_lengths(config, (1024, 131072)) == (128, 1024, 131072)
    assert check_lengths(config, (128, 1024)) == (128, 1024)
    # To 128k tokens, more than are computed at once.
    far = override(config, {"evaluation.multiples": "1,32,1024"})
    assert check_lengths(far, None)[-1] == 131072 > far.evaluation.tokens_per_batch


def test_a_config_comes_back_from_json():
    config = override(
        Config(),
        {"model.slopes": "0.5,0.25", "evaluation.multiples": "1,4", "data.batch_size": "8"},
    )
    assert from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert from_dict({"model": {"num_layers": 7}}).model.num_layers == 7
    with pytest.raises(UserError, match=r"config\.model\.num_layers='2': must be an integer"):
        from_dict({"model": {"num_layers": "2"}})
    with pytest.raises(UserError, match=r"config\.model is not a section"):
        from_dict({"model": 3})
