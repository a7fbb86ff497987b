"""Real disks of a given size, or read-only, for tests; they need root."""

import contextlib
import subprocess

import pytest


class Disk:
    """A file system in memory at `path`."""

    def __init__(self, path):
        self.path = path
        path.mkdir()

    def mount(self, options):
        """Mounts it with these options, or changes them: "size=64k", "remount,ro"."""
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(self.path)]
        try:
            subprocess.run(command, check=True, capture_output=True, text=True)
        except (OSError, subprocess.CalledProcessError) as error:
            reason = getattr(error, "stderr", "") or error
            pytest.skip(f"cannot mount a disk here ({str(reason).strip()}): needs root")


@pytest.fixture
def disk(tmp_path):
    """A disk, not mounted yet."""
    yield Disk(tmp_path / "disk")
    with contextlib.suppress(OSError):
        subprocess.run(["umount", "--lazy", str(tmp_path / "disk")], capture_output=True)
