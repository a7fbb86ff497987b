"""Corpora and data sets that several tests read."""

import pytest

from alibi_jax.data import DataConfig, load_corpus


@pytest.fixture(scope="session")
def stdlib_config(tmp_path_factory):
    return DataConfig(cache_dir=str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(scope="session")
def stdlib_corpus(stdlib_config):
    return load_corpus(stdlib_config)
