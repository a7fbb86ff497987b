"""No position information but the causal mask (NoPE, Kazemnejad et al. 2023, arXiv:2305.19466)."""

from alibi_jax.models.positions.base import Position


class NoPosition(Position):
    """Nothing is added anywhere: attention has no bias."""
