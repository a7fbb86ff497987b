"""From a file and a command line to a config: every type, every way to be wrong."""

import dataclasses
import math
import pathlib
import re
import runpy
import typing

import pytest

from alibi_jax import fields as fields_module
from alibi_jax.config import Config, OptimizerConfig, TrainingConfig, describe, load_config
from alibi_jax.data import DataConfig
from alibi_jax.errors import UserError
from alibi_jax.evaluation import EvaluationConfig
from alibi_jax.models import Decoder, DecoderConfig
from alibi_jax.sharding import MeshConfig

ROOT = pathlib.Path(__file__).parents[1]
SHIPPED = sorted((ROOT / "configs").glob("*.py"))


@pytest.fixture
def write(tmp_path):
    """Writes a config file and gives its path."""

    def write(body, head="from alibi_jax.config import Config"):
        path = tmp_path / "config.py"
        path.write_text(f"{head}\n{body}\n")
        return str(path)

    return write


@pytest.fixture
def plain(write):
    return write("def get_config():\n    return Config()")


def refused(words, function, *arguments):
    with pytest.raises(UserError) as caught:
        function(*arguments)
    message = str(caught.value)
    assert re.search(words, message), message
    return message


VALUES = [
    ("model.num_layers", "3", 3),
    ("model.num_layers", "1_000", 1000),
    ("training.seed", "0", 0),
    ("optimizer.learning_rate", "1e-3", 1e-3),
    ("optimizer.learning_rate", ".5", 0.5),
    ("optimizer.clip_norm", "1", 1.0),  # an integer for a float
    ("mesh.data", "-1", -1),
    ("model.gated_mlp", "true", True),
    ("model.gated_mlp", "True", True),
    ("model.norm_bias", "false", False),
    ("model.clip_qkv", "8", 8.0),
    ("model.clip_qkv", "none", None),
    ("model.num_kv_heads", "None", None),
    ("model.num_kv_heads", "2", 2),
    ("data.text_field", "text", "text"),
    ("data.text_field", "none", None),
    ("data.text_field", "3", "3"),  # a name may be a number
    ("data.cache_dir", "/a b/{c}", "/a b/{c}"),
    ("data.source", "files:a=b/*.txt", "files:a=b/*.txt"),
    ("data.source", "none", "none"),
    ("data.tokenizer", "1e3", "1e3"),
    ("data.packing", "stream", "stream"),
    ("model.position", "none", "none"),  # a choice, not None
    ("model.qk_norm", "none", None),
    ("model.qk_norm", "full", "full"),
    ("model.slopes", "none", None),
    ("model.slopes", "1,0.5", (1.0, 0.5)),
    ("model.slopes", "1", (1.0,)),
    ("evaluation.multiples", "1", (1,)),
    ("evaluation.multiples", "1,2,4", (1, 2, 4)),
    ("evaluation.multiples", "(1, 2)", (1, 2)),
    ("evaluation.multiples", "[1, 2]", (1, 2)),
    ("evaluation.multiples", "1,", (1,)),
]


@pytest.mark.parametrize(("name", "text", "value"), VALUES)
def test_override(plain, name, text, value):
    section, field = name.split(".")
    config = load_config(plain, {name: text})
    result = getattr(getattr(config, section), field)
    assert result == value and type(result) is type(value)
    if isinstance(value, tuple):
        assert list(map(type, result)) == list(map(type, value))
    expected = dataclasses.replace(getattr(Config(), section), **{field: value})
    assert config == dataclasses.replace(Config(), **{section: expected})


def test_several_overrides_and_none(plain):
    assert load_config(plain, {}) == Config()
    config = load_config(plain, {"model.num_layers": "1", "model.embed_dim": "64"})
    assert (config.model.num_layers, config.model.embed_dim) == (1, 64)


WRONG = [
    (
        "model.num_layer",
        "1",
        r"--config\.model\.num_layer does not exist.*config\.model\.num_layers\?",
    ),
    ("modle.num_layers", "1", r"--config\.modle does not exist: did you mean config\.model\?"),
    ("training.lerning_rate", "1", r"does not exist: it has num_steps, seed"),
    ("optimizer.lerning_rate", "1", r"did you mean config\.optimizer\.learning_rate\?"),
    ("zzz", "1", r"does not exist: it has model, data, optimizer"),
    ("", "1", r"--config\. does not exist: it has model"),
    ("model", "1", r"is a section: set one of its fields, --config\.model\.FIELD=VALUE"),
    ("model.num_layers.x", "1", r"is a field, not a section: --config\.model\.num_layers=VALUE"),
    ("model.", "1", r"--config\.model\. does not exist"),
    ("model.num_layers", "two", "num_layers=two: must be an integer$"),
    ("model.num_layers", "2.0", "num_layers=2.0: must be an integer$"),
    ("model.num_layers", "1e3", "must be an integer$"),
    ("model.num_layers", "true", "must be an integer$"),
    ("model.num_layers", "none", "must be an integer$"),
    ("model.num_layers", "", "num_layers=: must be an integer$"),
    ("model.num_layers", "1,2", "must be an integer$"),
    ("optimizer.learning_rate", "fast", "learning_rate=fast: must be a number$"),
    ("optimizer.learning_rate", "true", "must be a number$"),
    ("optimizer.learning_rate", "nan", "must be a number$"),
    ("optimizer.learning_rate", "inf", "must be a number$"),
    ("model.gated_mlp", "1", "must be true or false$"),
    ("model.gated_mlp", "yes", "must be true or false$"),
    ("model.clip_qkv", "eight", "must be a number or none$"),
    ("model.qk_norm", "half", "qk_norm=half: must be one of full, per_head or none$"),
    ("model.position", "rope", "must be one of alibi, .*, forgetting; did you mean rotary\\?$"),
    ("model.norm", "Layernorm", "must be one of layernorm, rmsnorm; did you mean layernorm\\?$"),
    ("data.packing", "none", "must be one of documents, stream$"),
    ("evaluation.split", "train", "must be one of valid, test$"),
    ("evaluation.multiples", "1,2.5", "must be integers with commas between$"),
    ("evaluation.multiples", "a,b", "must be integers with commas between$"),
    ("evaluation.multiples", "", "must be integers with commas between$"),
    ("evaluation.multiples", "none", "must be integers with commas between$"),
    ("model.slopes", "1,x", "must be numbers with commas between or none$"),
    ("model.num_layers", "{[]: 1}", "must be an integer$"),  # literal_eval: TypeError
    ("model.num_layers", "(" * 5000, "must be an integer$"),  # and MemoryError
    ("model.num_layers", "-" * 100_000 + "1", "must be an integer$"),
    ("model.num_layers", "__import__('os')", "must be an integer$"),
    ("model.num_layers", "a\0b", "must be an integer$"),
]


@pytest.mark.parametrize(("name", "text", "words"), WRONG)
def test_wrong_override(plain, name, text, words):
    refused(words, load_config, plain, {name: text})


FILES = [
    ("def get_config(:", "fails with SyntaxError: .*; it must be Python"),
    ("import nothing_of_that_name", "fails with ModuleNotFoundError: .*nothing_of_that_name"),
    ("1 / 0", "fails with ZeroDivisionError: division by zero"),
    ("raise SystemExit(3)", "fails with SystemExit: 3"),
    ("def get_config():\n    return Config(modell=3)", "fails with TypeError: .*'modell'"),
    ("def get_config():\n    raise ValueError('a\\nb')", "fails with ValueError: a"),
    ("def get_config(size):\n    return Config()", "fails with TypeError: .*'size'"),
    ("config = Config()", r"has no function get_config\(\): define one"),
    ("get_config = Config()", r"has no function get_config\(\)"),
    ("def get_config():\n    return {}", r"get_config\(\) returned dict, it must return an"),
    ("def get_config():\n    pass", r"get_config\(\) returned NoneType"),
    ("def get_config():\n    return Config", r"get_config\(\) returned type"),
    (
        "def get_config():\n    return Config(model={'num_layers': 2})",
        "config.model is a dict: must be a DecoderConfig",
    ),
    (
        "def get_config():\n    return Config(model=Config().data)",
        "config.model is a DataConfig: must be a DecoderConfig",
    ),
    (
        "def get_config():\n    return Config(mesh=None)",
        "config.mesh is a NoneType: must be a Mesh",
    ),
]


@pytest.mark.parametrize(("body", "words"), FILES)
def test_wrong_file(write, body, words):
    refused(words, load_config, write(body), {})


VARIANTS = """
VARIANTS = ("short", "long")
def get_config(variant="short"):
    return Config(data=Config().data.__class__(sequence_length={"short": 8, "long": 16}[variant]))
"""


def test_variants(write):
    path = write(VARIANTS)
    for name, length in (("", 8), (":short", 8), (":long", 16)):
        assert load_config(path + name, {}).data.sequence_length == length
    assert load_config(f"{path}:long", {"data.sequence_length": "4"}).data.sequence_length == 4
    refused(
        r"config.py has no variant 'longer': it has short, long$", load_config, f"{path}:longer", {}
    )
    refused("missing.py:long: no such file", load_config, "missing.py:long", {})


def test_a_file_without_variants(plain):
    refused(r"has no variant 'any': leave out :any$", load_config, f"{plain}:any", {})
    path = pathlib.Path(plain)
    assert load_config(str(path.rename(path.parent / "a:b.py")), {}) == Config()


def test_wrong_path(tmp_path):
    refused("no such file", load_config, str(tmp_path / "missing.py"), {})
    refused("no such file", load_config, str(tmp_path), {})
    (tmp_path / "binary.py").write_bytes(b"\x00\xff")
    refused("fails with", load_config, str(tmp_path / "binary.py"), {})


def test_the_home_folder(plain, monkeypatch):
    monkeypatch.setenv("HOME", str(pathlib.Path(plain).parent))
    assert load_config("~/config.py", {}) == Config()


TYPES = [
    ("model", {"num_layers": 2.0}, r"config.model.num_layers=2.0: must be an integer"),
    ("model", {"gated_mlp": 1}, "must be true or false"),
    ("model", {"slopes": [0.5, 0.25]}, "must be numbers with commas between or none"),
    ("model", {"slopes": (True, 1.0)}, "must be numbers"),
    ("model", {"qk_norm": "half"}, "must be one of full, per_head or none"),
    ("data", {"source": None}, "config.data.source=None: must be text"),
    ("data", {"source": pathlib.Path("a")}, "must be text"),
    (
        "optimizer",
        {"learning_rate": "1e-3"},
        "config.optimizer.learning_rate='1e-3': must be a num",
    ),
    ("optimizer", {"learning_rate": math.nan}, "learning_rate=nan: must be above 0"),
    ("optimizer", {"learning_rate": math.inf}, "learning_rate=inf: must be above 0"),
    ("training", {"num_steps": True}, "must be an integer"),
    ("mesh", {"data": None}, "config.mesh.data=None: must be an integer"),
]


@pytest.mark.parametrize(("section", "fields", "words"), TYPES)
def test_types_are_checked(section, fields, words):
    """A config built in Python, whose types nothing checked so far."""
    changed = dataclasses.replace(getattr(Config(), section), **fields)
    config = dataclasses.replace(Config(), **{section: changed})
    refused(words, config.validate, 8)


BY_HAND = [
    (DecoderConfig, {"norm": "Layernorm"}, r"model.norm='Layernorm'.*did you mean layernorm\?"),
    (DecoderConfig, {"qk_norm": "x"}, "model.qk_norm='x': must be one of full, per_head or none$"),
    (DecoderConfig, {"position": "rope"}, r"model.position='rope': .*; did you mean rotary\?"),
    (DecoderConfig, {"activation": "swish"}, r"did you mean silu\?"),
    (DecoderConfig, {"num_layers": "4"}, "model.num_layers='4': must be an integer"),
    (DecoderConfig, {"position": ["alibi"]}, "must be one of alibi, "),
    (DataConfig, {"packing": "Document"}, r"data.packing='Document': .*did you mean documents\?"),
    (DataConfig, {"sequence_length": 16.0}, "must be an integer"),
    (OptimizerConfig, {"name": "adam"}, r"optimizer.name='adam': .*did you mean adamw\?"),
    (TrainingConfig, {"num_steps": "9"}, "training.num_steps='9': must be an integer"),
]


@pytest.mark.parametrize(("section", "fields", "words"), BY_HAND)
def test_every_section_checks_its_types(section, fields, words):
    """Also where it is used without a whole config."""
    refused(words, section(**fields).validate)


def test_the_other_sections_too():
    refused("mesh.data='2': must be an integer", MeshConfig(data="2").sizes, 2)
    refused("did you mean valid", EvaluationConfig(split="validation").validate, 128)
    refused("norm='Layernorm'.*did you mean", Decoder, DecoderConfig(norm="Layernorm"), None)


@pytest.mark.parametrize("name", fields_module.ALIASES)
def test_aliases_are_of_choices(name):
    """What is suggested exists."""
    sections = [field.default_factory for field in dataclasses.fields(Config)]
    hints = [hint for section in sections for hint in typing.get_type_hints(section).values()]
    words = {word for hint in hints for word in re.findall(r"'(\w+)'", str(hint))}
    assert fields_module.ALIASES[name] in words and name not in words


def test_integers_pass_for_floats():
    config = Config(
        optimizer=OptimizerConfig(clip_norm=1), model=DecoderConfig(slopes=(1, 1, 1, 1, 1, 1, 1, 1))
    )
    config.validate(1)


LIMITS = [
    ("optimizer", {"learning_rate": 0.0}, r"learning_rate=0.0: must be above 0.0 and at most 1000"),
    ("optimizer", {"beta1": 1.0}, "beta1=1.0: must be at least 0 and below 1"),
    ("optimizer", {"final_fraction": 1.5}, "must be at least 0.0 and at most 1.0"),
    ("optimizer", {"clip_norm": 0.0}, "clip_norm=0.0: must be above 0"),
    ("optimizer", {"warmup_steps": 501}, "warmup_steps=501 is more than .*num_steps=500: warm up"),
    ("optimizer", {"decay_fraction": 0.0}, "must be above 0.0 and at most 1.0"),
    (
        "optimizer",
        {"schedule": "wsd", "decay_fraction": 0.95},
        "warmup_steps=50 is beyond step 25 of 500, where decay_fraction=0.95 begins: make one",
    ),
    ("training", {"num_steps": 0}, "num_steps=0: must be at least 1 and at most 2147483647"),
    ("training", {"num_steps": 2**31}, "must be at least 1 and at most 2147483647"),
    ("training", {"seed": 2**32}, "seed=4294967296: must be at least 0 and at most 4294967295"),
    ("training", {"keep_checkpoints": 0}, "must be at least 1"),
    ("training", {"keep_best": True, "validate_every": 0}, "keep_best=true needs validation"),
    ("data", {"batch_size": 12}, "batch_size=12 does not divide .*use a multiple of 8"),
    ("training", {"gradient_accumulation": 3}, "3 microbatch.*use a multiple of 24"),
    ("mesh", {"data": 3}, r"data=3.* does not fill 8 device\(s\): the product"),
    ("mesh", {"fsdp": 16}, "does not fill 8 device"),
    ("mesh", {"data": 0}, "each size must be at least 1"),
    ("mesh", {"fsdp": -1}, "at most one may be -1"),
]


@pytest.mark.parametrize(("section", "fields", "words"), LIMITS)
def test_limits(section, fields, words):
    changed = dataclasses.replace(getattr(Config(), section), **fields)
    config = dataclasses.replace(Config(), **{section: changed})
    refused(words, config.validate, 8)


def test_what_is_sharded_must_divide():
    model = DecoderConfig(num_heads=6, embed_dim=48, mlp_dim=64)
    refused(
        "num_heads=6 .* 4 devices of the tensor axis: use a multiple of 4",
        sharded(model, tensor=4),
        8,
    )
    model = DecoderConfig(num_heads=8, num_kv_heads=2)
    refused("num_kv_heads=2 does not divide", sharded(model, tensor=4), 8)
    refused("mlp_dim=42 does not divide", sharded(DecoderConfig(mlp_dim=42), tensor=4), 8)
    model = DecoderConfig(num_heads=2, embed_dim=12)
    refused(
        "embed_dim=12 .* 8 devices of the fsdp axis: use a multiple of 8", sharded(model, fsdp=8), 8
    )
    sharded(DecoderConfig(), fsdp=2, tensor=4)(8)
    model = DecoderConfig(embed_dim=64, adaptive_cutoffs=(20, 60))
    refused("width 4, of the last band, do not divide over 8", sharded(model, fsdp=8), 8)
    sharded(model, fsdp=4)(8)
    odd = dataclasses.replace(Config(), data=DataConfig(sequence_length=132))
    odd = dataclasses.replace(odd, mesh=MeshConfig(context=8))
    refused(
        "sequence_length=132 .* 8 devices of the context axis: use a multiple of 8", odd.validate, 8
    )
    for options in ({"position": "forgetting"}, {"sink": True}):
        refused("mesh.context=8 divides", sharded(DecoderConfig(**options), context=8), 8)
        sharded(DecoderConfig(**options), data=8)(8)


def sharded(model, **mesh):
    return Config(model=model, mesh=MeshConfig(**mesh)).validate


def test_describe_round_trips(plain):
    changed = Config(
        model=DecoderConfig(slopes=(0.5, 0.25), num_heads=2, qk_norm="full", clip_qkv=8.0),
        data=DataConfig(source="files:a b/{split}=*.txt", text_field="body", cache_dir="~/x y"),
        optimizer=OptimizerConfig(learning_rate=1e-7, schedule="linear"),
        training=TrainingConfig(seed=2**32 - 1),
        evaluation=EvaluationConfig(multiples=(1,), split="valid"),
        mesh=MeshConfig(data=-1, fsdp=2),
    )
    shipped = [runpy.run_path(str(path))["get_config"]() for path in SHIPPED]
    for config in (Config(), changed, *shipped):
        lines = list(describe(config))
        pairs = [line.removeprefix("--config.").split("=", 1) for line in lines]
        num_fields = sum(len(dataclasses.fields(getattr(config, f.name))) for f in fields(Config))
        assert len(dict(pairs)) == len(lines) == num_fields
        assert load_config(plain, dict(pairs)) == config


def fields(cls):
    return dataclasses.fields(cls)


def test_all_sections_have_defaults():
    Config().validate(1)
    assert Config().to_dict()["evaluation"]["multiples"] == EvaluationConfig().multiples
