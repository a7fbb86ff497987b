"""Every protocol on one model, which is a few functions of tokens, and the verdict on it."""

import hashlib
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from alibi_jax.data.tokenizers import Tokenizer
from alibi_jax.errors import UserError
from alibi_jax.evaluation import judgement, protocols, retrieval
from alibi_jax.evaluation.bootstrap import document_sums, resamples
from alibi_jax.evaluation.config import EvaluationConfig
from alibi_jax.evaluation.ngrams import ngram_losses
from alibi_jax.evaluation.overlap import training_overlap
from alibi_jax.evaluation.protocols import WindowedLossFn
from alibi_jax.evaluation.reach import MassFn, attention_mass
from alibi_jax.evaluation.report import by_length, compared, floors, loss, units
from alibi_jax.evaluation.verdict import Entry, Level
from alibi_jax.evaluation.windows import (
    TokenizedDocuments,
    Windows,
    longest_windows,
    supported_lengths,
)

PROTOCOLS = (
    "nonoverlapping",
    "fixed_targets",
    "sliding_window",
    "by_position",
    "truncated_input",
    "truncation",
    "attention_mass",
    "needle",
    "recall",
)
_OF_WINDOWS = ("nonoverlapping", "fixed_targets", "by_position")  # means of the same losses


class Scorer(NamedTuple):
    """A model as the protocols see it."""

    losses: WindowedLossFn  # nats f32[B, L] of int32[B, L+1] and a window or None
    logits: retrieval.LogitsFn  # f32[B, n, V] of int32[B, L] and n
    attention_mass: MassFn  # f32[layers, B, H, edges + 1] of int32[B, L], edges and a number
    # f32[H] or f32[layers, H] in rows of so many tokens; None: no linear bias.
    slopes: Callable[[int], np.ndarray | None]
    sink: bool = False  # whether the first key of a row is at distance 0 from all


# What a protocol adds: to "protocols" and to "verdict".
Found = tuple[dict[str, Any], dict[str, Any]]


class Task(NamedTuple):
    """A protocol, or some that share their losses, on the data at hand."""

    num_tokens: int  # that it computes
    run: Callable[[Callable[[int], object]], Found]  # called with a bar's update
    left_out: str | None = None  # what it does not do, and why


class Setting(NamedTuple):
    """What all protocols share."""

    config: EvaluationConfig
    train_length: int
    training: np.ndarray  # tokens of the training text
    windows: Windows
    overlap: dict[str, Any]  # of the windows with that text
    lengths: tuple[int, ...]
    counts: np.ndarray  # of the bootstrap
    tokenizer: Tokenizer

    @property
    def longest(self) -> int:
        """Tokens of the longest windows."""
        return self.lengths[-1]

    @property
    def num_documents(self) -> int:
        """Number of units that the bootstrap resamples."""
        return self.counts.shape[1]

    def by_length(self, losses: dict[int, np.ndarray]) -> list[Entry]:
        """Entries of losses [N, P] at each length, compared with the training length."""
        return by_length(losses, self.train_length, self.windows, self.counts)

    def compared(self, losses: dict[int, np.ndarray]) -> dict[int, Level]:
        """Levels of losses [N, P] in each setting, compared with all of the longest windows."""
        return compared(losses, self.longest, self.windows, self.counts)

    def filler(self) -> np.ndarray:
        """Held-out text for each trial of a retrieval task, int32 [num_trials, longest + 1]."""
        return self.windows.tokens[np.arange(self.config.num_trials) % len(self.windows.tokens)]


def assess(
    scorer: Scorer,
    held_out: TokenizedDocuments,
    training: np.ndarray,
    tokenizer: Tokenizer,
    config: EvaluationConfig,
    *,
    train_length: int,
    lengths: Sequence[int],
    packing: str,
    wanted: Sequence[str] = PROTOCOLS,
    earlier: Mapping[str, Any] | None = None,
    keep: Callable[[dict[str, Any]], object] = lambda found: None,
    say: Callable[[str], object] = lambda text: None,
) -> dict[str, Any]:
    """Evaluate a model by every protocol that the data can serve.

    Args:
        scorer: The model.
        held_out: Held-out documents.
        training: Tokens of the training text, int [M], whose n-grams the model is compared with.
        tokenizer: Of these texts.
        config: How to evaluate; its multiples are not used.
        train_length: Tokens per training window, the first of the lengths.
        lengths: Tokens per window, each a multiple of the one before.
        packing: "documents": a window lies inside one document; "stream": it may cross documents.
        wanted: Some of `PROTOCOLS`.
        earlier: What this returned, or gave to `keep`, for the same model, text and settings: its
            protocols are not measured again.
        keep: Called with what is found so far whenever a protocol is done.
        say: Called with a line for everything that is left out, and why.

    Returns:
        What `evaluation.json` holds, without "config" and "versions".

    Raises:
        UserError: The text does not hold a window of the training length, or nothing is left.
    """
    kept, note = supported_lengths(held_out, lengths, packing)
    windows = longest_windows(
        held_out, longest=kept[-1], num_windows=config.num_windows, packing=packing
    )
    earlier = earlier or {"protocols": {}, "verdict": {}, "left_out": []}
    overlap = earlier.get("training_overlap")
    setting = Setting(
        config,
        train_length,
        training,
        windows,
        overlap or training_overlap(training, windows.tokens, windows.bytes_per_token()),
        kept,
        resamples(len(np.unique(windows.document)), config.num_bootstrap),
        tokenizer,
    )
    measured, judged = dict(earlier["protocols"]), dict(earlier["verdict"])
    mass = measured.get("attention_mass") if "attention_mass" in wanted else None
    if mass is not None and mass["length"] != _length_at_once(setting):
        del measured["attention_mass"]  # tokens_per_batch, which decides it, is another
    # A line for each protocol that is not whole; those of earlier protocols stay.
    notes = {line.partition(" ")[0]: line for line in earlier["left_out"]}
    tasks = []
    for name, task in _tasks(scorer, setting, [name for name in wanted if name not in measured]):
        notes.pop(name, None)
        if isinstance(task, str):
            notes[name] = f"{name} left out: {task}"
        else:
            tasks.append(task)
            notes |= {name: task.left_out} if task.left_out else {}
    left_out = [*([note] if note else []), *(notes[name] for name in PROTOCOLS if name in notes)]
    for line in left_out:
        say(line)
    if not tasks and not measured:
        raise UserError(f"nothing is left to evaluate: {'; '.join(left_out)}")

    def found() -> dict[str, Any]:
        return {
            "train_length": train_length,
            "lengths": list(setting.lengths),
            "protocols": {name: measured[name] for name in PROTOCOLS if name in measured},
            "verdict": judgement.conclude(judged, setting.longest),
            "left_out": left_out,
            "num_windows": len(windows.tokens),
            "num_documents": setting.num_documents,
            "windows_per_document": windows.per_document,
            "unit": windows.unit,
            "num_copies": windows.copies,
            "training_overlap": setting.overlap,
            "tokens_sha256": hashlib.sha256(windows.tokens.astype("<i4").tobytes()).hexdigest(),
            "num_targets": config.num_targets,
            **units(windows, tokenizer),
        }

    with protocols.progress_bar(sum(task.num_tokens for task in tasks)) as bar:
        for task in tasks:
            entries, judgement_of_these = task.run(bar.update)
            measured |= {name: entry for name, entry in entries.items() if name in wanted}
            judged |= judgement_of_these
            keep(found())
    return found()


def _tasks(
    scorer: Scorer, setting: Setting, wanted: Sequence[str]
) -> Iterator[tuple[str, Task | str]]:
    """Yield a task for each protocol wanted, or why there is none."""
    if any(name in wanted for name in _OF_WINDOWS):
        yield "windows", _of_windows(scorer, setting)
    makers = {
        "sliding_window": _sliding_window,
        "truncated_input": _truncated_input,
        "truncation": _truncation,
        "attention_mass": _attention_mass,
        "needle": _needle,
        "recall": _recall,
    }
    for name, make in makers.items():
        if name in wanted:
            yield name, make(scorer, setting)


def _of_windows(scorer: Scorer, setting: Setting) -> Task:
    """Nonoverlapping windows, fixed targets and the loss by position: means of the same losses."""
    windows, config = setting.windows, setting.config

    def run(progress: Callable[[int], object]) -> Found:
        losses = {
            length: protocols.token_losses(
                lambda tokens: scorer.losses(tokens, None),
                windows,
                length,
                tokens_per_batch=config.tokens_per_batch,
                progress=progress,
            )
            for length in setting.lengths
        }
        fixed = {length: values[:, -config.num_targets :] for length, values in losses.items()}
        whole_entries, fixed_entries = setting.by_length(losses), setting.by_length(fixed)
        found = {
            "nonoverlapping": whole_entries,
            "fixed_targets": fixed_entries,
            "by_position": _by_position(losses, setting),
        }
        below = floors(
            ngram_losses(setting.training, windows.tokens, setting.tokenizer.vocab_size),
            losses[setting.train_length],
            config.num_targets,
            windows,
            setting.counts,
        )
        verdict = judgement.holding(
            whole_entries,
            fixed_entries,
            below,
            judgement.holds_interval(fixed, windows.document, setting.counts),
            unit=windows.unit,
            num_documents=setting.num_documents,
            overlap=setting.overlap["share"],
        )
        return found, verdict

    return Task(len(setting.lengths) * windows.num_targets, run)


def _by_position(losses: dict[int, np.ndarray], setting: Setting) -> dict[str, Any]:
    """Mean losses over ranges of positions, two an octave.

    A range is averaged over all windows of the shortest length that holds it: at the training
    length over as many texts as there are tiles. Only the farthest positions are of one text for
    each of the longest windows; where texts differ, small bumps are of the text.
    """
    starts = protocols.position_starts(setting.longest, setting.train_length)
    ranges = list(itertools.pairwise((*starts, setting.longest)))
    windows = setting.windows

    def entry(start: int, stop: int) -> dict[str, Any]:
        length = next(length for length in setting.lengths if length >= stop)

        def total(of_targets: np.ndarray) -> np.ndarray:
            tiles = of_targets.reshape(len(windows.document), -1, length)[:, :, start:stop]
            return document_sums(tiles.reshape(len(windows.document), -1), windows.document)

        num_bytes = windows.token_bytes[:, 1:]
        tokens = total(np.ones_like(num_bytes))
        return {
            "start": start,
            "stop": stop,
            "length": length,
            "num_tokens": int(tokens.sum()),
            **loss(total(losses[length]), tokens, total(num_bytes), setting.counts),
        }

    return {
        "length": setting.longest,
        "entries": [entry(start, stop) for start, stop in ranges],
    }


def _sliding_window(scorer: Scorer, setting: Setting) -> Task | str:
    lengths = protocols.sliding_lengths(setting.lengths)
    if len(lengths) < 2:
        return (
            f"its targets are the second half of the longest windows, {setting.longest} tokens: "
            f"these must be at least 4 times the training length, {setting.train_length}"
        )
    num_targets = setting.longest // 2
    strides = {length: max(1, length // setting.config.overlap) for length in lengths}
    costs = _sliding_costs(setting, strides, num_targets)

    def run(progress: Callable[[int], object]) -> Found:
        losses = _sliding_losses(scorer, setting, strides, num_targets, progress)
        entries = [
            {
                **entry,
                "stride": strides[entry["length"]],
                # Tokens computed for each that is scored.
                "cost": costs[entry["length"]] / num_targets,
            }
            for entry in setting.by_length(losses)
        ]
        return {"sliding_window": entries}, {}

    return Task(len(setting.windows.tokens) * sum(costs.values()), run)


def _sliding_costs(setting: Setting, strides: dict[int, int], num_targets: int) -> dict[int, int]:
    """Tokens computed for one of the longest windows, by length of a sliding window."""
    return {
        length: len(protocols.sliding_ends(setting.longest, stride, num_targets)) * length
        for length, stride in strides.items()
    }


def _sliding_losses(
    scorer: Scorer,
    setting: Setting,
    strides: dict[int, int],
    num_targets: int,
    progress: Callable[[int], object],
) -> dict[int, np.ndarray]:
    """Losses [N, num_targets] of the same targets, by length of a sliding window."""
    return {
        length: protocols.sliding_losses(
            lambda tokens: scorer.losses(tokens, None),
            setting.windows,
            length,
            stride=stride,
            num_targets=num_targets,
            tokens_per_batch=setting.config.tokens_per_batch,
            progress=progress,
        )
        for length, stride in strides.items()
    }


def _truncated_input(scorer: Scorer, setting: Setting) -> Task | str:
    num_targets = setting.config.num_targets
    strides = protocols.input_strides(setting.longest, num_targets)
    if len(strides) < 2:
        return f"the longest windows, {setting.longest} tokens, are too short to cut"

    def run(progress: Callable[[int], object]) -> Found:
        losses = _sliding_losses(scorer, setting, strides, num_targets, progress)
        entries = [
            {"context": length, "least_context": length - strides[length] + 1, **level}
            for length, level in setting.compared(losses).items()
        ]
        use = judgement.enough("uses_context_to", losses, setting.windows.document, setting.counts)
        return {"truncated_input": entries}, use

    costs = _sliding_costs(setting, strides, num_targets)
    return Task(len(setting.windows.tokens) * sum(costs.values()), run)


def _truncation(scorer: Scorer, setting: Setting) -> Task | str:
    windows = protocols.truncation_windows(setting.longest)
    if len(windows) < 2:
        return f"the longest windows, {setting.longest} tokens, are too short to cut"

    def run(progress: Callable[[int], object]) -> Found:
        losses = {
            window or setting.longest: protocols.truncated_losses(
                scorer.losses,
                setting.windows,
                window,
                num_targets=setting.config.num_targets,
                tokens_per_batch=setting.config.tokens_per_batch,
                progress=progress,
            )
            for window in windows
        }
        entries = [
            {"window": window, "length": setting.longest, **level}
            for window, level in setting.compared(losses).items()
        ]
        use = judgement.enough("layer_window", losses, setting.windows.document, setting.counts)
        return {"truncation": entries}, use

    return Task(len(windows) * setting.windows.num_targets, run)


def _attention_mass(scorer: Scorer, setting: Setting) -> Task | str:
    length = _length_at_once(setting)
    note = (
        f"attention_mass is of {length} tokens, not {setting.longest}: it reads a window at once, "
        f"and config.evaluation.tokens_per_batch is {setting.config.tokens_per_batch}"
    )

    def run(progress: Callable[[int], object]) -> Found:
        mass = attention_mass(
            scorer.attention_mass,
            setting.windows,
            length,
            num_queries=setting.config.num_targets,
            num_bootstrap=setting.config.num_bootstrap,
            slopes=scorer.slopes(length),
            sink=scorer.sink,
            tokens_per_batch=setting.config.tokens_per_batch,
            progress=progress,
        )
        return {"attention_mass": mass}, {}

    cost = len(setting.windows.tokens) * length
    return Task(cost, run, note if length < setting.longest else None)


def _length_at_once(setting: Setting) -> int:
    return max(n for n in setting.lengths if n <= setting.config.tokens_per_batch)


def _needle(scorer: Scorer, setting: Setting) -> Task | str:
    judge, depths = judgement.retrieval_range, len(retrieval.DEPTHS)
    return _retrieval(scorer, setting, "needle", retrieval.needle, judge, rows_per_trial=depths)


def _recall(scorer: Scorer, setting: Setting) -> Task | str:
    def judge(task: dict[str, Any]) -> dict[str, Any]:
        return {"recalls_to": retrieval.retrieves_to(task, 0)}

    return _retrieval(scorer, setting, "recall", retrieval.recall, judge, rows_per_trial=1)


def _retrieval(
    scorer: Scorer,
    setting: Setting,
    name: str,
    ask: Callable[..., dict[str, Any]],
    judge: Callable[[dict[str, Any]], dict[str, Any]],
    *,
    rows_per_trial: int,
) -> Task | str:
    symbols = retrieval.symbols_of(setting.tokenizer.encode_batch)
    if isinstance(symbols, str):
        return symbols
    shortest = retrieval.shortest(name, symbols)
    lengths = [length for length in setting.lengths if length >= shortest]
    if not lengths:
        return f"it needs {shortest} tokens, and the longest windows have {setting.longest}"

    def run(progress: Callable[[int], object]) -> Found:
        task = ask(
            scorer.logits,
            setting.filler(),
            lengths,
            symbols,
            tokens_per_batch=setting.config.tokens_per_batch,
            progress=progress,
        )
        return {name: task}, judge(task)

    return Task(setting.config.num_trials * rows_per_trial * sum(lengths), run)
