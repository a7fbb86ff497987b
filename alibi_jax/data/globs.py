"""The files that a glob stands for: each once, whatever links lead to it, none lost silently."""

import collections
import glob
import logging
import os
import pathlib
import stat
from collections.abc import Iterator

from alibi_jax.data.files import COMPRESSED_SUFFIXES, LINES_SUFFIX, TEXT_SUFFIXES, kind
from alibi_jax.errors import UserError

_ALLOWED = f"{' '.join((*TEXT_SUFFIXES, LINES_SUFFIX))}, also with {' '.join(COMPRESSED_SUFFIXES)}"

_OTHER_COMPRESSION = (".bz2", ".lz4", ".lzma", ".br", ".zip", ".7z")

_log = logging.getLogger(__name__)


def matching_files(pattern: str) -> list[pathlib.Path]:
    """Return the text files that match a glob, by name; a warning says what is left out.

    `**` stands for any folders, also linked ones, each of them once. As far as the pattern is the
    name of something that exists it is taken literally: names may have brackets.

    Args:
        pattern: The glob, with `~` expanded.

    Raises:
        UserError: It matches nothing that can be read, or text in a form that cannot.
    """
    if pathlib.Path(pattern).is_dir():
        raise UserError(
            f"'files:{pattern}' is a folder; give a glob, for instance "
            f"'files:{pattern.rstrip('/')}/**/*.txt'"
        )
    found: dict[object, pathlib.Path] = {}
    for name in sorted(set(_expand(_literally(pattern)))):
        path = pathlib.Path(name)
        try:
            about = path.stat()
        except OSError:  # whoever reads it says why it cannot be
            found[name] = path
            continue
        if kind(path) and not stat.S_ISREG(about.st_mode) and not stat.S_ISDIR(about.st_mode):
            raise UserError(f"{path} is a pipe or device; make the glob match regular files only")
        if not stat.S_ISDIR(about.st_mode):
            found.setdefault((about.st_dev, about.st_ino), path)
    if not found:
        raise UserError(f"no file matches {pattern!r}; check the path (** stands for any folders)")
    known = [path for path in found.values() if kind(path)]
    others = [path for path in found.values() if not kind(path)]
    counts = collections.Counter(path.suffix or path.name for path in others)
    if not known:
        raise UserError(
            f"{pattern!r} matches no file that can be read, only {', '.join(sorted(counts))}; "
            f"allowed are {_ALLOWED}"
        )
    if packed := next((path for path in others if _is_packed(path)), None):
        raise UserError(
            f"{pattern!r} matches {counts[packed.suffix]} {packed.suffix} such as {packed.name}, "
            f"text in a form that is not read; allowed are {_ALLOWED}: pack it so, or narrow the "
            "glob"
        )
    if others:
        few = ", ".join(f"{number} {suffix}" for suffix, number in counts.most_common(5))
        _log.warning("%r: left out, as no text: %d files (%s)", pattern, len(others), few)
    return known


def _is_packed(path: pathlib.Path) -> bool:
    return path.suffix.lower() in _OTHER_COMPRESSION and kind(path.with_suffix("")) is not None


def _literally(pattern: str) -> str:
    """Escape the beginning of a pattern, as far as something of that very name exists."""
    parts = pathlib.Path(pattern).parts
    count = len(parts)
    while count and not os.path.lexists(pathlib.Path(*parts[:count])):
        count -= 1
    return str(pathlib.Path(*(glob.escape(part) for part in parts[:count]), *parts[count:]))


def _expand(pattern: str) -> Iterator[str]:
    """Yield what matches a glob, some of it perhaps more than once.

    Not `glob.glob(recursive=True)`, which follows a link to a folder above for ever.
    """
    parts = pathlib.Path(pattern).parts
    if "**" not in parts:
        yield from glob.glob(pattern)  # noqa: PTH207 (Path.glob takes no absolute one)
        return
    at = parts.index("**")
    tail = parts[at + 1 :] or ("*",)
    for root in glob.glob(str(pathlib.Path(*parts[:at]))):  # noqa: PTH207
        for folder in _folders(root) if pathlib.Path(root).is_dir() else ():
            yield from _expand(str(pathlib.Path(glob.escape(folder), *tail)))


def _folders(root: str) -> Iterator[str]:
    """Yield a folder and all below it, hidden ones apart, each once by whatever name."""

    def unreadable(error: OSError) -> None:
        _log.warning("%s: left out, cannot be read (%s)", error.filename, error.strerror)

    seen = set()
    for folder, names, _ in os.walk(root, onerror=unreadable, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:
            names.clear()
            continue
        seen.add(real)
        names[:] = sorted(name for name in names if not name.startswith("."))
        yield folder
