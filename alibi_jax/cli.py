"""The `alibi` command: what a person does with a config or a run, beside training."""

import importlib
import io
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

from alibi_jax.errors import UserError, require


class Command(NamedTuple):
    """A module with `main(arguments)`, whose docstring is the help, and what it is for."""

    module: str
    summary: str


STOPPED = 130  # exit code, of Ctrl-C by convention
UNREAD = 141  # exit code, of SIGPIPE by convention

COMMANDS = {
    "compare": Command("alibi_jax.evaluation.compare", "train position methods side by side"),
    "eval": Command("alibi_jax.evaluation.run", "what longer inputs buy a trained model"),
    "report": Command("alibi_jax.evaluation.html", "one HTML page about runs and comparisons"),
    "plan": Command("alibi_jax.plan", "memory, FLOPs and step time of a run on a TPU slice"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs `alibi COMMAND ...`; the exit code is 0 if done, 1 if the answer is no, 2 for bad input.

    130: Ctrl-C. 141: what read the output is gone, as in `alibi ... | head`.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    print_anything()
    try:
        return _run(words)
    except BrokenPipeError:
        return unread()


def _run(words: list[str]) -> int:
    try:
        code = _command(words)
        sys.stdout.flush()
        return code
    except UserError as error:
        print("error:", " ".join(str(error).splitlines()), file=sys.stderr, flush=True)
        return 2
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr, flush=True)
        return STOPPED


def _command(words: list[str]) -> int:
    if not words or words[0] in ("--help", "-h"):
        print(usage())
        return 0
    name, *rest = words
    require(name in COMMANDS, f"alibi {name} is not known: there is {', '.join(COMMANDS)}")
    module = importlib.import_module(COMMANDS[name].module)
    if not rest or "--help" in rest or "-h" in rest:
        print((module.__doc__ or "").strip())
        return 0
    run: Callable[[list[str]], int] = module.main
    return run(rest)


def print_anything() -> None:
    """Has stdout and stderr escape what they cannot encode, as × in ASCII or the name of a file."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def unread() -> int:
    """The exit code `UNREAD`; drops what is still to be written to a pipe that nobody reads."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except BrokenPipeError:  # Python flushes again as it ends
            os.dup2(nowhere, stream.fileno())
    os.close(nowhere)
    return UNREAD


def usage() -> str:
    """What `alibi --help` prints."""
    width = max(map(len, COMMANDS))
    commands = "\n".join(f"  {name:<{width}}  {c.summary}" for name, c in COMMANDS.items())
    return f"alibi COMMAND --FLAG=VALUE ...\n\n{commands}\n\n`alibi COMMAND --help` says it all."


def parse_flags(arguments: Iterable[str], names: Sequence[str]) -> dict[str, str]:
    """The values of `--name=value` and `--name value`.

    Args:
      arguments: the command line, without the command.
      names: what may be given; "--config." allows every name that begins so.

    Raises:
      UserError: a name that is not among these, or one without a value.
    """
    flags: dict[str, str] = {}
    words = list(arguments)
    while words:
        name, equals, value = words.pop(0).partition("=")
        known = name in names or any(n.endswith(".") and name.startswith(n) for n in names)
        shown = ", ".join(f"{n}FIELD" if n.endswith(".") else n for n in names)
        require(known, f"{name} is not known: there is {shown}")
        require(bool(equals or words), f"{name} needs a value: {name}=VALUE")
        value = value if equals else words.pop(0)
        if name in flags:
            print(f"note: {name} is given twice: {value}, the last, counts", file=sys.stderr)
        flags[name] = value
    return flags


def below(prefix: str, flags: Mapping[str, str]) -> dict[str, str]:
    """The flags whose name starts with the prefix, without it."""
    return {
        name.removeprefix(prefix): value for name, value in flags.items() if name.startswith(prefix)
    }
