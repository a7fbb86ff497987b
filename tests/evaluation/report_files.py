"""Directories of runs and comparisons, as the commands leave them."""

import itertools
import json
import math

import numpy as np

from alibi_jax.config import Config
from alibi_jax.data.tokenizers import ByteTokenizer
from alibi_jax.evaluation import Windows, summarize, write_json
from alibi_jax.evaluation.ngrams import NgramLosses
from alibi_jax.models import DecoderConfig

VERSIONS = {"alibi_jax": "0.1.0", "jax": "0.10.2", "python": "3.11.7", "device": "cpu"}


def config(position="alibi", **model):
    fields = {"num_layers": 2, "embed_dim": 64, "position": position} | model
    return Config(model=DecoderConfig(**fields)).to_dict()


def summary(growth=0.0, lengths=(16, 32, 64), num_documents=4):
    """Losses about 2 nats, which grow with every doubling by a fraction of themselves."""
    rng = np.random.default_rng(0)
    level = rng.gamma(16, 1 / 8, size=(8, lengths[-1])).astype(np.float32)
    losses = {
        length: (level * (1 + growth * math.log2(length / lengths[0]))).astype(np.float32)
        for length in lengths
    }
    tokens = np.zeros((8, lengths[-1] + 1), np.int32)
    windows = Windows(tokens, np.arange(8) % num_documents, "document", np.ones_like(tokens))
    return summarized(losses, windows, level + 1.0)


def summarized(losses, windows, trigrams, num_bootstrap=100):
    """A summary of losses beside those of trigrams, with shorter n-grams a nat above each other."""
    return summarize(
        losses,
        NgramLosses({n: trigrams + 3.0 - n for n in (1, 2, 3)}, 10**6),
        windows,
        {"ngram": 13, "share": 0.05, "num_searched": 10**6},
        train_length=min(losses),
        num_targets=8,
        tokenizer=ByteTokenizer(),
        num_bootstrap=num_bootstrap,
        left_out=[],
    )


def run(directory, position="alibi", growth=0.0, **model):
    """What train.py leaves."""
    directory.mkdir(parents=True)
    settings = config(position, **model)
    (directory / "config.json").write_text(json.dumps({"config": settings, "stream": {}}))
    whole = summary(growth) | {"config": settings, "versions": VERSIONS}
    write_json(whole, directory / "extrapolation.json")
    steps = range(10, 110, 10)
    lines = [
        {"step": n, "loss": 4 - n / 50, "bits_per_byte": 6 - n / 40, "step_seconds_p50": 0.02}
        for n in steps
    ]
    lines.insert(5, {"step": 50, "validation_loss": 3.1, "validation_bits_per_byte": 4.5})
    (directory / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return directory


def evaluated(directory, position="alibi", growth=0.0, **model):
    """What train.py and then `alibi eval` leave."""
    run(directory, position, growth, **model)
    whole = json.loads((directory / "extrapolation.json").read_text())
    level = {key: whole["protocols"]["fixed_targets"][0][key] for key in ("bits_per_byte",)}
    level |= {"nats_per_token": 2.0, "interval": [1.9, 2.1]}
    change = {"change": 0.02, "change_interval": [0.01, 0.03]}
    change |= {"relative_change": 0.01, "relative_change_interval": [0.005, 0.015]}
    sliding = [
        {**entry, "stride": 4, "cost": 4.0} for entry in whole["protocols"]["nonoverlapping"]
    ]
    heads = [
        {
            "layer": layer,
            "head": head,
            "keys": [2.5 * 2**head, 8.0 * 2**head, 20.0 * 2**head],
            "intervals": None,
            "slope": 2.0 ** -(head + 1) if position == "alibi" else None,
            "slope_keys": [2, 5, 10] if position == "alibi" else None,
        }
        for layer, head in itertools.product(range(2), range(4))
    ]
    cells = itertools.product((16, 32, 64), (0.0, 0.5, 1.0))
    needle = [
        {
            "length": length,
            "depth": depth,
            "distance": 10,
            "accuracy": 1.0 if length < 64 else 0.25,
            "interval": [0.9, 1.0] if length < 64 else [0.1, 0.5],
        }
        for length, depth in cells
    ]
    task = {"chance": 0.1, "margin": 0.1, "num_trials": 16, "num_symbols": 5}
    whole["protocols"] |= {
        "sliding_window": sliding,
        "by_position": {
            "length": 64,
            "entries": [{"start": a, "stop": b, **level} for a, b in ((0, 8), (8, 16), (16, 64))],
        },
        "truncated_input": [
            {"context": context, "least_context": 1, **level, **change} for context in (32, 64)
        ],
        "truncation": [
            {"window": window, "length": 64, **level, **change} for window in (32, 48, 64)
        ],
        "attention_mass": {
            "length": 64,
            "num_queries": 8,
            "quantiles": [0.5, 0.9, 0.99],
            "heads": heads,
        },
        "needle": {**task, "entries": needle},
        "recall": {**task, "entries": [entry for entry in needle if entry["depth"] == 0.5]},
    }
    whole["verdict"] = {
        "floors": whole["verdict"]["floors"],
        "learned": True,
        "text": "Holds to 64 tokens [32, 64] (paired, within 1%).",
        "warning": "nonoverlapping windows alone would mislead: at 64 tokens.",
        "details": "The loss holds to 64 tokens.",
        "holds_to": 64,
        "holds_to_interval": [32, 64],
        "holds_to_protocol": "fixed_targets",
        "uses_context_to": 32,
        "uses_context_to_interval": [32, 48],
        "uses_context_to_protocol": "truncated_input",
        "retrieves_to": 0,
        "retrieves_to_interval": [0, 16],
        "retrieves_to_protocol": "needle",
    }
    whole["left_out"] = ["evaluation lengths left out: 128"]
    whole |= {"step": 100, "tokens_sha256": "ab"}
    write_json(whole, directory / "evaluation.json")
    return directory
