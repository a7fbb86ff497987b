"""Text to tokens to packed batches.

Data flows one way: a source of documents (`DataConfig.source`), tokens cached on disk
(`load_corpus`), batches in an order that only a seed decides (`batches`).
"""

from alibi_jax.data.batches import batches, stream_identity, training_iterator
from alibi_jax.data.config import DataConfig
from alibi_jax.data.corpus import Corpus, TokenizedSplit, load_corpus
from alibi_jax.data.tokenizers import Tokenizer

__all__ = [
    "Corpus",
    "DataConfig",
    "TokenizedSplit",
    "Tokenizer",
    "batches",
    "load_corpus",
    "stream_identity",
    "training_iterator",
]
