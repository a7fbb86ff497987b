"""Files that are there whole or not at all."""

import contextlib
import os
from pathlib import Path


def write_text(path: Path, text: str) -> None:
    """Writes a file under a temporary name, then renames it; nothing if it holds the text."""
    if path.is_file() and path.read_bytes() == text.encode():
        return
    unfinished = path.with_name(path.name + ".tmp")
    try:
        with unfinished.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            unfinished.unlink()
        raise
