"""Files that are there whole or not at all, and the paths that a person gives."""

import contextlib
import os
from pathlib import Path

from alibi_jax.errors import UserError, require


def given_path(name: str, text: str) -> Path:
    """The path that a person wrote, with ~ for the home folder; it need not exist.

    Raises:
      UserError: it can be none; `name` is what the person set.
    """
    require(
        "://" not in text,
        f"{name}={text} is an address: give a path, of a folder where it is mounted",
    )
    try:
        path = Path(text).expanduser()
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        pass
    except RuntimeError as error:
        raise UserError(
            f"{name}={text}: there is no such home folder; give the path without ~"
        ) from error
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f"{name}={text!r} is no path that can be used ({reason}): choose another"
        ) from error
    return path


def check_writable(name: str, path: Path) -> None:
    """Raises UserError if a flag names a file that cannot be written; leaves nothing behind."""
    try:
        new = not path.exists()
        path.open("a", encoding="utf-8").close()
        if new:
            path.unlink()
    except OSError as error:
        raise UserError(
            f"{name}={path} cannot be written ({error.strerror}): choose another file"
        ) from error


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
