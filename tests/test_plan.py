"""`alibi plan`: what it says of a slice, against what can be counted by hand."""

import dataclasses
import importlib.util
import itertools
import json

import jax
import pytest
from jax.sharding import SingleDeviceSharding

from alibi_jax import cli, plan
from alibi_jax.config import Config, OptimizerConfig, TrainingConfig
from alibi_jax.data import DataConfig
from alibi_jax.errors import UserError
from alibi_jax.evaluation import EvaluationConfig
from alibi_jax.models import DecoderConfig
from alibi_jax.sharding import MeshConfig, make_mesh
from alibi_jax.training.chips import CHIPS, GIB, Topology, parse_topology

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="needs libtpu to compile for TPUs: pip install '.[tpu]'",
)
LAYERS, WIDTH, HEADS, VOCAB, BATCH, LENGTH = 2, 128, 2, 512, 16, 128
TINY = Config(
    model=DecoderConfig(
        num_layers=LAYERS,
        embed_dim=WIDTH,
        num_heads=HEADS,
        vocab_size=VOCAB,
        dtype="bfloat16",
    ),
    data=DataConfig(sequence_length=LENGTH, batch_size=BATCH),
    optimizer=OptimizerConfig(warmup_steps=2),
    training=TrainingConfig(num_steps=10),
    evaluation=EvaluationConfig(multiples=(1, 8), tokens_per_batch=4096),
    mesh=MeshConfig(data=2, fsdp=2),
)
MATRICES = LAYERS * 12 * WIDTH**2
BIASES = LAYERS * (4 * WIDTH + WIDTH + 4 * WIDTH)  # attention's four, the MLP's two
NORMS = (2 * LAYERS + 1) * 2 * WIDTH


# Slices


def test_topologies():
    assert parse_topology("v5e:16x16") == Topology("v5e", (16, 16))
    assert parse_topology("v5p:4x4x4").num_chips == 64
    assert str(parse_topology("tpu7x:2x2x1")) == "tpu7x:2x2x1"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("v5", "the chips are v4, v5e, v5p, v6e, tpu7x"),
        ("h100:8", "the chips are"),
        ("v5e", "a slice of v5e has 2 dimensions, for example v5e:4x4"),
        ("v5e:4x4x4", "2 dimensions"),
        ("v5p:4x4", "3 dimensions, for example v5p:4x4x4"),
        ("v5e:0x4", "2 dimensions"),
        ("v5e:4xa", "2 dimensions"),
    ],
)
def test_bad_topologies(text, message):
    with pytest.raises(UserError, match=message):
        parse_topology(text)


def test_links():
    # v5e has four links, 50 GB/s each way.
    v5e = CHIPS["v5e"]
    rates = [v5e.receives(shape) / 1e9 for shape in [(1, 1), (2, 1), (2, 2), (2, 4), (16, 16)]]
    assert rates == [0, 50, 100, 150, 200]
    assert CHIPS["v5p"].receives((4, 4, 4)) == 600e9


@needs_libtpu
@pytest.mark.parametrize(
    "text", ["v4:2x2x1", "v5e:2x2", "v5e:1x1", "v5p:2x2x1", "v6e:2x4", "tpu7x:2x2x1"]
)
def test_the_table_of_chips_is_that_of_libtpu(text):
    topology = parse_topology(text)
    chip = CHIPS[topology.chip]
    devices = plan.slice_devices(topology)
    assert len(devices) == topology.num_chips * chip.devices
    assert {device.device_kind for device in devices} == {chip.device_kind}

    # A program that is too large for any chip: the message says how much there is.
    x = jax.ShapeDtypeStruct((2**18, 2**18), "float32", sharding=SingleDeviceSharding(devices[0]))
    with pytest.raises(jax.errors.JaxRuntimeError) as error:
        jax.jit(lambda x: x + 1).lower(x).compile()
    assert f"exceeds available HBM ({chip.usable_hbm_bytes / chip.devices / GIB:g}G)" in str(
        error.value
    )
    assert plan._needed_temporaries(str(error.value), 0) == 512 * GIB


@needs_libtpu
def test_a_mesh_axis_may_take_a_part_of_a_dimension():
    mesh = make_mesh(MeshConfig(data=4, fsdp=16), plan.slice_devices(parse_topology("v6e:8x8")))
    assert mesh.shape == {"data": 4, "fsdp": 16, "tensor": 1, "context": 1}


# What it finds


@pytest.fixture(scope="module")
def found():
    return plan.plan(TINY, parse_topology("v5e:2x2"))


@needs_libtpu
def test_memory_is_what_the_parameters_take(found):
    parameters = MATRICES + BIASES + NORMS + VOCAB * WIDTH
    assert found.num_parameters == parameters
    # Over the two devices of fsdp go the matrices and the embedding; the rest is on each.
    on_device = (MATRICES + VOCAB * WIDTH) / 2 + BIASES + NORMS
    memory = found.step.memory
    assert memory.parameters == 4 * on_device
    assert memory.optimizer == 2 * 4 * on_device + 2 * 4  # and two counters of steps
    assert memory.batch == 3 * (BATCH / 4) * (LENGTH + 1) * 4  # tokens, segments, bytes: int32
    # At least every activation between the two halves of a layer, and float32 logits.
    tokens = BATCH * LENGTH / 4
    assert memory.temporaries > tokens * (2 * LAYERS * WIDTH * 2 + VOCAB * 4)
    assert memory.total < 0.01 * memory.usable
    assert memory.fits


@needs_libtpu
def test_work_is_what_the_model_takes(found):
    tokens = BATCH * LENGTH
    # Short attention is dense: two products a layer, of all queries and keys.
    attention = 2 * 2 * LAYERS * WIDTH * LENGTH
    weights = MATRICES + VOCAB * WIDTH
    done = found.step.work
    assert 4 * done.product_flops == 3 * tokens * (2 * weights + attention)
    assert found.model_flops_per_token == 3 * (2 * weights + attention)

    # Each layer's parameters are gathered from one other device, in bfloat16, forward and
    # backward; the embedding once, for both its ends.
    gathered = 2 * (2 * MATRICES + VOCAB * WIDTH) / 2
    assert done.received_bytes["all-gather"] == gathered
    # Every gradient is summed over four devices, in bfloat16 at least, and one half kept.
    reduced = sum(n for kind, n in done.received_bytes.items() if "reduce" in kind)
    assert 2 * weights <= reduced <= 4 * 4 * weights

    assert done.seconds["compute"] == done.product_flops / 197e12
    record = found.to_dict()
    assert record["tokens_per_second"] == tokens / max(done.seconds.values())
    assert 0 < record["mfu"] < 1


@needs_libtpu
def test_the_evaluation_takes_the_tpu_kernel(found):
    short, long = found.evaluation
    assert (short.batch, short.length) == (32, LENGTH)
    assert (long.batch, long.length) == (4, 8 * LENGTH)
    assert short.work.kernel_flops == 0
    # Logits and mix of one window a device: a query sees itself and what came before.
    pairs = long.length * (long.length + 1) / 2
    assert long.work.kernel_flops == LAYERS * 2 * 2 * pairs * WIDTH
    assert long.memory.optimizer == 0


@needs_libtpu
def test_a_step_too_large_says_how_much_it_needs():
    config = plan.replace(TINY, {"model.mlp_dim": 2**15, "data.batch_size": 2**14})
    topology, lines = parse_topology("v5e:2x2"), []
    mesh = make_mesh(config.mesh, plan.slice_devices(topology))
    step, *_ = plan.compile_step(config, topology, mesh, lines.append)
    hidden = 2**14 / 4 * LENGTH * 2**15 * 2  # of one MLP, in bfloat16
    assert step.memory.total > hidden > step.memory.usable
    assert not step.memory.fits
    assert step.work is None
    assert f"does not fit, {step.memory.total / GIB:.2f} GiB of 15.75 GiB" in lines[-1]


@pytest.mark.parametrize("parts", [4, 1024])
def test_the_first_settings_that_fit_are_suggested(monkeypatch, parts):
    """With a compiler in which only microbatches help."""

    def compile_step(config, topology, mesh, log):
        size = 15.75 * GIB * parts / config.training.gradient_accumulation
        memory = plan.Memory(0, 0, 0, size, 0, 15.75 * GIB)
        return plan.Compiled(64, LENGTH, memory, None, 1.0), None, ()

    monkeypatch.setattr(plan, "compile_step", compile_step)
    monkeypatch.setattr(plan, "compile_evaluation", lambda *_: compile_step(*_[:2], None, None)[0])
    monkeypatch.setattr(plan, "slice_devices", lambda topology: jax.devices()[:4])
    config = plan.replace(TINY, {"data.batch_size": 64})
    found = plan.plan(config, parse_topology("v5e:2x2"))
    text = plan.table(found)
    assert "DOES NOT FIT" in text
    record = json.loads(json.dumps(found.to_dict()))
    assert not record["fits"]
    if parts > 16:
        # Shards, recomputation, 2 to 16 microbatches, and shards of the two heads.
        assert [tried["fits"] for tried in found.tries] == 7 * [False]
        assert found.suggestion is None
        assert "Nothing that was tried fits (7 settings): take a larger slice" in text
        return
    assert [tried["fits"] for tried in found.tries] == 3 * [False] + [True]
    assert record["suggestion"]["training.gradient_accumulation"] == 4
    assert (
        "It fits with --config.mesh.data=1 --config.mesh.fsdp=4 --config.mesh.tensor=1 "
        "--config.model.remat=full --config.training.gradient_accumulation=4 (15.75 GiB)." in text
    )


def test_what_xla_says_of_memory():
    message = "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory "
    message += "space hbm. Used 18.50G of 15.75G hbm. Exceeded hbm capacity by 2.75G."
    assert plan._needed_temporaries(message, 2 * GIB) == 16.5 * GIB
    assert plan._needed_temporaries("INTERNAL: something else", 0) is None


def test_candidates_are_the_cheapest_first():
    """Shards of parameters, recomputation, microbatches, and last shards of heads."""
    config = dataclasses.replace(
        TINY,
        data=DataConfig(sequence_length=LENGTH, batch_size=64),
        mesh=MeshConfig(data=8, fsdp=2),
    )
    settings = list(itertools.islice(plan.candidates(config, 16), 10))
    mesh = {"mesh.data": 1, "mesh.fsdp": 16, "mesh.tensor": 1}
    assert settings == [
        mesh,
        mesh | {"model.remat": "full"},
        mesh | {"model.remat": "full", "training.gradient_accumulation": 2},
        mesh | {"model.remat": "full", "training.gradient_accumulation": 4},
        # two heads: no more shards of them
        {"mesh.data": 1, "mesh.fsdp": 8, "mesh.tensor": 2}
        | {"model.remat": "full", "training.gradient_accumulation": 4},
    ]
    for changes in settings:
        plan.replace(config, changes).validate(16)


# The command


@pytest.fixture
def config_file(tmp_path):
    path = tmp_path / "config.py"
    path.write_text(
        "from alibi_jax.config import Config\n"
        "from alibi_jax.models import DecoderConfig\n"
        "def get_config():\n"
        "    return Config(model=DecoderConfig(num_layers=1, embed_dim=128, num_heads=1))\n"
    )
    return str(path)


@needs_libtpu
def test_the_command(found, config_file, tmp_path, capsys, monkeypatch):
    asked = []
    monkeypatch.setattr(plan, "plan", lambda *given: asked.append(given) or found)
    output = tmp_path / "plan.json"
    command = ["plan", f"--config={config_file}", "--topology", "v5e:2x2", f"--json={output}"]
    assert cli.main([*command, "--config.model.num_layers=3"]) == 0
    (config, topology, _), *_ = asked
    assert config.model.num_layers == 3
    assert str(topology) == "v5e:2x2"
    printed = capsys.readouterr().out
    assert "v5e:2x2: 4 × TPU v5 lite; data=2, fsdp=2, tensor=1" in printed
    assert "MiB of 15.75 GiB: fits" in printed
    record = json.loads(output.read_text())
    assert record["fits"]
    assert record["step"]["memory"]["parameters"] == found.step.memory.parameters
    assert record["floor_seconds"] == max(record["step"]["work"]["seconds"].values())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["plon"], "alibi plon is not known: there is "),
        (["plan", "--topology=v5e:2x2"], "--config is missing"),
        (["plan", "--config={config}"], "--topology is missing"),
        (["plan", "--topologies=v5e:2x2"], "--topologies is not known: there is --config"),
        (["plan", "--config={config}", "--topology"], "--topology needs a value"),
        (["plan", "--config={config}", "--topology=v5e:5"], "2 dimensions"),
        (["plan", "--config=no.py", "--topology=v5e:2x2"], "no such file"),
        (
            ["plan", "--config={config}", "--topology=v5e:2x2", "--json=no/where.json"],
            "cannot be written (No such file or directory): choose another file",
        ),
    ],
)
def test_bad_commands_end_in_one_line(config_file, capsys, arguments, message):
    assert cli.main([word.format(config=config_file) for word in arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("error: ")
    assert error.count("\n") == 1


@needs_libtpu
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--topology=v5e:3x5"], "is no slice that libtpu knows"),
        (["--topology=v5e:2x2", "--config.mesh.fsdp=3"], "does not fill 4 device"),
        (["--topology=v5e:4x8", "--config.data.batch_size=16"], "use a multiple of 32"),
    ],
)
def test_what_cannot_be_on_a_slice(config_file, capsys, flags, message):
    assert cli.main(["plan", f"--config={config_file}", *flags]) == 2
    assert message in capsys.readouterr().err


def test_without_libtpu(config_file, capsys, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert cli.main(["plan", f"--config={config_file}", "--topology=v5e:2x2"]) == 2
    assert "libtpu, which is not installed: pip install '.[tpu]'" in capsys.readouterr().err


def test_help(capsys):
    assert cli.main(["--help"]) == 0
    assert "memory, FLOPs and step time of a run" in capsys.readouterr().out
    assert cli.main(["plan", "--help"]) == 0
    assert "--topology=CHIP:SHAPE" in capsys.readouterr().out
