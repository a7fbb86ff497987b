"""Model FLOPs of training: what MFU is made of, with the peaks in `alibi_jax.training.chips`.

MFU (model FLOPs utilisation; PaLM, Chowdhery et al. 2022, appendix B) is the rate at which a run
does the arithmetic that its model defines, divided by the peak rate of its devices.
"""

import itertools

from alibi_jax.models import DecoderConfig
from alibi_jax.models.positions.fire import WIDTH as FIRE_WIDTH


def flops_per_token(config: DecoderConfig, length: int) -> float:
    """Model FLOPs of training on one token: 6 N + 12 L H D T, the convention of PaLM's appendix B.

    N counts the parameters that multiply activations: projections (forget gates too), MLP and
    output head (an adaptive one as if every token needed all of its bands). Looking up an
    embedding, norms, biases, softmax and the optimizer count as nothing. The second term is
    attention's two products over all T keys, as if it were not causal: the half that causality
    masks is counted, and so is every tile that `alibi_jax.attention` leaves out. FIRE's MLP is
    counted alike; other biases are a few operations a logit, and count as nothing. What is computed
    again (`config.remat`, attention's backward pass) is not.

    Args:
      config: the model, with its vocabulary size.
      length: T, tokens of a sequence.
    """
    assert config.vocab_size is not None, "the vocabulary size is the output head's"
    inner, kv_inner = (n * config.head_size for n in (config.num_heads, config.kv_heads))
    projections = config.embed_dim * (2 * inner + 2 * kv_inner)
    mlp = config.embed_dim * config.mlp_size * (3 if config.gated_mlp else 2)
    gates = config.embed_dim * config.num_heads if config.position == "forgetting" else 0
    fire = FIRE_WIDTH * (1 + config.num_heads) if config.position == "fire" else 0
    matmul_params = config.num_layers * (projections + gates + mlp) + _head_params(config)
    return 6.0 * matmul_params + config.num_layers * (12.0 * inner + 6.0 * fire) * length


def _head_params(config: DecoderConfig) -> int:
    assert config.vocab_size is not None
    if config.adaptive_cutoffs is None:
        return config.vocab_size * config.embed_dim
    bounds = (0, *config.adaptive_cutoffs, config.vocab_size)
    tables = [
        (stop - start) * dim
        for (start, stop), dim in zip(itertools.pairwise(bounds), config.band_dims(), strict=True)
    ]
    clusters = len(config.adaptive_cutoffs) * config.embed_dim
    return sum(tables) + clusters + config.embed_dim * sum(config.band_dims()[1:])
