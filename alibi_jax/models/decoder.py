"""A causal language model whose only sense of position is its position method."""

import operator

import jax
import jax.numpy as jnp
from flax import nnx

from alibi_jax.errors import UserError
from alibi_jax.models.config import DecoderConfig
from alibi_jax.models.layers import Block, Norm, dropout, normal_param
from alibi_jax.models.positions import POSITION_METHODS
from alibi_jax.sharding import replicate, spec
from alibi_jax.typing import Logits, QueryPositions, SegmentIds, Tokens


class Decoder(nnx.Module):
    """A pre-norm decoder.

    Attributes:
      embedding: f32[V, M], drawn from N(0, 1/M).
      blocks: one `Block` whose parameters are stacked over layers in their first axis, whether
        layers are scanned or unrolled.
      head: f32[V, M], or None when tied to the embedding.
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
        self.embedding = normal_param(rngs, shape, axes, std)
        self.position = POSITION_METHODS[config.position](config)
        self.embed_norm = Norm(config, (config.embed_dim,)) if config.embed_norm else None
        layer_rngs = rngs.split(config.num_layers)
        self.blocks = jax.vmap(lambda rngs: Block(config, rngs))(layer_rngs)
        self.final_norm = Norm(config, (config.embed_dim,))
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
          f32[B, T, V].
        """
        config, dtype = self.config, jnp.dtype(self.config.dtype)
        batch, length = tokens.shape
        index = jnp.broadcast_to(jnp.arange(length)[None], (batch, length))
        embedding = replicate(self.embedding[...])
        x = embedding.at[tokens].get(out_sharding=spec("batch", "length", None))
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

        if config.remat:
            layer = jax.checkpoint(layer)
        if config.scan_layers:
            x, _ = jax.lax.scan(layer, x, (self.blocks, keys))
        else:
            for i in range(config.num_layers):
                x, _ = layer(x, jax.tree.map(operator.itemgetter(i), (self.blocks, keys)))

        head = self.embedding if self.head is None else self.head
        logits = jnp.einsum(
            "btm,vm->btv",
            self.final_norm(x),
            head[...].astype(dtype),
            preferred_element_type=jnp.float32,
            out_sharding=spec("batch", "length", None),
        )
        return config.logit_scale * logits
