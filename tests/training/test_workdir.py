"""Whose a working directory is, and what may change when its run goes on."""

import contextlib
import dataclasses
import errno
import json
import os
import pathlib
import re
import typing

import pytest

from alibi_jax.config import Config
from alibi_jax.errors import UserError
from alibi_jax.sharding import MeshConfig
from alibi_jax.training import workdir

STREAM = {
    "corpus": "abc",
    "sequence_length": 16,
    "batch_size": 8,
    "seed": 0,
    "packing": "documents",
}

# Every field of the config, and another value for it.
CHANGES = {
    "model.vocab_size": 300,
    "model.num_layers": 2,
    "model.embed_dim": 32,
    "model.num_heads": 4,
    "model.num_kv_heads": 1,
    "model.head_dim": 4,
    "model.mlp_dim": 32,
    "model.position": "none",
    "model.bias_max": 4.0,
    "model.slopes": (0.5, 0.25),
    "model.slope_scale": 2.0,
    "model.alibi_heads": 1,
    "model.learned_slopes": True,
    "model.sink": True,
    "model.length_scaling": "linear",
    "model.scaling_factor": 2.0,
    "model.trained_length": 8,
    "model.norm": "rmsnorm",
    "model.norm_bias": False,
    "model.norm_eps": 1e-3,
    "model.activation": "relu",
    "model.gated_mlp": True,
    "model.qkv_bias": False,
    "model.out_bias": False,
    "model.mlp_bias": False,
    "model.clip_qkv": 8.0,
    "model.qk_norm": "full",
    "model.attention_scale": 1.0,
    "model.dropout": 0.5,
    "model.mlp_dropout": 0.5,
    "model.final_norm": False,
    "model.adaptive_cutoffs": (100,),
    "model.adaptive_factor": 2,
    "model.adaptive_dropout": 0.5,
    "model.embed_norm": True,
    "model.embed_scale": 2.0,
    "model.tie_embeddings": False,
    "model.logit_scale": 2.0,
    "model.dtype": "bfloat16",
    "model.scan_layers": False,
    "model.remat": "full",
    "data.source": "stdlib",
    "data.text_field": "text",
    "data.tokenizer": "bpe:300",
    "data.packing": "stream",
    "data.sequence_length": 8,
    "data.batch_size": 16,
    "data.cache_dir": "elsewhere",
    "optimizer.name": "nag",
    "optimizer.learning_rate": 1.0,
    "optimizer.schedule": "linear",
    "optimizer.warmup_steps": 1,
    "optimizer.decay_fraction": 0.5,
    "optimizer.final_fraction": 0.5,
    "optimizer.beta1": 0.5,
    "optimizer.beta2": 0.5,
    "optimizer.epsilon": 1e-3,
    "optimizer.weight_decay": 0.0,
    "optimizer.clip_norm": 2.0,
    "training.num_steps": 100,
    "training.seed": 1,
    "training.z_loss": 0.5,
    "training.gradient_accumulation": 2,
    "training.log_every": 3,
    "training.validate_every": 3,
    "training.validation_batches": 3,
    "training.checkpoint_every": 3,
    "training.keep_checkpoints": 3,
    "training.keep_best": True,
    "training.on_nonfinite": "skip",
    "evaluation.multiples": (1, 4),
    "evaluation.split": "valid",
    "evaluation.num_windows": 3,
    "evaluation.num_targets": 3,
    "evaluation.tokens_per_batch": 512,
    "evaluation.num_bootstrap": 200,
    "evaluation.overlap": 2,
    "evaluation.num_trials": 3,
    "mesh.data": 2,
    "mesh.fsdp": 2,
    "mesh.tensor": 2,
    "mesh.context": 2,
}
MAY_CHANGE = {
    "model.scan_layers",
    "model.remat",
    "data.cache_dir",
    "training.num_steps",
    "training.log_every",
    "training.validate_every",
    "training.validation_batches",
    "training.checkpoint_every",
    "training.keep_checkpoints",
    "training.keep_best",
    "training.on_nonfinite",
    *(name for name in CHANGES if name.startswith(("evaluation.", "mesh."))),
}


def refused(words, *arguments):
    with pytest.raises(UserError) as caught:
        workdir.claim(*arguments)
    message = str(caught.value)
    assert "\n" not in message and message.startswith("--workdir=")
    assert re.search(words, message), message


def test_the_table_is_complete():
    names = {
        f"{section.name}.{field.name}"
        for section in dataclasses.fields(Config)
        for field in dataclasses.fields(typing.get_type_hints(Config)[section.name])
    }
    assert names == CHANGES.keys()


def test_claim_and_claim_again(tmp_path, config):
    folder = tmp_path / "a" / "b"
    workdir.claim(folder, config, STREAM)
    record = json.loads((folder / "config.json").read_text())
    assert record["config"]["data"]["sequence_length"] == 16 and record["stream"] == STREAM
    workdir.claim(folder, config, STREAM)
    assert [path.name for path in folder.iterdir()] == ["config.json"]


@pytest.mark.parametrize("name", CHANGES)
def test_what_may_change(tmp_path, config, changed, name):
    section, field = name.split(".")
    other = changed(config, **{section: {field: CHANGES[name]}})
    assert other != config
    workdir.claim(tmp_path, config, STREAM)
    (tmp_path / "checkpoints" / "1").mkdir(parents=True)
    before = (tmp_path / "config.json").read_text()
    if name in MAY_CHANGE:
        workdir.claim(tmp_path, other, STREAM)
        assert (tmp_path / "config.json").read_text() != before  # the newest is what goes on
    else:
        old = getattr(getattr(config, section), field)
        refused(
            rf"holds a run with config\.{name}={re.escape(str(old))}, this one has .*: choose",
            tmp_path,
            other,
            STREAM,
        )
        assert (tmp_path / "config.json").read_text() == before


@pytest.mark.parametrize("name", STREAM)
def test_other_data(tmp_path, config, name):
    workdir.claim(tmp_path, config, STREAM)
    (tmp_path / "checkpoints" / "1").mkdir(parents=True)
    refused(rf"\({name} differs\): choose", tmp_path, config, STREAM | {name: "other"})


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "3",
        "null",
        "{}",
        "\udcff",
        '{"config": 3, "stream": {}}',
        '{"config": {}}',
        '{"config": {"model": {}}, "stream": 3}',
        '{"config": [], "stream": []}',
    ],
)
def test_damaged_config(tmp_path, config, text):
    path = tmp_path / "config.json"
    path.write_text(text, errors="surrogateescape")
    refused("config.json there is damaged .*choose another", tmp_path, config, STREAM)
    assert path.read_text(errors="surrogateescape") == text


def test_no_directory(tmp_path, config):
    (tmp_path / "file").write_text("")
    refused("is a file: give a directory", tmp_path / "file", config, STREAM)
    refused("cannot be written .*choose another", tmp_path / "file" / "below", config, STREAM)
    refused("cannot write .*choose another", tmp_path / ("x" * 300), config, STREAM)
    refused("cannot be written in /proc .No such", pathlib.Path("/proc/foo"), config, STREAM)
    (tmp_path / "run" / "config.json").mkdir(parents=True)
    refused("cannot write .*choose another", tmp_path / "run", config, STREAM)


def test_a_name_that_orbax_misreads(tmp_path, monkeypatch):
    """One process goes round it; several would each have another name for it."""
    for name in ("exp [lr=1e-3]", "back\\slash", "12:30", "new\nline"):
        workdir.check_usable(tmp_path / name)
        with monkeypatch.context() as patch:
            patch.setattr(workdir.jax, "process_count", lambda: 2)
            with pytest.raises(UserError, match="several processes cannot save under a name with"):
                workdir.check_usable(tmp_path / name)
            workdir.check_usable(tmp_path / "lr=1e-3, é")


def test_checkpoints_of_nobody(tmp_path, config):
    (tmp_path / "checkpoints" / "10").mkdir(parents=True)
    refused("checkpoints without the config.json .*: choose", tmp_path, config, STREAM)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoints"]


def test_a_second_process(tmp_path, config, changed, monkeypatch):
    """It writes nothing, and must be of the same run and see the same directory."""
    other = tmp_path / "other"
    monkeypatch.setattr(workdir, "_SEEN_SECONDS", 0.0)
    record = json.loads(json.dumps({"config": config.to_dict(), "stream": STREAM}))
    monkeypatch.setattr(workdir.distributed, "from_main", lambda function: record)
    with pytest.raises(UserError, match=r"does not see what process 0 wrote in .* all processes"):
        workdir.claim(other, config, STREAM)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text("")
    workdir.claim(tmp_path / "run", config, STREAM)
    assert (tmp_path / "run" / "config.json").read_text() == "" and not other.exists()
    with pytest.raises(UserError, match="started with another data than process 0: give all"):
        workdir.claim(tmp_path / "run", config, STREAM | {"corpus": "other"})
    with pytest.raises(UserError, match="started with another config than process 0: give all"):
        workdir.claim(tmp_path / "run", changed(config, training={"seed": 9}), STREAM)


def test_another_run_where_nothing_was_saved(tmp_path, config, changed):
    workdir.claim(tmp_path, config, STREAM)
    other = changed(config, training={"seed": 1})
    workdir.claim(tmp_path, other, STREAM)
    assert json.loads((tmp_path / "config.json").read_text())["config"]["training"]["seed"] == 1


def test_one_process_at_a_time(tmp_path):
    folder = tmp_path / "new"
    with workdir.locked(folder):
        other = contextlib.ExitStack()
        with pytest.raises(UserError, match=r"is in use by another process: wait"):
            other.enter_context(workdir.locked(folder))
    with pytest.raises(OSError, match="inside"), workdir.locked(folder):
        raise OSError("inside")  # what happens inside says for itself what it is
    with workdir.locked(folder), workdir.locked(folder, workdir.EVALUATION_LOCK):
        pass  # an evaluation reads while a run goes on


def test_a_disk_without_locks(tmp_path, monkeypatch, capsys):
    """Not a full one: the run goes on, and says what it cannot see to."""

    def flock(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(workdir.fcntl, "flock", flock)
    with workdir.locked(tmp_path):
        assert "is on a disk without locks (No locks available): see to" in capsys.readouterr().out


def test_space_is_asked_for_where_it_is_missing(tmp_path):
    for code, space in ((errno.ENOSPC, True), (errno.EDQUOT, True), (errno.EACCES, False)):
        with pytest.raises(UserError) as caught, workdir.writing(tmp_path):
            raise OSError(code, os.strerror(code))
        assert ("free some space" in str(caught.value)) == space
    with pytest.raises(BrokenPipeError), workdir.writing(tmp_path):
        raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))  # of what is printed


def test_fewer_steps_than_were_taken(tmp_path, config, changed):
    workdir.claim(tmp_path, config, STREAM)
    for step in ("6", "8", "notes"):
        (tmp_path / "checkpoints" / step).mkdir(parents=True)
    before = (tmp_path / "config.json").read_text()
    refused(
        "holds a run at step 8, beyond config.training.num_steps=7: give at least 8",
        tmp_path,
        changed(config, training={"num_steps": 7}),
        STREAM,
    )
    assert (tmp_path / "config.json").read_text() == before
    workdir.claim(tmp_path, changed(config, training={"num_steps": 9}), STREAM)


def test_a_run_of_before_a_field_was_there(tmp_path, config, changed):
    """It had the field's default."""
    workdir.claim(tmp_path, config, STREAM)
    (tmp_path / "checkpoints" / "1").mkdir(parents=True)
    record = json.loads((tmp_path / "config.json").read_text())
    del record["config"]["model"]["qk_norm"], record["config"]["optimizer"]["beta2"]
    (tmp_path / "config.json").write_text(json.dumps(record))
    refused(
        "config.model.qk_norm=None, this one has full",
        tmp_path,
        changed(config, model={"qk_norm": "full"}),
        STREAM,
    )
    workdir.claim(tmp_path, config, STREAM)


def test_integers_for_floats_are_the_same_run(tmp_path, config, changed):
    workdir.claim(tmp_path, changed(config, optimizer={"clip_norm": 1}), STREAM)
    workdir.claim(tmp_path, changed(config, optimizer={"clip_norm": 1.0}), STREAM)


def test_the_record_is_whole_or_not_at_all(tmp_path, config, changed, monkeypatch):
    workdir.claim(tmp_path, config, STREAM)
    before = (tmp_path / "config.json").read_text()

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(type(tmp_path), "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        workdir.claim(tmp_path, changed(config, training={"num_steps": 9}), STREAM)
    assert (tmp_path / "config.json").read_text() == before


def test_default_mesh_is_plain_data(config):
    assert json.loads(json.dumps(config.to_dict()))["mesh"] == dataclasses.asdict(MeshConfig())
