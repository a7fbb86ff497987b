"""Every shipped config and variant loads, has the size that it states, and trains if it is tiny."""

import dataclasses
import json
import math
import pathlib
import random
import re
import runpy

import jax
import pytest
from flax import nnx

from alibi_jax.config import load_config
from alibi_jax.data import load_corpus
from alibi_jax.models import Decoder
from alibi_jax.sharding import make_mesh
from alibi_jax.training import loop
from tests.texts import draw_words

CONFIGS = pathlib.Path(__file__).parents[1] / "configs"
# Of the models of the two papers' configs. The first is what the paper calls 247M, exactly; both
# follow from the sizes that the papers give.
PARAMETERS = {
    "wikitext103": 246_933_504,
    "paper_1p3b": 25 * (4 * (2048**2 + 2048) + 2 * 2048 * 8192 + 8192 + 2048 + 4 * 2048)
    + 50_304 * 2048
    + 2 * 2048,
}


def shipped():
    """Paths of files, and of each variant of a file."""
    for file in sorted(CONFIGS.glob("*.py")):
        yield str(file)
        for variant in runpy.run_path(str(file)).get("VARIANTS", ()):
            yield f"{file}:{variant}"


def name(path):
    return path.removeprefix(f"{CONFIGS}/")


def vocab_size(config):
    tokenizer = config.data.tokenizer
    return 257 if tokenizer == "bytes" else int(tokenizer.split(":")[1])


def count_parameters(model):
    params = jax.eval_shape(lambda: nnx.state(Decoder(model, nnx.Rngs(0)), nnx.Param))
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))


@pytest.mark.parametrize("path", list(shipped()), ids=name)
def test_config(path):
    config = load_config(path, {})
    config.validate(8)
    config.validate(1)
    file, _, variant = path.partition(":")
    header = pathlib.Path(file).read_text().split('"""')[1]
    assert re.search(rf"--config=configs/{pathlib.Path(file).name}", header)
    assert variant in header
    model = config.model
    assert model.embed_scale == model.embed_dim**0.5  # or sinusoids of amplitude 1 drown the tokens
    if model.vocab_size is None:
        model = dataclasses.replace(model, vocab_size=vocab_size(config))
    assert model.vocab_size >= vocab_size(config)
    count = count_parameters(model)
    if variant == "tiny":
        assert count < 1e6
        return
    stated = re.search(r"(?:about )?([\d.]+)([MB]) parameters", header)
    assert stated, header
    assert count == pytest.approx(float(stated[1]) * {"M": 1e6, "B": 1e9}[stated[2]], rel=0.06)
    stem = pathlib.Path(file).stem
    assert count == PARAMETERS.get(stem, count)


@pytest.mark.parametrize("file", ["wikitext103", "paper_1p3b"])
def test_variants_differ_in_position_length_and_batch_alone(file):
    """As in the paper: nothing else changes."""
    path = CONFIGS / f"{file}.py"
    base = load_config(str(path), {})
    seen = set()
    for variant in runpy.run_path(str(path))["VARIANTS"]:
        if variant == "tiny":
            continue
        config = load_config(f"{path}:{variant}", {})
        method, length = re.fullmatch(r"([a-z]+)(\d+)", variant).groups()
        assert (config.model.position, config.data.sequence_length) == (method, int(length))
        tokens = config.data.batch_size * int(length)
        # Eight devices of at most 9216 words, and 2^21 tokens a step.
        assert (
            tokens
            == {
                "wikitext103": 8 * (9216 // int(length)) * int(length),
                "paper_1p3b": 1 << 21,
            }[file]
        )
        same = dataclasses.replace(
            config,
            model=dataclasses.replace(config.model, position=base.model.position),
            data=dataclasses.replace(
                config.data,
                sequence_length=base.data.sequence_length,
                batch_size=base.data.batch_size,
            ),
            evaluation=base.evaluation,
        )
        assert same == base
        seen.add((method, int(length)))
    twice = {("alibi", 512), ("sinusoidal", 1024), ("alibi", 1024), ("sinusoidal", 2048)}
    assert twice <= seen


@pytest.mark.parametrize("file", ["wikitext103", "paper_1p3b"])
def test_tiny_keeps_every_mechanism(file):
    """Only sizes differ: what is on in the whole model is on in the small one, and the reverse."""
    whole, tiny = (load_config(f"{CONFIGS / file}.py{variant}", {}) for variant in ("", ":tiny"))
    sizes = {"vocab_size", "num_layers", "embed_dim", "mlp_dim", "embed_scale", "adaptive_cutoffs"}
    for field in dataclasses.fields(whole.model):
        value, small = (getattr(config.model, field.name) for config in (whole, tiny))
        if field.name not in sizes | {"dtype"}:
            assert value == small, field.name
    for config in (whole, tiny):
        assert config.model.embed_scale == config.model.embed_dim**0.5
    cutoffs = [len(config.model.adaptive_cutoffs or ()) for config in (whole, tiny)]
    assert cutoffs[0] == cutoffs[1]
    kinds = [config.data.tokenizer.split(":")[0] for config in (whole, tiny)]
    assert kinds[0] == kinds[1]
    lengths = {"learning_rate", "warmup_steps"}
    for field in dataclasses.fields(whole.optimizer):
        if field.name not in lengths:
            value, small = (getattr(config.optimizer, field.name) for config in (whole, tiny))
            assert value == small, field.name


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """A folder with a corpus whose words are as unequal as those of a language."""
    folder, rng = tmp_path_factory.mktemp("text"), random.Random(0)
    words = draw_words(rng, 1500)
    weights = [1 / rank for rank in range(1, len(words) + 1)]
    for split, num_lines in (("train", 1000), ("valid", 40), ("test", 40)):
        lines = (" ".join(rng.choices(words, weights, k=12)) for _ in range(num_lines))
        (folder / f"{split}.tokens").write_text("\n".join(lines))
    return folder


@pytest.mark.parametrize("file", ["wikitext103", "paper_1p3b"])
def test_tiny_trains(file, text, tmp_path):
    config = load_config(
        f"{CONFIGS / file}.py:tiny",
        {
            "data.source": f"files:{text}/{{split}}.tokens",
            "data.cache_dir": str(tmp_path / "cache"),
            "training.num_steps": "16",
            "training.log_every": "1",
            "training.validate_every": "0",
            "optimizer.warmup_steps": "4",
            "data.tokenizer": {"wikitext103": "words:1000", "paper_1p3b": "bpe:300"}[file],
        },
    )
    config.validate(jax.device_count())
    corpus = load_corpus(config.data)
    model = dataclasses.replace(config.model, vocab_size=corpus.tokenizer.vocab_size)
    config = dataclasses.replace(config, model=model)
    mesh = make_mesh(config.mesh)
    with jax.set_mesh(mesh):
        program = loop.compile_program(config, mesh)
        (tmp_path / "run").mkdir()
        state, complete = loop.train(config, corpus, program, tmp_path / "run")
    assert complete and int(state.step) == 16
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    losses = [line["loss"] for line in map(json.loads, lines) if "loss" in line]
    assert len(losses) == 16 and losses[-1] < losses[0] - 0.2
