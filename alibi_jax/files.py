"""Files that are there whole or not at all."""

import contextlib
import os
from pathlib import Path

from alibi_jax.errors import UserError


def user_path(path: str, name: str) -> Path:
    """Gives the path that a person wrote, with `~` expanded; it need not exist.

    Raises:
      UserError: there is no such home folder, or no file can have that name; `name` is what the
        person set.
    """
    try:
        expanded = Path(path).expanduser()
        expanded.stat()
    except (FileNotFoundError, NotADirectoryError):
        pass
    except (OSError, ValueError, RuntimeError) as error:  # Python has all three for a bad path
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{name}={path!r} is no path that can be used: {reason}") from error
    return expanded


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
