"""A causal language model whose only sense of position is its position method."""

import dataclasses
import itertools
import operator
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from alibi_jax.bias import as_window, values_of
from alibi_jax.errors import UserError
from alibi_jax.models.adaptive import AdaptiveVocabulary
from alibi_jax.models.block import Block, Row
from alibi_jax.models.cache import Cache, empty_cache
from alibi_jax.models.checks import as_ids
from alibi_jax.models.config import DecoderConfig
from alibi_jax.models.layers import Norm, dropout, normal_param
from alibi_jax.models.positions import POSITION_METHODS
from alibi_jax.models.softmax import Losses, softmax_losses
from alibi_jax.sharding import replicate, spec
from alibi_jax.typing import (
    Activations,
    Array,
    Float,
    Logits,
    QueryPositions,
    SegmentIds,
    Tokens,
)

# What a rematerialised layer keeps for its backward pass, besides its input.
SAVED = {
    # Products with a weight: most of the arithmetic. Attention's own have batch axes, and are as
    # large as its logits where these are held.
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}


class Decoder(nnx.Module):
    """A pre-norm decoder.

    Attributes:
      embedding: f32[V, M], drawn from N(0, `config.vocabulary_std`^2); None with adaptive cutoffs.
      vocabulary: what stands for the embedding and the head with adaptive cutoffs, else None.
      blocks: one `Block` whose parameters are stacked over layers in their first axis, whether
        layers are scanned or unrolled.
      position: the position method, with the parameters that layers share.
      head: f32[V, M], drawn as the embedding is, or None when tied to it.

    `decoder(tokens)` gives logits. To train or to score, `decoder.token_losses(tokens, targets)`
    gives the cross-entropy without the logits of all tokens in memory. To score a row that is too
    long for that, `decoder.chunk_losses` goes through it a chunk at a time.

    Tokens and targets outside the vocabulary, and chunks that a cache has no room for, raise
    ValueError. Inside `jit`, where values are not known, they give NaN.

    Methods check what they are given; what they compute is methods that are compiled, once for each
    shape, wherever they are called.
    """

    def __init__(self, config: DecoderConfig, rngs: nnx.Rngs):
        """Draws the parameters; raises UserError for a config that no model can have."""
        config.validate()
        if config.vocab_size is None:
            raise UserError("config.model.vocab_size must be given: the number of tokens")
        if config.needs_trained_length and config.trained_length is None:
            raise UserError(
                "config.model.trained_length must be given: the tokens of a training sequence, for "
                f"position={config.position} with length_scaling={config.length_scaling}"
            )
        self.config = config
        shape, axes = (config.vocab_size, config.embed_dim), (None, "embed")
        std = config.vocabulary_std(config.embed_dim)
        adaptive = config.adaptive_cutoffs is not None
        self.vocabulary = AdaptiveVocabulary(config, rngs) if adaptive else None
        self.embedding = None if adaptive else normal_param(rngs, shape, axes, std)
        self.position = POSITION_METHODS[config.position](config, rngs)
        self.embed_norm = Norm(config, (config.embed_dim,)) if config.embed_norm else None
        layer_rngs = rngs.split(config.num_layers)
        self.blocks = jax.vmap(lambda rngs: Block(config, rngs))(layer_rngs)
        self.final_norm = Norm(config, (config.embed_dim,)) if config.final_norm else None
        self.head = None if config.tie_embeddings else normal_param(rngs, shape, axes, std)

    def __call__(
        self,
        tokens: Tokens,
        *,
        segment_ids: SegmentIds | None = None,
        positions: QueryPositions | None = None,
        key: jax.Array | None = None,
        window: int | Array | None = None,
    ) -> Logits:
        """Next-token logits.

        Args:
          tokens: i32[B, T], each at least 0 and below the vocabulary size.
          segment_ids: i32[B, T]; attention stays among equal ids. None: one segment.
          positions: i32[B, T]; None: 0 .. T-1.
          key: turns dropout on; None (evaluation) leaves it off.
          window: every layer's tokens see only those at a distance below this, an integer of at
            least 1 that may be traced; None: no limit.

        Returns:
          f32[B, T, V]; with adaptive cutoffs they are log-probabilities.
        """
        key, end_key = (None, None) if key is None else jax.random.split(key)
        hidden = self.hidden(
            tokens, segment_ids=segment_ids, positions=positions, key=key, window=window
        )
        return self.logits(hidden, key=end_key)

    def logits(self, hidden: Activations, *, key: jax.Array | None = None) -> Logits:
        """Next-token logits of activations [B, T, M] of `hidden`, as the call's; `key` as there."""
        return self._logits(hidden, key)

    @jax.jit
    def _logits(self, hidden: Activations, key: jax.Array | None) -> Logits:
        if self.vocabulary is not None:
            return self.vocabulary.logits(hidden, key)
        logits = jnp.einsum(
            "btm,vm->btv",
            hidden,
            self._head().astype(hidden.dtype),
            preferred_element_type=jnp.float32,
            out_sharding=spec("batch", "length", None),
        )
        return self.config.logit_scale * logits

    def token_losses(
        self,
        tokens: Tokens,
        targets: Tokens,
        *,
        segment_ids: SegmentIds | None = None,
        positions: QueryPositions | None = None,
        key: jax.Array | None = None,
        window: int | Array | None = None,
    ) -> Losses:
        """Cross-entropy of a target after each token; only some tokens' logits exist at a time.

        Args:
          tokens: As of the call, like the other arguments.
          targets: i32[B, T], the token that follows each of `tokens`.
          segment_ids: i32[B, T] or None.
          positions: i32[B, T] or None.
          key: turns dropout on.
          window: an integer or None.

        Returns:
          Cross-entropy in nats, f32[B, T], and the log-normaliser of the logits (with adaptive
          cutoffs, of the head's), f32[B, T].
        """
        tokens, targets = self._pair(tokens, targets)
        key, end_key = (None, None) if key is None else jax.random.split(key)
        hidden = self.hidden(
            tokens, segment_ids=segment_ids, positions=positions, key=key, window=window
        )
        return self._losses(hidden, targets, end_key)

    @jax.jit
    def _losses(self, hidden: Activations, targets: Tokens, key: jax.Array | None) -> Losses:
        if self.vocabulary is not None:
            nats, log_z = self.vocabulary.token_losses(hidden, targets, key)
        else:
            scale = self.config.logit_scale
            nats, log_z = softmax_losses(hidden, self._head(), targets, scale)
        return jnp.where(self._in_vocabulary(targets), nats, jnp.nan), log_z

    def _ids(self, name: str, ids: Tokens) -> Tokens:
        assert self.config.vocab_size is not None
        return as_ids(name, ids, self.config.vocab_size)

    def _pair(self, tokens: Tokens, targets: Tokens) -> tuple[Tokens, Tokens]:
        tokens, targets = self._ids("tokens", tokens), self._ids("targets", targets)
        if targets.shape != tokens.shape:
            raise ValueError(
                f"targets must have the shape of the tokens, one for each, {tokens.shape}; got "
                f"{targets.shape}"
            )
        return tokens, targets

    def _in_vocabulary(self, ids: Tokens) -> Array:
        assert self.config.vocab_size is not None
        return (ids >= 0) & (ids < self.config.vocab_size)

    def _head(self) -> Float[Array, "V M"]:
        head = self.embedding if self.head is None else self.head
        assert head is not None
        return head[...]

    def hidden(
        self,
        tokens: Tokens,
        *,
        segment_ids: SegmentIds | None = None,
        positions: QueryPositions | None = None,
        key: jax.Array | None = None,
        window: int | Array | None = None,
    ) -> Activations:
        """Activations after the last block and the final norm, [B, T, M] in `config.dtype`."""
        return self._hidden(
            self._ids("tokens", tokens), segment_ids, positions, key, as_window(window)
        )

    @jax.jit
    def _hidden(
        self,
        tokens: Tokens,
        segment_ids: SegmentIds | None,
        positions: QueryPositions | None,
        key: jax.Array | None,
        window: Array | None,
    ) -> Activations:
        row = self._row(tokens, positions, segment_ids=segment_ids, window=window)
        x = self._embed(tokens, row)
        keys = None
        if key is not None:
            key, embed_key = jax.random.split(key)
            x = dropout(x, self.config.dropout, embed_key)
            keys = jax.random.split(key, self.config.num_layers)

        def layer(x, block_and_key):
            block, layer_key = block_and_key
            return block(x, row, layer_key)[0], None

        if self.config.remat != "none":
            # A scan keeps XLA from undoing it, which else takes barriers.
            prevent_cse = not self.config.scan_layers
            layer = jax.checkpoint(layer, policy=SAVED[self.config.remat], prevent_cse=prevent_cse)
        x, _ = self._through_layers(layer, x, keys)
        return x if self.final_norm is None else self.final_norm(x)

    def init_cache(self, batch: int, length: int) -> Cache:
        """An empty cache for rows of up to `length` tokens, for `chunk_losses`."""
        return empty_cache(self.config, batch, length, prefix=self.config.position == "forgetting")

    def chunk_losses(
        self, tokens: Tokens, targets: Tokens, cache: Cache, *, window: int | Array | None = None
    ) -> tuple[Losses, Cache]:
        """Losses of the tokens that follow those of the cache, as `token_losses` of whole rows has.

        A row read chunk by chunk gives what it gives in one pass, to rounding, in the memory of the
        cache and of one chunk. Whatever depends on the length of the row, as dynamic length scaling
        does, takes the length of the cache for it. One program serves all chunks of a size; donate
        the cache to `jax.jit` to update it in place.

        Args:
          tokens: i32[B, C].
          targets: i32[B, C].
          cache: of `init_cache`, or returned by the chunk before.
          window: as of the call.

        Returns:
          Cross-entropy in nats and log-normaliser, f32[B, C] each, and the cache with the tokens.
        """
        tokens, targets = self._pair(tokens, targets)
        hidden, cache = self.chunk_hidden(tokens, cache, window=window)
        return self._losses(hidden, targets, None), cache

    def chunk_hidden(
        self, tokens: Tokens, cache: Cache, *, window: int | Array | None = None
    ) -> tuple[Activations, Cache]:
        """Activations [B, C, M] as `hidden` has, of the tokens that follow those of the cache.

        For `logits`, say of the last one. The arguments are those of `chunk_losses`.
        """
        tokens, filled = self._ids("tokens", tokens), values_of(cache.filled)
        rows = cache.key.shape[1]
        if tokens.shape[0] != rows:
            raise ValueError(f"the cache is for {rows} rows, got {tokens.shape[0]}")
        held = 0 if filled is None else int(filled)
        if held + tokens.shape[1] > cache.length:
            raise ValueError(
                f"a chunk of {tokens.shape[1]} tokens does not fit a cache of {cache.length} that "
                f"holds {held}: give init_cache the length of the whole row"
            )
        return self._chunk_hidden(tokens, cache, as_window(window))

    @jax.jit
    def _chunk_hidden(
        self, tokens: Tokens, cache: Cache, window: Array | None
    ) -> tuple[Activations, Cache]:
        size = tokens.shape[1]
        positions = jnp.broadcast_to(
            (cache.filled + jnp.arange(size, dtype=jnp.int32))[None],
            tokens.shape,
            out_sharding=spec("batch", "length"),
        )
        row = self._row(tokens, positions, window=window, length=cache.length)

        def layer(x_and_cache, block_and_index):
            x, cache = x_and_cache
            block, index = block_and_index
            return block(x, row, None, cache, index), None

        (x, cache), _ = self._through_layers(
            layer,
            (self._embed(tokens, row), cache),
            jnp.arange(self.config.num_layers, dtype=jnp.int32),
        )
        x = x if self.final_norm is None else self.final_norm(x)
        cache = dataclasses.replace(cache, filled=cache.filled + size)
        return jnp.where(cache.filled <= cache.length, x, jnp.nan), cache

    def attention_mass(
        self, tokens: Tokens, edges: tuple[int, ...], num_queries: int
    ) -> Float[Array, "L B H N"]:
        """Where attention looks: the mean probability of the last queries by distance.

        Args:
          tokens: i32[B, T].
          edges: rising distances, above 0.
          num_queries: over how many of the last tokens the mean goes, at most T. A few at a time
            have their logits in memory.

        Returns:
          f32[layers, B, H, len(edges) + 1]: at distances below edges[0], from there to below
          edges[1], ..., and from the last edge on. They add up to 1.

        Raises:
          ValueError: edges do not rise from above 0, or num_queries is not within the row.
        """
        if not edges or any(low >= high for low, high in itertools.pairwise((0, *edges))):
            raise ValueError(f"edges must be distances above 0 that rise, got {edges}")
        if not 1 <= num_queries <= tokens.shape[1]:
            raise ValueError(
                f"num_queries must be from 1 to the number of tokens, {tokens.shape[1]}, "
                f"got {num_queries}"
            )
        return self._attention_mass(self._ids("tokens", tokens), tuple(edges), num_queries)

    @partial(jax.jit, static_argnames=("edges", "num_queries"))
    def _attention_mass(
        self, tokens: Tokens, edges: tuple[int, ...], num_queries: int
    ) -> Float[Array, "L B H N"]:
        row = self._row(tokens, None)

        def layer(x, block_and_index):
            block, _ = block_and_index
            mass = block.attention.mass(block.attention_norm(x), row, edges, num_queries)
            return block(x, row)[0], mass

        index = jnp.arange(self.config.num_layers, dtype=jnp.int32)
        return self._through_layers(layer, self._embed(tokens, row), index)[1]

    def _row(
        self,
        tokens: Tokens,
        positions: QueryPositions | None,
        *,
        segment_ids: SegmentIds | None = None,
        window: Array | None = None,
        length: int | None = None,
    ) -> Row:
        batch, num_tokens = tokens.shape
        # Sharded as the tokens: else every device would hold sinusoids of the whole batch.
        index = jnp.broadcast_to(
            jnp.arange(num_tokens, dtype=jnp.int32)[None],
            (batch, num_tokens),
            out_sharding=spec("batch", "length"),
        )
        return Row(
            self.position,
            index if positions is None else positions,
            positions,
            segment_ids,
            window,
            num_tokens if length is None else length,
        )

    def _embed(self, tokens: Tokens, row: Row) -> Activations:
        """Activations before the first block."""
        config = self.config
        if self.vocabulary is not None:
            x = self.vocabulary.embed(tokens)
        else:
            assert self.embedding is not None
            table = replicate(self.embedding[...])
            x = table.at[tokens].get(out_sharding=spec("batch", "length", None))
        x = jnp.where(self._in_vocabulary(tokens)[..., None], config.embed_scale * x, jnp.nan)
        x = x.astype(jnp.dtype(config.dtype))
        x = self.position.embed(x, row.positions)
        return x if self.embed_norm is None else self.embed_norm(x)

    def _through_layers(self, layer: Callable, carry: Any, of_layers: Any) -> tuple[Any, Any]:
        """`jax.lax.scan` of `layer(carry, (block, of_layer))`, or the same unrolled."""
        per_layer = (self.blocks, of_layers)
        if self.config.scan_layers:
            return jax.lax.scan(layer, carry, per_layer)
        outputs = []
        for i in range(self.config.num_layers):
            carry, output = layer(carry, jax.tree.map(operator.itemgetter(i), per_layer))
            outputs.append(output)
        return carry, jax.tree.map(lambda *x: jnp.stack(x), *outputs)
