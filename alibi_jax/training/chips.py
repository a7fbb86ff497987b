"""What each kind of chip can do at most, as published, and which slices of TPUs there are."""

import math
import re
from dataclasses import dataclass

from alibi_jax.errors import UserError

GB, GIB = 1e9, 2**30


@dataclass(frozen=True)
class Chip:
    """Rates and sizes of one chip.

    Attributes:
      device_kind: `jax.Device.device_kind`.
      devices: JAX devices a chip; the two cores of v4 and v5p are one.
      flops: peak bfloat16 FLOP/s.
      hbm_bytes: capacity of the memory.
      usable_hbm_bytes: what libtpu leaves to a program.
      hbm_bandwidth: bytes/s.
      ici_bandwidth: bytes/s to and from other chips, all links and both directions together.
      ici_links: to other chips, two in each dimension of the torus.
    """

    device_kind: str
    devices: int
    flops: float
    hbm_bytes: float
    usable_hbm_bytes: float
    hbm_bandwidth: float
    ici_bandwidth: float
    ici_links: int

    def receives(self, shape: tuple[int, ...]) -> float:
        """Bytes/s that a chip of a slice of this shape can receive, all its links busy.

        A dimension of one chip has no links, one of two has one a chip.
        """
        links = sum(min(size - 1, 2) for size in shape)
        return self.ici_bandwidth / 2 / self.ici_links * min(links, self.ici_links)


# docs.cloud.google.com/tpu/docs/ v4, v5e, v5p, v6e, tpu7x; the links of v4 are of arXiv:2304.01433
# (six of 50 GB/s each way). usable_hbm_bytes is the limit in the error of libtpu 0.0.42 for a
# program that is too large.
CHIPS = {
    "v4": Chip("TPU v4", 1, 275e12, 32 * GIB, 30.75 * GIB, 1200 * GB, 600 * GB, 6),
    "v5e": Chip("TPU v5 lite", 1, 197e12, 16 * GIB, 15.75 * GIB, 819 * GB, 400 * GB, 4),
    "v5p": Chip("TPU v5", 1, 459e12, 95 * GIB, 95.74 * GIB, 2765 * GB, 1200 * GB, 6),
    "v6e": Chip("TPU v6 lite", 1, 918e12, 32 * GIB, 31.25 * GIB, 1638 * GB, 800 * GB, 4),
    "tpu7x": Chip("TPU7x", 2, 2307e12, 192 * GIB, 189.5 * GIB, 7380 * GB, 1200 * GB, 6),
}

# Dense bfloat16 FLOP/s by `jax.Device.device_kind`, of NVIDIA's data sheets without their factor of
# 2 for sparsity.
_GPU_FLOPS = {
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
    tpus = {chip.device_kind: chip.flops / chip.devices for chip in CHIPS.values()}
    return (tpus | _GPU_FLOPS).get(device_kind)


@dataclass(frozen=True)
class Topology:
    """A slice: so many chips along each dimension."""

    chip: str
    shape: tuple[int, ...]

    @property
    def num_chips(self) -> int:
        """Chips in the slice."""
        return math.prod(self.shape)

    def __str__(self) -> str:
        return f"{self.chip}:{'x'.join(map(str, self.shape))}"


def parse_topology(text: str) -> Topology:
    """The slice that Cloud TPU calls so: v5e:16x16, v5p:4x4x4; raises UserError for another."""
    name, _, shape = text.partition(":")
    if name not in CHIPS:
        raise UserError(
            f"--topology={text}: the chips are {', '.join(CHIPS)}; for example v5e:16x16 or "
            "v5p:4x4x4"
        )
    dimensions = CHIPS[name].ici_links // 2
    example = "x".join(["4"] * dimensions)
    if not re.fullmatch(r"[1-9]\d{0,3}(x[1-9]\d{0,3})*", shape) or shape.count("x") != (
        dimensions - 1
    ):
        raise UserError(
            f"--topology={text}: a slice of {name} has {dimensions} dimensions, for example "
            f"{name}:{example}"
        )
    return Topology(name, tuple(map(int, shape.split("x"))))
