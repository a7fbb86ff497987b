"""Train short, then test long: the main job.

  python train.py --config=configs/NAME.py[:VARIANT] --workdir=DIR
                  [--config.SECTION.FIELD=VALUE ...] [--profile=START:STOP]

Trains a decoder and evaluates it beyond its training length. If DIR holds the run already, it goes
on exactly where it was. `--help` with a config lists every field. `--profile` traces the STOP-START
steps after the first START into DIR/profile, for TensorBoard.

On several machines give every one the same command, and a DIR that all of them see. Cloud TPU, GKE,
SLURM and Open MPI tell the processes apart; elsewhere add, to each, --distributed.process_id=I and
--distributed.num_processes=N --distributed.coordinator_address=HOST:PORT (a port of process 0).
"""

import signal
import sys
from pathlib import Path

import jax

from alibi_jax import backend, distributed, evaluation
from alibi_jax.cli import STOPPED, below, parse_flags, print_anything, unread
from alibi_jax.config import Config, describe, load_config
from alibi_jax.distributed import print_once
from alibi_jax.errors import UserError, require
from alibi_jax.files import given_path
from alibi_jax.run import train_short_test_long
from alibi_jax.training import goodput, loop


def run(config: Config, directory: Path, profile: str | None) -> int:
    """Trains and evaluates; everything that can be wrong is checked before anything is trained.

    Returns the exit code.
    """
    outcome = train_short_test_long(config, directory, profile=profile, say=print_once)
    if outcome.summary is None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # it may reach processes one by one
        print_once(goodput.table(outcome.spent))
        print_once(f"stopped at step {outcome.step}, saved; the same command goes on from there")
        return STOPPED
    print_once(f"{goodput.table(outcome.spent)}\n")
    print_once(evaluation.table(outcome.summary))
    figure, numbers = (directory / f"extrapolation.{suffix}" for suffix in ("png", "json"))
    print_once(f"\nfigure {figure}, numbers {numbers}")
    return 0


GOES_ON = "the same command goes on from the last checkpoint"
FLAGS = ("--config", "--workdir", "--profile", "--config.", "--distributed.")


def parse(arguments: list[str]) -> dict[str, str] | None:
    """Values of the flags; None after printing help."""
    words = [word for word in arguments if word not in ("--help", "-h")]
    flags = parse_flags(words, FLAGS)
    if len(words) < len(arguments) or not arguments:
        print(__doc__)
        if "--config" in flags:
            print("\n".join(describe(load_config(flags["--config"], {}))))
        return None
    for name in ("--config", "--workdir"):
        require(bool(flags.get(name)), f"{name} is missing: give --config=FILE and --workdir=DIR")
    return flags


def main(arguments: list[str]) -> int:
    """Exit code: 0 done; 1 diverged; 2 bad input; 3 another process of the run was lost.

    130: stopped by Ctrl-C or SIGTERM, so that what should follow a whole run does not. In training
    all is saved first, unless there comes a second one. All processes of a run end with the same
    code. 141: what read the output is gone, as in `train.py ... | head`.
    """
    print_anything()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends as Ctrl-C does
    try:
        flags = parse(arguments)
        if flags is not None:
            distributed.initialize(below("--distributed.", flags))
            config = load_config(flags["--config"], below("--config.", flags))
            code = run(config, given_path("--workdir", flags["--workdir"]), flags.get("--profile"))
            distributed.finish()
            return code
    except UserError as error:
        return fail(2, error)
    except loop.Diverged as error:
        return fail(1, error)
    except (jax.errors.JaxRuntimeError, ValueError) as error:
        if distributed.is_lost_peer(error):
            return distributed.end_lost(error)
        if not backend.is_out_of_memory(error):
            raise
        return fail(
            2,
            "out of memory on the device: in training raise config.training.gradient_accumulation "
            "or set config.model.remat=full, or make the model smaller; in the evaluation lower "
            "config.evaluation.tokens_per_batch or shorten config.evaluation.multiples",
        )
    except KeyboardInterrupt:
        return fail(STOPPED, f"interrupted; {GOES_ON}")
    except BrokenPipeError:
        return fail(unread(), f"what read the output is gone; {GOES_ON}")
    return 0


def fail(code: int, message: object) -> int:
    """Prints one line, whatever the message quotes, and returns the exit code."""
    return distributed.end(code, "error: " + " ".join(str(message).splitlines()))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
