"""Whatever the command is given that cannot work ends in one line, and nothing is written."""

import json

import jax
import pytest

from alibi_jax import data
from alibi_jax.config import load_config
from alibi_jax.run import completed
from alibi_jax.training.workdir import claim
from tests.disks import disk as disk
from tests.trainings import command as command
from tests.trainings import load_train


@pytest.fixture(scope="module")
def train():
    return load_train()


def tree(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
    }


def refused(capsys, train, arguments, words):
    assert train.main([str(argument) for argument in arguments]) == 2
    output = capsys.readouterr()
    # A corpus that turns out to be bad has begun its progress bar.
    lines = [line for line in output.err.replace("\r", "\n").split("\n") if line.strip()]
    lines = [line for line in lines if not line.startswith("tokenizing ")]
    assert len(lines) == 1 and lines[0].startswith("error: "), output.err
    assert words in lines[0], lines[0]
    assert "Traceback" not in output.err + output.out


VALUES = [
    # model
    ("model.num_layers=0", "config.model.num_layers=0: must be at least 1"),
    ("model.num_layers=two", "must be an integer"),
    ("model.num_heads=3", "embed_dim=16 is not a multiple of num_heads=3: change one"),
    ("model.num_kv_heads=4", "is not a multiple of num_kv_heads=4"),
    ("model.head_dim=0", "config.model.head_dim=0: must be at least 1"),
    ("model.dropout=1.0", "config.model.dropout=1.0: a probability, at least 0 and below 1"),
    ("model.slopes=1,2,3", "config.model.slopes has 3 values for num_heads=2: give one a head"),
    ("model.slopes=1,-2", "finite numbers, at least 0"),
    ("model.remat=true", "must be one of none, dots, full"),
    ("model.position=rope", "did you mean rotary?"),
    ("model.bias_max=0", "config.model.bias_max=0.0: a finite number above 0"),
    ("model.vocab_size=10", "config.model.vocab_size=10 is less than the tokenizer's 257"),
    ("model.num_lay=1", "did you mean config.model.num_layers?"),
    ("model=big", "is a section: set one of its fields"),
    # data
    ("data.source=stdlb", "did you mean 'stdlib'?"),
    ("data.source=files:/nowhere/*.txt", "no file matches '/nowhere/*.txt'; check the path"),
    ("data.source=tfds:", "names nothing; write for instance"),
    ("data.tokenizer=bpe:12", "with a whole number from 257 to"),
    ("data.tokenizer=missing.json", "nor a file that exists"),
    ("data.packing=dense", "must be one of documents, stream"),
    ("data.sequence_length=0", "config.data.sequence_length=0: must be at least 1"),
    ("data.sequence_length=1", "sequence_length=1: an evaluation needs at least 2, half of them"),
    ("data.batch_size=0", "config.data.batch_size=0: must be at least 1"),
    ("data.batch_size=9", "config.data.batch_size=9 does not divide"),
    (
        "data.sequence_length=1000000 evaluation.tokens_per_batch=10000000",
        "evaluation needs 1000001",
    ),
    ("data.cache_dir=/dev/null/x", "cannot write"),
    # optimizer
    ("optimizer.learning_rate=0", "config.optimizer.learning_rate=0.0: must be above 0"),
    ("optimizer.learning_rate=nan", "must be a number"),
    ("optimizer.learning_rate=-1", "config.optimizer.learning_rate=-1.0: must be above 0"),
    (f"optimizer.learning_rate=1{'0' * 400}", "config.optimizer.learning_rate=inf: must be above"),
    ("optimizer.schedule=step", "must be one of cosine, linear, constant, wsd"),
    (
        "optimizer.warmup_steps=201",
        "is more than config.training.num_steps=200: warm up for at most",
    ),
    ("optimizer.beta2=1", "config.optimizer.beta2=1.0: must be at least 0 and below 1"),
    ("optimizer.clip_norm=1e999", "config.optimizer.clip_norm=inf: must be above 0"),
    # training
    ("training.num_steps=0", "config.training.num_steps=0: must be at least 1 and at most"),
    ("training.num_steps=1e3", "must be an integer"),
    ("training.num_steps=1000000000000", "must be at least 1 and at most 2147483647"),
    ("training.seed=-1", "config.training.seed=-1: must be at least 0 and at most 4294967295"),
    ("training.z_loss=2", "config.training.z_loss=2.0: must be at least 0.0 and at most 1.0"),
    ("training.gradient_accumulation=3", "use a multiple of 24"),
    ("training.on_nonfinite=ignore", "must be one of stop, skip"),
    ("training.keep_checkpoints=0", "config.training.keep_checkpoints=0: must be at least 1"),
    # evaluation
    ("evaluation.multiples=2,4", "must start with 1, the training length"),
    ("evaluation.multiples=1,2,3", "has 3 after 2: each must be a larger multiple"),
    ("evaluation.split=train", "must be one of valid, test"),
    ("evaluation.num_targets=9", "must be at least 1 and at most 8, half the training length"),
    ("evaluation.tokens_per_batch=16", "is less than one window of 32 tokens: raise it"),
    ("evaluation.num_bootstrap=10", "must be at least 100 for a 95% interval"),
    # mesh
    ("mesh.data=3", "which does not fill 8 device(s)"),
    ("mesh.tensor=16", "which does not fill 8 device(s)"),
    ("mesh.fsdp=0", "each size must be at least 1"),
    ("mesh.tensor=4", "config.model.num_heads=2 does not divide over 4 devices"),
    # neither
    ("modle.num_layers=1", "did you mean config.model?"),
    ("model.num_layers.x=1", "is a field, not a section"),
    ("data.source=a\nb", "is not known"),  # a line break in what is quoted
]


@pytest.mark.parametrize(("fields", "words"), VALUES, ids=[fields[:40] for fields, _ in VALUES])
def test_bad_value(command, train, capsys, tmp_path, fields, words):
    flags = [f"--config.{field}" for field in fields.split(" ")]
    base = [f"--config={command.file}", f"--workdir={tmp_path / 'run'}"]
    refused(capsys, train, [*base, *flags], words)
    assert tree(tmp_path) == {}


def of_several(**changes):
    """Flags of one of several processes, with some changed or added."""
    flags = {"coordinator_address": "localhost:8476", "num_processes": 2, "process_id": 1} | changes
    # The file is met only after these flags.
    several = [f"--distributed.{name}={value}" for name, value in flags.items()]
    return ["--config=missing.py", "--workdir=W", *several]


FLAGS = [
    (["--config=missing.py", "--workdir=W"], "--config=missing.py: no such file"),
    (["--workdir=W"], "--config is missing: give --config=FILE and --workdir=DIR"),
    (["--config=C"], "--workdir is missing: give --config=FILE and --workdir=DIR"),
    (["--config=C", "--workdir="], "--workdir is missing"),
    (["--config=C", "--workdir"], "--workdir needs a value: --workdir=VALUE"),
    (["--config=C", "--workdir=W", "--seed=1"], "--seed is not known: there is"),
    (["--config=C", "--workdir=W", "extra"], "extra is not known: there is"),
    (["--config=C", "--workdir=W", "--config.training.seed"], "needs a value"),
    (["--config=C", "--workdir=W", "--config.=1"], "does not exist: it has model, data"),
    (["--config=C", "--workdir=W", "--configs=1"], "--configs is not known"),
    (["--config=C", "--workdir=~no-such-user/run"], "there is no such home folder"),
    (["--config=~no-such-user/c.py", "--workdir=W"], "there is no such home folder"),
    (["--config=C", "--workdir=gs://bucket/run"], "is an address: give a path"),
    (["--help", "--config=missing.py"], "no such file"),
    (["--config=C", "--workdir=W", "--profile=5"], "--profile=5: must be START:STOP"),
    (["--config=C", "--workdir=W", "--profile="], "--profile=: must be START:STOP"),
    (["--config=C", "--workdir=W", "--profile=9:9"], "with 0 <= START < STOP <= 200"),
    (["--config=C", "--workdir=W", "--profile=9:201"], "which is config.training.num_steps"),
    (of_several()[:4], "--distributed.process_id missing: give all of --distributed.coordinator"),
    (of_several(process_id=2), "process_id=2: must be less than --distr"),
    (of_several(process_id=-1), "must be an integer of at least 0"),
    (of_several(num_processes=0), "must be an integer of at least 1"),
    (of_several(coordinator_address="host"), "must be HOST:PORT, of process 0"),
    (of_several(coordinator_address=":8476"), "must be HOST:PORT, of process 0"),
    (of_several(port=1), "--distributed.port does not exist: it has coord"),
]


@pytest.mark.parametrize(("flags", "words"), FLAGS)
def test_bad_flags(command, train, capsys, tmp_path, monkeypatch, flags, words):
    monkeypatch.chdir(tmp_path)
    names = {"--config=C": f"--config={command.file}"}
    refused(capsys, train, [names.get(flag, flag) for flag in flags], words)
    assert tree(tmp_path) == {}


def test_help(command, train, capsys):
    for arguments in ([], ["--help"], ["-h"]):
        assert train.main(arguments) == 0
        assert "--config=configs/NAME.py[:VARIANT] --workdir=DIR" in capsys.readouterr().out
    assert train.main(["--help", f"--config={command.file}"]) == 0
    out = capsys.readouterr().out
    assert "--config.model.num_layers=1\n" in out and "--config.evaluation.multiples=1,2\n" in out


CONFIG_FILES = [
    ("def get_config(:", "fails with SyntaxError"),
    ("raise ValueError('two\\nlines')", "fails with ValueError: two lines; it must be Python"),
    ("x = 1", "has no function get_config(): define one"),
    ("def get_config():\n    return {'model': {}}", "get_config() returned dict, it must return"),
    ("def get_config():\n    return 1 / 0", "fails with ZeroDivisionError"),
]


@pytest.mark.parametrize(("text", "words"), CONFIG_FILES)
def test_bad_config_file(train, capsys, tmp_path, text, words):
    (tmp_path / "config.py").write_text(text)
    arguments = [f"--config={tmp_path / 'config.py'}", f"--workdir={tmp_path / 'run'}"]
    refused(capsys, train, arguments, words)
    assert not (tmp_path / "run").exists()


TEXTS = [
    ("a.txt", b"", "no text is left for the split"),
    ("a.txt", b"too short", "no text is left for the split 'valid'; give more text"),
    ("a.txt", b"too short " * 20, "evaluation needs 17 tokens for one window of 16"),
    ("a.txt", b"text " * 99 + b"\xff", "not UTF-8 at byte 495"),
    ("a.jsonl", b'{"text": "a"}\n{"text"', "line 2: not JSON"),
    ("a.jsonl", b'{"title": 1}\n', "no field 'text'"),
    ("a.txt.gz", b"not an archive", "not a whole .gz file"),
    ("a.pdf", b"%PDF", "allowed are .txt"),
]


@pytest.mark.parametrize(("name", "text", "words"), TEXTS)
def test_bad_text(command, train, capsys, tmp_path, name, text, words):
    (tmp_path / name).write_bytes(text)
    arguments = [
        f"--config={command.file}",
        f"--workdir={tmp_path / 'run'}",
        f"--config.data.source=files:{tmp_path}/a.*",
        f"--config.data.cache_dir={tmp_path / 'cache'}",
    ]
    refused(capsys, train, arguments, words)
    assert not (tmp_path / "run").exists()
    assert not list(tmp_path.rglob(".unfinished-*"))


def test_training_text_too_short(command, train, capsys, tmp_path):
    """Held-out text that is long enough, and a train split of less than a window."""
    for split, text in (("train", "ab"), ("valid", "words " * 99), ("test", "words " * 99)):
        (tmp_path / f"{split}.txt").write_text(text)
    arguments = [
        f"--config={command.file}",
        f"--workdir={tmp_path / 'run'}",
        f"--config.data.source=files:{tmp_path}/{{split}}.txt",
        f"--config.data.cache_dir={tmp_path / 'cache'}",
    ]
    refused(capsys, train, arguments, "the train split of ")
    assert not (tmp_path / "run").exists()


@pytest.fixture(scope="module")
def record(command):
    """config.json of a run of the command's config."""
    config = load_config(str(command.file), {})
    corpus = data.load_corpus(config.data)
    config = completed(config, corpus.tokenizer.vocab_size)
    stream = data.stream_identity(
        fingerprint=corpus.fingerprint,
        sequence_length=16,
        batch_size=8,
        seed=0,
        packing="documents",
    )
    claim(command.folder / "claimed", config, stream)
    return json.loads((command.folder / "claimed" / "config.json").read_text())


def other_data(record):
    record["stream"]["corpus"] = "other"


def other_model(record):
    record["config"]["model"]["num_layers"] = 7


def other_seed(record):
    record["config"]["training"]["seed"] = 7


RUNS = [
    (other_data, "holds a run on other data (corpus differs): choose another directory"),
    (other_model, "holds a run with config.model.num_layers=7, this one has 1: choose another"),
    (other_seed, "holds a run with config.training.seed=7, this one has 0: choose another"),
    (lambda record: record.clear(), "config.json there is damaged or not of this program"),
    ('{"config": {"mod', "config.json there is damaged or not of this program"),
    ("[]", "config.json there is damaged or not of this program"),
    (None, "holds checkpoints without the config.json that says what they are of: choose"),
]


@pytest.mark.parametrize(("change", "words"), RUNS)
def test_directory_of_another_run(command, train, record, capsys, tmp_path, change, words):
    folder = tmp_path / "run"
    (folder / "checkpoints" / "10").mkdir(parents=True)
    record = json.loads(json.dumps(record))
    if callable(change):
        change(record)
    if change is not None:
        text = json.dumps(record) if callable(change) else change
        (folder / "config.json").write_text(text)
    before = tree(folder)
    refused(capsys, train, [f"--config={command.file}", f"--workdir={folder}"], words)
    after = tree(folder)
    after.pop(".lock")
    assert after == before


def test_directory_beyond_the_steps(command, train, record, capsys, tmp_path):
    folder = tmp_path / "run"
    (folder / "checkpoints" / "150").mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(record))
    arguments = [f"--config={command.file}", f"--workdir={folder}"]
    arguments += ["--config.training.num_steps=100"]
    refused(
        capsys, train, arguments, "holds a run at step 150, beyond config.training.num_steps=100"
    )
    assert json.loads((folder / "config.json").read_text()) == record


def test_no_directory(command, train, capsys, tmp_path):
    (tmp_path / "file").write_text("content")
    before = tree(tmp_path)
    for workdir, words in [
        (tmp_path / "file", "is a file: give a directory"),
        (tmp_path / "file" / "below", "choose another directory"),
        ("/proc/nothing/here", "choose another directory"),
        (tmp_path / ("x" * 300), "File name too long): choose another"),
    ]:
        refused(capsys, train, [f"--config={command.file}", f"--workdir={workdir}"], words)
    assert tree(tmp_path) == before


def test_read_only_disk(command, train, capsys, disk):
    """The directory is new, or there."""
    disk.mount("size=64k")
    (disk.path / "run").mkdir()
    disk.mount("remount,ro")
    for workdir in (disk.path / "new", disk.path / "run"):
        flags = [f"--config={command.file}", f"--workdir={workdir}"]
        refused(capsys, train, flags, f"cannot be written in {workdir.parent}")


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (BrokenPipeError(), 141, "what read the output is gone; the same command goes on"),
        (KeyboardInterrupt(), 130, "interrupted; the same command goes on"),
        # As JAX 0.10 says it on a CPU.
        (
            jax.errors.JaxRuntimeError("INTERNAL: Error dispatching: Out of memory allocating 9"),
            2,
            "out of memory on the device",
        ),
    ],
)
def test_what_ends_a_run(command, train, capsys, monkeypatch, error, code, words):
    def run(*_):
        raise error

    monkeypatch.setattr(train, "run", run)
    assert train.main([f"--config={command.file}", "--workdir=W"]) == code
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and words in line


def test_one_line_from_the_process_too(command, tmp_path):
    out, err = command.run(tmp_path / "run", "--config.model.num_layer=1", expect=2)
    assert out == "" and err.count("\n") == 1 and err.startswith("error: --config.model.num_layer")
    assert tree(tmp_path) == {}
