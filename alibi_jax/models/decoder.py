"""A causal language model whose only sense of position is its position method."""

import operator

import jax
import jax.numpy as jnp
from flax import nnx

from alibi_jax.errors import UserError
from alibi_jax.models.adaptive import AdaptiveVocabulary
from alibi_jax.models.config import DecoderConfig
from alibi_jax.models.layers import Block, Norm, dropout, normal_param
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
      embedding: f32[V, M], drawn from N(0, 1/M); None with adaptive cutoffs.
      vocabulary: what stands for the embedding and the head with adaptive cutoffs, else None.
      blocks: one `Block` whose parameters are stacked over layers in their first axis, whether
        layers are scanned or unrolled.
      head: f32[V, M], or None when tied to the embedding.

    `decoder(tokens)` gives logits. To train or to score, `decoder.token_losses(tokens, targets)`
    gives the cross-entropy without the logits of all tokens in memory.
    """

    def __init__(self, config: DecoderConfig, rngs: nnx.Rngs):
        """Draws the parameters; raises UserError for a config that no model can have."""
        config.validate()
        if config.vocab_size is None:
            raise UserError("config.model.vocab_size must be given: the number of tokens")
        self.config = config
        shape, axes, std = (
            (config.vocab_size, config.embed_dim),
            (None, "embed"),
            config.embed_dim**-0.5,
        )
        adaptive = config.adaptive_cutoffs is not None
        self.vocabulary = AdaptiveVocabulary(config, rngs) if adaptive else None
        self.embedding = None if adaptive else normal_param(rngs, shape, axes, std)
        self.position = POSITION_METHODS[config.position](config)
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
    ) -> Logits:
        """Next-token logits.

        Args:
          tokens: i32[B, T], each at least 0 and below the vocabulary size.
          segment_ids: i32[B, T]; attention stays among equal ids. None: one segment.
          positions: i32[B, T]; None: 0 .. T-1.
          key: turns dropout on; None (evaluation) leaves it off.

        Returns:
          f32[B, T, V]; with adaptive cutoffs they are log-probabilities.
        """
        key, end_key = (None, None) if key is None else jax.random.split(key)
        hidden = self.hidden(tokens, segment_ids=segment_ids, positions=positions, key=key)
        if self.vocabulary is not None:
            return self.vocabulary.logits(hidden, end_key)
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
    ) -> Losses:
        """Cross-entropy of a target after each token; only some tokens' logits exist at a time.

        Args:
          tokens: As of the call, like the other arguments.
          targets: i32[B, T], the token that follows each of `tokens`.
          segment_ids: i32[B, T] or None.
          positions: i32[B, T] or None.
          key: turns dropout on.

        Returns:
          Cross-entropy in nats, f32[B, T], and the log-normaliser of the logits (with adaptive
          cutoffs, of the head's), f32[B, T].
        """
        key, end_key = (None, None) if key is None else jax.random.split(key)
        hidden = self.hidden(tokens, segment_ids=segment_ids, positions=positions, key=key)
        if self.vocabulary is not None:
            return self.vocabulary.token_losses(hidden, targets, end_key)
        return softmax_losses(hidden, self._head(), targets, self.config.logit_scale)

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
    ) -> Activations:
        """Activations after the last block and the final norm, [B, T, M] in `config.dtype`."""
        config, dtype = self.config, jnp.dtype(self.config.dtype)
        batch, length = tokens.shape
        # Sharded as the tokens: else every device would hold sinusoids of the whole batch.
        index = jnp.broadcast_to(
            jnp.arange(length)[None], (batch, length), out_sharding=spec("batch", "length")
        )
        if self.vocabulary is not None:
            x = self.vocabulary.embed(tokens)
        else:
            assert self.embedding is not None
            table = replicate(self.embedding[...])
            x = table.at[tokens].get(out_sharding=spec("batch", "length", None))
        x = (config.embed_scale * x).astype(dtype)
        x = self.position.embed(x, index if positions is None else positions)
        if self.embed_norm is not None:
            x = self.embed_norm(x)

        keys = None
        if key is not None:
            key, embed_key = jax.random.split(key)
            x = dropout(x, config.dropout, embed_key)
            keys = jax.random.split(key, config.num_layers)
        slopes = self.position.slopes()

        def layer(x, block_and_key):
            block, layer_key = block_and_key
            return block(x, slopes, positions, segment_ids, layer_key), None

        if config.remat != "none":
            # A scan keeps XLA from undoing it, which else takes barriers.
            prevent_cse = not config.scan_layers
            layer = jax.checkpoint(layer, policy=SAVED[config.remat], prevent_cse=prevent_cse)
        if config.scan_layers:
            x, _ = jax.lax.scan(layer, x, (self.blocks, keys))
        else:
            for i in range(config.num_layers):
                x, _ = layer(x, jax.tree.map(operator.itemgetter(i), (self.blocks, keys)))

        return x if self.final_norm is None else self.final_norm(x)
