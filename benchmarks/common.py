"""What every benchmark writes beside its numbers."""

import json
import os
import platform
from pathlib import Path
from typing import Any

import jax

from alibi_jax.evaluation import versions

RESULTS = Path(__file__).parent / "results"


def write(name: str, numbers: dict[str, Any]) -> None:
    """Writes results/NAME.json: the numbers, with machine and versions."""
    machine = {
        "cpu_count": os.cpu_count(),
        "architecture": platform.machine(),
        "devices": [device.device_kind for device in jax.devices()],
    }
    path = RESULTS / f"{name}.json"
    record = numbers | {"machine": machine, "versions": versions()}
    path.write_text(json.dumps(record, indent=1) + "\n")
    print(f"wrote {path}")
