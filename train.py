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

import dataclasses
import signal
import sys
from pathlib import Path

import jax

from alibi_jax import data, distributed, evaluation
from alibi_jax.cli import parse_flags
from alibi_jax.config import Config, describe, load_config
from alibi_jax.distributed import print_once
from alibi_jax.errors import UserError, require
from alibi_jax.sharding import make_mesh, to_devices, to_host
from alibi_jax.training import compilation_cache, goodput, loop, profiling, workdir
from alibi_jax.training.resolved import resolved


def run(config: Config, directory: Path, profile: str | None) -> None:
    """Trains and evaluates; everything that can be wrong is checked before anything is trained."""
    # Check.
    clock = goodput.Clock()
    config.validate(jax.device_count())
    traced = profiling.NEVER
    if profile is not None:
        traced = profiling.parse_steps(profile, config.training.num_steps)
    workdir.check_usable(directory)
    corpus = distributed.main_first(lambda: data.load_corpus(config.data))
    config = with_vocabulary(config, corpus.tokenizer.vocab_size)
    held_out = getattr(corpus, config.evaluation.split)
    lengths, note = evaluation.supported_lengths(
        held_out,
        config.evaluation.lengths(config.data.sequence_length),
        config.data.packing,
    )
    if note:
        print_once(note)
    loop.check_data(config, corpus)
    stream = data.stream_identity(
        fingerprint=corpus.fingerprint,
        sequence_length=config.data.sequence_length,
        batch_size=config.data.batch_size,
        seed=config.training.seed,
        packing=config.data.packing,
    )

    mesh = make_mesh(config.mesh)
    with jax.set_mesh(mesh), workdir.locked(directory):
        workdir.claim(directory, config, stream)
        # Train short.
        compilation_cache.use(directory)
        with clock.spend("compile"):
            program = loop.compile_program(config, mesh)
        print_once(resolved(config, corpus, mesh, program))
        distributed.wait_for_all()
        state, complete = loop.train(
            config, corpus, program, directory, clock=clock, profile=traced
        )
        if not complete:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # it may reach processes one by one
            print_once(goodput.table(clock.record()))
            print_once(f"stopped at step {state.step}, saved; the same command goes on from there")
            return

        # Test long.
        windows = evaluation.longest_windows(
            held_out,
            longest=lengths[-1],
            num_windows=config.evaluation.num_windows,
            packing=config.data.packing,
        )
        with clock.spend("evaluation"):
            losses = evaluation.evaluate(
                lambda tokens: to_host(
                    program.loss_fn(
                        state.params, to_devices(tokens, program.batch_sharding, len(tokens))
                    )
                ),
                windows,
                lengths,
                tokens_per_batch=config.evaluation.tokens_per_batch,
                batch_multiple=mesh.shape["data"] * mesh.shape["fsdp"],
            )

    # Report.
    if not distributed.is_main():
        return
    summary = evaluation.summarize(
        losses,
        windows,
        train_length=config.data.sequence_length,
        num_targets=config.evaluation.num_targets,
        bytes_per_token=evaluation.bytes_per_token(windows, corpus.tokenizer.decode),
        num_bootstrap=config.evaluation.num_bootstrap,
    )
    summary |= {"config": config.to_dict(), "versions": evaluation.versions()}
    title = f"{config.model.position}, trained at {config.data.sequence_length} tokens"
    with workdir.writing(directory):
        evaluation.write_json(summary, directory / "extrapolation.json")
        evaluation.extrapolation_figure(summary, directory / "extrapolation.png", title)
        spent = clock.write(directory)
    print(f"{goodput.table(spent)}\n")
    print(evaluation.table(summary))
    print(f"\nfigure {directory / 'extrapolation.png'}, numbers {directory / 'extrapolation.json'}")


def with_vocabulary(config: Config, size: int) -> Config:
    """The config with the tokenizer's vocabulary size, or a larger one that was asked for."""
    given = config.model.vocab_size
    require(
        given is None or given >= size,
        f"config.model.vocab_size={given} is less than the tokenizer's {size}: leave it out",
    )
    model = dataclasses.replace(config.model, vocab_size=given or size)
    return dataclasses.replace(config, model=model)


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


def below(prefix: str, flags: dict[str, str]) -> dict[str, str]:
    """The flags whose name starts with the prefix, without it."""
    return {
        name.removeprefix(prefix): value for name, value in flags.items() if name.startswith(prefix)
    }


def main(arguments: list[str]) -> int:
    """Exit code: 0 done, or stopped by a signal with all saved; 1 diverged; 2 bad input.

    3: another process of the run was lost. 130: Ctrl-C or SIGTERM outside the training loop, or a
    second one. All processes of a run end with the same code.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends as Ctrl-C does
    try:
        flags = parse(arguments)
        if flags is not None:
            distributed.initialize(below("--distributed.", flags))
            config = load_config(flags["--config"], below("--config.", flags))
            run(config, Path(flags["--workdir"]).expanduser(), flags.get("--profile"))
            distributed.finish()
    except UserError as error:
        return fail(2, error)
    except loop.Diverged as error:
        return fail(1, error)
    except (jax.errors.JaxRuntimeError, ValueError) as error:
        if distributed.is_lost_peer(error):
            return distributed.end_lost(error)
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return fail(
            2,
            "out of memory on the device: in training raise config.training.gradient_accumulation "
            "or set config.model.remat=full; in the evaluation lower "
            "config.evaluation.tokens_per_batch or shorten config.evaluation.multiples",
        )
    except KeyboardInterrupt:
        return fail(130, "interrupted; the same command goes on from the last checkpoint")
    return 0


def fail(code: int, message: object) -> int:
    """Prints one line, whatever the message quotes, and returns the exit code."""
    return distributed.end(code, "error: " + " ".join(str(message).splitlines()))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
