"""Adaptive input embeddings and adaptive softmax for a vocabulary of whole words.

Words are numbered from the most to the least frequent and cut into bands. Rarer bands have narrower
embeddings, each with a projection to the width of the model (adaptive input, Baevski & Auli 2019,
arXiv:1809.10853). The output is a softmax over the first band's words and one class for every other
band, then within a band a softmax of its own (adaptive softmax, Grave et al. 2017,
arXiv:1609.04309). Tables and projections serve at both ends, as in fairseq's
`transformer_lm_wiki103` (tie_adaptive_weights, tie_adaptive_proj); nothing has a bias.
"""

import itertools

import jax
import jax.numpy as jnp
from flax import nnx

from alibi_jax.models.config import DecoderConfig
from alibi_jax.models.layers import dropout, normal_param
from alibi_jax.models.softmax import (
    Losses,
    class_logits,
    cross_entropy,
    in_chunks,
    on_each_device,
)
from alibi_jax.sharding import replicate, spec
from alibi_jax.typing import Activations, Array, Float, Int, Logits, Tokens


class Band(nnx.Module):
    """Words start .. stop - 1.

    Attributes:
      table: f32[stop - start, D], drawn from N(0, `config.vocabulary_std(D)`^2).
      projection: f32[D, M], of the variance of Glorot and Bengio (2010).
    """

    def __init__(self, config: DecoderConfig, rngs: nnx.Rngs, start: int, stop: int, dim: int):
        self.start, self.stop = start, stop
        std = config.vocabulary_std(dim)
        self.table = normal_param(rngs, (stop - start, dim), (None, "embed"), std)
        std = (2.0 / (dim + config.embed_dim)) ** 0.5
        self.projection = normal_param(rngs, (dim, config.embed_dim), (None, "embed"), std)

    def locate(self, tokens: Int[Array, "..."]) -> tuple[Int[Array, "..."], Array]:
        """Row of each token in the table (0 if it is of another band), and whether it is here."""
        inside = (tokens >= self.start) & (tokens < self.stop)
        return jnp.where(inside, tokens - self.start, 0), inside


class AdaptiveVocabulary(nnx.Module):
    """Both ends of a decoder: words to activations, activations to words.

    Attributes:
      bands: from frequent to rare; the first is the head, the others are tails.
      clusters: f32[number of tails, M], the output weights of the classes that stand for tails.
    """

    def __init__(self, config: DecoderConfig, rngs: nnx.Rngs):
        assert config.adaptive_cutoffs is not None and config.vocab_size is not None
        bounds = (0, *config.adaptive_cutoffs, config.vocab_size)
        self.bands = nnx.List(
            Band(config, rngs, start, stop, dim)
            for (start, stop), dim in zip(
                itertools.pairwise(bounds), config.band_dims(), strict=True
            )
        )
        shape = (len(self.bands) - 1, config.embed_dim)
        std = config.vocabulary_std(config.embed_dim)
        self.clusters = normal_param(rngs, shape, (None, "embed"), std)
        self.dtype, self.dropout = jnp.dtype(config.dtype), config.adaptive_dropout

    def embed(self, tokens: Tokens) -> Activations:
        """Embeddings of the tokens, f32[B, T, M]."""
        x = jnp.zeros((), jnp.float32)
        for band in self.bands:
            index, inside = band.locate(tokens)
            rows = (
                replicate(band.table[...]).at[index].get(out_sharding=spec("batch", "length", None))
            )
            rows = jnp.where(inside[..., None], rows, 0.0).astype(self.dtype)
            x = x + jnp.einsum(
                "btd,dm->btm",
                rows,
                band.projection[...].astype(self.dtype),
                preferred_element_type=jnp.float32,
                out_sharding=spec("batch", "length", None),
            )
        return x

    def logits(self, hidden: Activations, key: jax.Array | None) -> Logits:
        """Log-probabilities of all words, f32[B, T, V]; `key` turns dropout on."""

        def log_softmax(x: Float[Array, "B T D"], table: Float[Array, "V D"]) -> Logits:
            logits = jnp.einsum(
                "btd,vd->btv",
                x,
                table.astype(x.dtype),
                preferred_element_type=jnp.float32,
                out_sharding=spec("batch", "length", None),
            )
            return jax.nn.log_softmax(logits)

        head = log_softmax(hidden, self._head())
        num_words = self.bands[0].stop
        parts = [head[..., :num_words]]
        for i, x in enumerate(self._tails(hidden, key)):
            tail = log_softmax(x, self.bands[i + 1].table[...])
            parts.append(head[..., num_words + i, None] + tail)
        return jnp.concatenate(parts, axis=-1)

    def token_losses(self, hidden: Activations, targets: Tokens, key: jax.Array | None) -> Losses:
        """Cross-entropy of each target in nats and the log-normaliser of the head, two f32[B, T].

        A tail is computed for a whole chunk of tokens, since shapes are static, or not at all where
        none of them needs it. Each device sorts its tokens by target first, so for most chunks it
        is not at all: with the WikiText-103 cutoffs the head costs 20M multiplications a token and
        the tails 24M more, against 202M in the layers.
        """

        def losses(tokens, weights):
            *_, targets = tokens
            order = jnp.argsort(targets)
            tokens = tuple(x[order] for x in tokens)
            head, tables = weights

            def chunk(hidden, *tails_and_targets):
                *tails, targets = tails_and_targets
                return self._chunk_losses(hidden, tails, targets, head, tables)

            num_classes = self.bands[-1].stop + len(tables)
            sorted_losses = in_chunks(chunk, tokens, num_classes=num_classes)
            nats, log_z = (x.at[order].set(x, unique_indices=True) for x in sorted_losses)
            return nats, log_z

        tokens = (hidden, *self._tails(hidden, key), targets)
        weights = self._head(), [band.table[...] for band in list(self.bands)[1:]]
        return on_each_device(losses, tokens, weights)

    def _chunk_losses(self, hidden, tails, targets, head, tables) -> Losses:
        """Losses of [N] targets, from hidden [N, M] and its projections to the tails [N, D]."""
        num_words, tail_bands = self.bands[0].stop, list(self.bands)[1:]
        # In the head a word of a tail is the class of that tail.
        tail = sum((targets >= band.start).astype(jnp.int32) for band in tail_bands)
        classes = jnp.where(tail == 0, targets, num_words + tail - 1)
        nats, log_z = cross_entropy(class_logits(hidden, head), classes)
        for band, x, table in zip(tail_bands, tails, tables, strict=True):
            index, inside = band.locate(targets)

            def add(nats, x=x, table=table, index=index, inside=inside):
                tail_nats, _ = cross_entropy(class_logits(x, table), index)
                return nats + jnp.where(inside, tail_nats, 0.0)

            nats = jax.lax.cond(jnp.any(inside), add, lambda nats: nats, nats)
        return nats, log_z

    def _head(self) -> Float[Array, "V M"]:
        """Output weights of the head's classes: its words, then the tails."""
        return jnp.concatenate([self.bands[0].table[...], self.clusters[...]])

    def _tails(self, hidden: Activations, key: jax.Array | None) -> list[Float[Array, "B T D"]]:
        """Projections of hidden to the width of each tail; `key` turns dropout on."""
        bands = list(self.bands)[1:]
        keys = [None] * len(bands) if key is None else jax.random.split(key, len(bands))

        def project(band: Band, key: jax.Array | None) -> Float[Array, "B T D"]:
            kernel = band.projection[...].astype(hidden.dtype)
            x = jnp.einsum(
                "btm,dm->btd", hidden, kernel, out_sharding=spec("batch", "length", None)
            )
            return dropout(x, self.dropout, key)

        return [project(band, key) for band, key in zip(bands, keys, strict=True)]
