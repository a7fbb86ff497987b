"""Compiled programs kept on disk, so that a run that goes on does not compile again."""

from pathlib import Path

import jax

DIRECTORY = "compiled"
_OPTION = "jax_compilation_cache_dir"


def use(workdir: Path) -> None:
    """Turns JAX's persistent compilation cache on. Call it before anything is compiled.

    It lies in `workdir`, which a preempted machine's own disk may not outlive, unless
    JAX_COMPILATION_CACHE_DIR names another place. On a CPU it is on only if that does: there the
    code is of the very processor that compiled it, and another one may not run it.
    """
    if getattr(jax.config, _OPTION) is None and jax.default_backend() != "cpu":
        jax.config.update(_OPTION, str((workdir / DIRECTORY).absolute()))


def directory() -> str | None:
    """Where compiled programs are kept; None where they are not."""
    return getattr(jax.config, _OPTION) or None
