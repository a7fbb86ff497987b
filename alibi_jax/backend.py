"""What JAX's backend says when it cannot do what is asked."""

import os

import jax

from alibi_jax import distributed
from alibi_jax.errors import UserError


def device_count() -> int:
    """The number of devices of all processes; UserError if JAX has no backend."""
    try:
        return jax.device_count()
    except (AssertionError, RuntimeError) as error:
        if distributed.is_lost_peer(error):
            raise
        wanted = os.environ.get("JAX_PLATFORMS", "")
        reason = " ".join(str(error).split()) or f"it has no backend {wanted}"
        raise UserError(
            f"JAX finds no device for JAX_PLATFORMS={wanted} ({reason}): install what it needs, "
            "pip install '.[cuda]' or '.[tpu]', or unset JAX_PLATFORMS"
        ) from error


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that the device has too little memory."""
    text = str(error)
    return "RESOURCE_EXHAUSTED" in text or "out of memory" in text.lower()
