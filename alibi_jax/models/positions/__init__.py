"""Position methods: how a decoder learns where a token is. One file each, and one table."""

from alibi_jax.models.positions.alibi import Alibi
from alibi_jax.models.positions.bam import Bam
from alibi_jax.models.positions.base import Position
from alibi_jax.models.positions.fire import Fire
from alibi_jax.models.positions.forgetting import Forgetting
from alibi_jax.models.positions.kerple import KerpleLog, KerplePower
from alibi_jax.models.positions.learned import Learned
from alibi_jax.models.positions.none import NoPosition
from alibi_jax.models.positions.rotary import Rotary
from alibi_jax.models.positions.sinusoidal import Sinusoidal
from alibi_jax.models.positions.t5 import T5

__all__ = ["POSITION_METHODS", "Position"]

# `config.model.position`, in the order that help lists them.
POSITION_METHODS: dict[str, type[Position]] = {
    "alibi": Alibi,
    "sinusoidal": Sinusoidal,
    "learned": Learned,
    "rotary": Rotary,
    "t5": T5,
    "kerple_log": KerpleLog,
    "kerple_power": KerplePower,
    "fire": Fire,
    "none": NoPosition,
    "bam": Bam,
    "forgetting": Forgetting,
}
