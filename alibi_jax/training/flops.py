"""Model FLOPs of training, and the peaks of devices: what MFU is made of.

MFU (model FLOPs utilisation; PaLM, Chowdhery et al. 2022, appendix B) is the rate at which a run
does the arithmetic that its model defines, divided by the peak rate of its devices.
"""

from alibi_jax.models import DecoderConfig

# Dense bfloat16 FLOP/s of one JAX device, by `device_kind`. TPU: docs.cloud.google.com/tpu/docs/
# v4, v5e, v5p, v6e and tpu7x, a chip; one device is one chip, but half of one for TPU7x. NVIDIA:
# the data sheets, without their factor of 2 for sparsity.
_PEAK_FLOPS = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,  # v5e
    "TPU v5": 459e12,  # v5p
    "TPU v6 lite": 918e12,  # v6e
    "TPU7x": 2307e12 / 2,
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA A100 80GB PCIe": 312e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100 NVL": 835e12,
    "NVIDIA H100 80GB HBM3": 989e12,  # SXM
    "NVIDIA H200": 989e12,  # SXM
}


def peak_flops(device_kind: str) -> float | None:
    """Dense bfloat16 FLOP/s of a device that JAX names so; None for one that is not known."""
    return _PEAK_FLOPS.get(device_kind)


def flops_per_token(config: DecoderConfig, length: int) -> float:
    """Model FLOPs of training on one token: 6 N + 12 L H D T, the convention of PaLM's appendix B.

    N counts the parameters that multiply activations: projections, MLP and output head. Looking up
    an embedding, norms, biases, softmax and the optimizer count as nothing. The second term is
    attention's two products over all T keys, as if it were not causal: the half that causality
    masks is counted, and so is every tile that `alibi_jax.attention` leaves out. What is computed
    again (`config.remat`, attention's backward pass) is not.

    Args:
      config: the model, with its vocabulary size.
      length: T, tokens of a sequence.
    """
    assert config.vocab_size is not None, "the vocabulary size is the output head's"
    inner, kv_inner = (n * config.head_size for n in (config.num_heads, config.kv_heads))
    projections = config.embed_dim * (2 * inner + 2 * kv_inner)
    mlp = config.embed_dim * config.mlp_size * (3 if config.gated_mlp else 2)
    matmul_params = config.num_layers * (projections + mlp) + config.vocab_size * config.embed_dim
    return 6.0 * matmul_params + 12.0 * config.num_layers * inner * length
