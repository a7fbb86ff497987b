"""TensorFlow Datasets, on real ArrayRecord files and with TensorFlow never imported."""

import os
import subprocess
import sys
import textwrap

import pytest

from alibi_jax.data import DataConfig, load_corpus
from alibi_jax.errors import UserError

# In processes of their own: TFDS registers builders for good, and so does an import of TensorFlow.
PREPARE = """
import sys
import numpy as np
import tensorflow_datasets as tfds

class Books(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict({
            "book_text": tfds.features.Text(), "title": tfds.features.Text(), "pages": np.int32}))

    def _split_generators(self, _):
        return {"train": self._generate_examples("train", 60),
                "test": self._generate_examples("test", 3)}

    def _generate_examples(self, split, count):
        for i in range(count):
            yield i, {"book_text": f"{split} {i} äöü", "title": "t", "pages": i}

Books(data_dir=sys.argv[1], file_format="array_record").download_and_prepare()
"""

READ = """
import sys
from alibi_jax.data import DataConfig, load_corpus

corpus = load_corpus(DataConfig(source="tfds:books", cache_dir=sys.argv[1]))
def texts(split):
    return [corpus.tokenizer.decode(split.document(i)) for i in range(split.num_documents)]
train, valid, test = map(texts, (corpus.train, corpus.valid, corpus.test))
assert sorted(train + valid) == sorted(f"train {i} äöü" for i in range(60)), train
assert valid and not set(train) & set(valid), valid
assert sorted(test) == [f"test {i} äöü" for i in range(3)], test
assert "tensorflow" not in sys.modules
print(corpus.fingerprint)
"""


def python(program, *arguments, **environment):
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program), *map(str, arguments)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()[-1:]


def test_array_record_by_name_without_tensorflow(tmp_path):
    python(PREPARE, tmp_path / "data")
    first = python(READ, tmp_path / "cache", TFDS_DATA_DIR=str(tmp_path / "data"))
    assert first == python(READ, tmp_path / "cache", TFDS_DATA_DIR=str(tmp_path / "data"))


def test_unknown_name(tmp_path, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    with pytest.raises(UserError) as caught:
        load_corpus(DataConfig(source="tfds:no_such_set"))
    message = str(caught.value)
    assert "\n" not in message
    for words in ("'tfds:no_such_set'", str(tmp_path), "not found", "tfds.data_source('no_such"):
        assert words in message


def test_failed_download(tmp_path, monkeypatch):
    tfds = pytest.importorskip("tensorflow_datasets")

    def offline(*_, **__):
        raise ConnectionError("Name or service not known\nmore")

    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    monkeypatch.setattr(tfds.core.DatasetBuilder, "download_and_prepare", offline)
    with pytest.raises(UserError, match=r"Name or service not known\); set TFDS_DATA_DIR"):
        load_corpus(DataConfig(source="tfds:tiny_shakespeare"))


def test_mocked_examples_are_text_too(tmp_path):
    tfds = pytest.importorskip("tensorflow_datasets")
    with tfds.testing.mock_data(num_examples=40):
        corpus = load_corpus(DataConfig(source="tfds:lm1b", cache_dir=str(tmp_path)))
    assert corpus.train.num_documents + corpus.valid.num_documents > 0
