"""A tiny run: a corpus of 40 documents, a config, states and batches on any mesh."""

import dataclasses
import random

import jax
import numpy as np
import pytest

from alibi_jax.config import Config, OptimizerConfig, TrainingConfig
from alibi_jax.data import DataConfig, load_corpus
from alibi_jax.evaluation import EvaluationConfig
from alibi_jax.models import DecoderConfig
from alibi_jax.sharding import MeshConfig, make_mesh
from tests.texts import draw_words, write_texts

VOCAB = 32


@pytest.fixture(scope="session")
def config(tmp_path_factory):
    folder, rng = tmp_path_factory.mktemp("corpus"), random.Random(0)
    write_texts(folder, rng, draw_words(rng))
    return Config(
        model=DecoderConfig(num_layers=1, embed_dim=16, num_heads=2, vocab_size=257),
        data=DataConfig(
            source=f"files:{folder}/*.txt",
            sequence_length=16,
            batch_size=8,
            cache_dir=str(folder / "cache"),
        ),
        optimizer=OptimizerConfig(warmup_steps=2),
        training=TrainingConfig(
            num_steps=8,
            checkpoint_every=2,
            validate_every=4,
            validation_batches=2,
            log_every=1,
        ),
        evaluation=EvaluationConfig(
            multiples=(1, 2), num_windows=4, num_targets=8, tokens_per_batch=256, num_bootstrap=100
        ),
    )


@pytest.fixture(scope="session")
def corpus(config):
    return load_corpus(config.data)


@pytest.fixture(scope="session")
def changed():
    """A function that replaces fields, section by section."""

    def change(config, **sections):
        return dataclasses.replace(
            config,
            **{
                section: dataclasses.replace(getattr(config, section), **fields)
                for section, fields in sections.items()
            },
        )

    return change


@pytest.fixture(scope="session")
def model():
    return DecoderConfig(num_layers=2, embed_dim=16, num_heads=2, vocab_size=VOCAB)


@pytest.fixture(scope="session")
def meshes():
    """All devices for data, and two on every axis."""
    shapes = [(8, 1, 1), (2, 2, 2)]
    return {shape: make_mesh(MeshConfig(*shape)) for shape in shapes}


@pytest.fixture(scope="session")
def make_batch():
    """Gives a batch of which a fixed, uneven share is padding, as NumPy arrays."""

    def make(seed=0, batch=8, length=16, padding=True):
        rng = np.random.default_rng(seed)
        tokens = rng.integers(0, VOCAB, (batch, length + 1), dtype=np.int32)
        segment_ids = 1 + np.cumsum(rng.random((batch, length + 1)) < 0.1, axis=1, dtype=np.int32)
        if padding:  # row i keeps fewer and fewer tokens; the last rows keep none
            kept = np.maximum(length + 1 - 3 * np.arange(batch), 0)
            segment_ids[np.arange(length + 1)[None] >= kept[:, None]] = 0
        token_bytes = rng.integers(0, 9, tokens.shape, dtype=np.int32)
        return {"tokens": tokens, "segment_ids": segment_ids, "token_bytes": token_bytes}

    return make


@pytest.fixture(scope="session")
def to_numpy():
    """Gives {path: array} of a tree of arrays; PRNG keys as their data."""

    def convert(tree):
        def leaf(x):
            if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
                x = jax.random.key_data(x)
            return np.array(x)  # a copy: on CPU np.asarray shares the buffer

        return {
            jax.tree_util.keystr(path): leaf(value)
            for path, value in jax.tree_util.tree_leaves_with_path(tree)
        }

    return convert
