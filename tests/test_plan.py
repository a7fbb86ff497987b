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
from alibi_jax.sharding import MeshConfig
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
    assert memory.batch == 2 * (BATCH / 4) * (LENGTH + 1) * 4  # tokens and segments, int32
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
    causal = attention * (LENGTH + 1) / LENGTH / 2
    assert found.model_flops_per_token == 3 * (2 * weights + causal)

    # Each layer's parameters are gathered from one other device, in bfloat16, forward and
    # backward; the embedding twice, for both its ends.
    gathered = 2 * (2 * MATRICES + 2 * VOCAB * WIDTH) / 2
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
def test_a_model_too_large_is_refused_with_what_fits():
    config = dataclasses.replace(
        TINY,
        model=DecoderConfig(
            num_layers=1, embed_dim=256, num_heads=2, vocab_size=2**17, dtype="bfloat16", remat=True
        ),
        data=DataConfig(sequence_length=256, batch_size=512),
        evaluation=EvaluationConfig(multiples=(1,), tokens_per_batch=4096),
        mesh=MeshConfig(data=1, fsdp=4),
    )
    lines = []
    found = plan.plan(config, parse_topology("v5e:2x2"), lines.append)
    memory = found.step.memory
    logits = 512 / 4 * 256 * 2**17 * 4
    assert memory.total > logits > memory.usable
    assert not memory.fits
    assert found.step.work is None
    settings = found.suggestion
    assert list(settings) == ["training.gradient_accumulation"]
    assert found.tries[-1]["total"] <= memory.usable
    text = plan.table(found)
    assert "DOES NOT FIT" in text
    parts = settings["training.gradient_accumulation"]
    assert f"It fits with --config.training.gradient_accumulation={parts}" in text
    assert sum("does not fit" in line for line in lines) == len(found.tries)
    assert json.loads(json.dumps(found.to_dict()))["suggestion"] == settings


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
        mesh | {"model.remat": True},
        mesh | {"model.remat": True, "training.gradient_accumulation": 2},
        mesh | {"model.remat": True, "training.gradient_accumulation": 4},
        # two heads: no more shards of them
        {"mesh.data": 1, "mesh.fsdp": 8, "mesh.tensor": 2}
        | {"model.remat": True, "training.gradient_accumulation": 4},
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
def test_the_command(config_file, tmp_path, capsys):
    output = tmp_path / "plan.json"
    flags = ["--config.evaluation.multiples=1", "--config.training.validate_every=0"]
    command = ["plan", f"--config={config_file}", "--topology", "v6e:1x1", f"--json={output}"]
    assert cli.main([*command, *flags]) == 0
    printed = capsys.readouterr()
    assert "v6e:1x1: 1 × TPU v6 lite" in printed.out
    assert "of 31.25 GiB: fits" in printed.out
    assert "compiling the training step, 16 × 128 tokens" in printed.err
    record = json.loads(output.read_text())
    assert record["fits"]
    assert record["step"]["work"]["received_bytes"] == {}
    assert record["step"]["work"]["seconds"]["network"] == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["plon"], "alibi plon is not known: there is plan"),
        (["plan", "--topology=v5e:2x2"], "--config is missing"),
        (["plan", "--config={config}"], "--topology is missing"),
        (["plan", "--topologies=v5e:2x2"], "--topologies is not known: there is --config"),
        (["plan", "--config={config}", "--topology"], "--topology needs a value"),
        (["plan", "--config={config}", "--topology=v5e:5"], "2 dimensions"),
        (["plan", "--config=no.py", "--topology=v5e:2x2"], "no such file"),
        (
            ["plan", "--config={config}", "--topology=v5e:2x2", "--json=no/where.json"],
            "there is no such folder",
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
    assert "plan  memory, FLOPs and step time" in capsys.readouterr().out
    assert cli.main(["plan", "--help"]) == 0
    assert "--topology=CHIP:SHAPE" in capsys.readouterr().out
