"""Does a model find again what stood far back: a needle, or the values of keys.

Both tasks put symbols that are drawn at random into held-out text, ask for them at its end, and
take the likeliest symbol of their alphabet (teacher-forced: the right ones so far are given). The
symbols depend on nothing else in the text, so a model that does not find them is right by chance:
in exactly one of `len(alphabet)` cases.

- needle, or passkey (Mohtashami and Jaggi, 2023, https://arxiv.org/abs/2305.16300): a cue and five
  symbols at a depth of the text (0: its start, 1: its end), and the cue again at its end.
- recall, of many queries (MQAR; Arora et al., 2023, https://arxiv.org/abs/2312.04927): pairs of a
  key and a value at the start of the text, and all of them again, in another order, at its end. A
  value is asked for by its key.

Small models that were not trained for this may well find nothing, within their training length too.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from alibi_jax.evaluation.bootstrap import wilson
from alibi_jax.evaluation.protocols import in_batches

# Logits f32[B, n, V] of the token that follows each of the last n of int32[B, L].
LogitsFn = Callable[[np.ndarray, int], Any]

DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
CUE = "\nKey: "
MARGIN = 0.2  # found: the accuracy is above chance by more than this
_NEEDLE_SYMBOLS = 5
_PAIRS = 8
_SEED = 0  # the same trials in every evaluation, others at every length and depth


class Symbols(NamedTuple):
    """The tokens that retrieval is made of; all differ within an array."""

    cue: np.ndarray  # int32 [c], what announces a needle
    values: np.ndarray  # int32 [A], the alphabet of needles and of values
    keys: np.ndarray  # int32 [K], the alphabet of keys


def symbols_of(encode: Callable[[Sequence[str]], list[np.ndarray]]) -> Symbols | str:
    """Find the tokens of ten digits for values and of 26 letters for keys.

    Args:
        encode: Token ids [n] of each text.

    Returns:
        The symbols, or why there are none.
    """
    cue, *tokens = encode([CUE, *"0123456789", *"abcdefghijklmnopqrstuvwxyz"])
    single = all(len(ids) == 1 for ids in tokens)
    if not single or len({int(ids[0]) for ids in tokens}) < len(tokens) or not len(cue):
        return "the tokenizer has no token of its own for each digit and letter"
    alphabet = np.concatenate(tokens).astype(np.int32)
    return Symbols(cue.astype(np.int32), alphabet[:10], alphabet[10:])


def shortest(task: str, symbols: Symbols) -> int:
    """Return the tokens that "needle" or "recall" takes, and as many again of text."""
    return {"needle": 4 * (len(symbols.cue) + _NEEDLE_SYMBOLS), "recall": 8 * _PAIRS}[task]


def needle_rows(
    filler: np.ndarray, length: int, depth: float, symbols: Symbols
) -> tuple[np.ndarray, int]:
    """Hide a needle in each row.

    Args:
        filler: int32 [num_trials, at least length + 1], held-out text.
        length: Tokens of input.
        depth: Where in the text, 0 to 1; its first token stays first.
        symbols: What to make it of.

    Returns:
        int32 [num_trials, length + 1], whose last five tokens are the answer; and the distance from
        the token that predicts a symbol back to where that symbol stood.
    """
    num_trials, rng = len(filler), np.random.default_rng([_SEED, length, round(100 * depth)])
    answers = rng.choice(symbols.values, (num_trials, _NEEDLE_SYMBOLS))
    needle = np.concatenate([np.tile(symbols.cue, (num_trials, 1)), answers], axis=1)
    body = length + 1 - 2 * needle.shape[1]
    start = 1 + round(depth * (body - 1))
    rows = np.concatenate([filler[:, :start], needle, filler[:, start:body], needle], axis=1)
    return rows.astype(np.int32), body - start + needle.shape[1] - 1


def recall_rows(filler: np.ndarray, length: int, symbols: Symbols) -> tuple[np.ndarray, int]:
    """Put pairs at the start of each row, and again, in another order, at its end.

    Args:
        filler: int32 [num_trials, at least length + 1], held-out text.
        length: Tokens of input.
        symbols: What to make the pairs of.

    Returns:
        int32 [num_trials, length + 1], whose last tokens are key, value, key, value and so on; and
        the mean distance from a key back to its value.
    """
    num_trials, rng = len(filler), np.random.default_rng([_SEED, length])
    keys = rng.permuted(np.tile(symbols.keys, (num_trials, 1)), axis=1)[:, :_PAIRS]
    pairs = np.stack([keys, rng.choice(symbols.values, keys.shape)], axis=2)
    order = rng.permuted(np.tile(np.arange(_PAIRS), (num_trials, 1)), axis=1)
    asked = np.take_along_axis(pairs, order[:, :, None], axis=1)
    flat = (num_trials, 2 * _PAIRS)
    body = length + 1 - 4 * _PAIRS
    rows = np.concatenate(
        [filler[:, :1], pairs.reshape(flat), filler[:, 1:body], asked.reshape(flat)], axis=1
    )
    return rows.astype(np.int32), body - 2 + 2 * _PAIRS


def found(
    logits_fn: LogitsFn,
    rows: np.ndarray,
    alphabet: np.ndarray,
    *,
    count: int,
    step: int,
    tokens_per_batch: int,
    progress: Callable[[int], object],
) -> np.ndarray:
    """Say which answers a model gets right.

    Args:
        logits_fn: f32[B, n, V] of int32[B, L] and n.
        rows: int32 [num_trials, L + 1].
        alphabet: int32 [A], the tokens that an answer may be.
        count: Tokens at the end of a row among which the answers are.
        step: Every so many of these is an answer, and the last is.
        tokens_per_batch: Tokens computed at once.
        progress: Called with the number of tokens computed since the last call.

    Returns:
        float64 [num_trials, count // step]: 1 right, 0 wrong, nan where no symbol is likeliest for
        logits that are not finite.
    """

    def likeliest(tokens: np.ndarray) -> np.ndarray:
        logits = np.asarray(logits_fn(tokens[:, :-1], count))[:, step - 1 :: step, alphabet]
        return np.where(np.isfinite(logits).all(axis=-1), np.argmax(logits, axis=-1), np.nan)

    chosen = in_batches(likeliest, rows, tokens_per_batch=tokens_per_batch, progress=progress)
    known = np.isfinite(chosen)
    symbols = alphabet[np.where(known, chosen, 0).astype(np.int64)]
    return np.where(known, symbols == rows[:, -count:][:, step - 1 :: step], np.nan)


def needle(
    logits_fn: LogitsFn,
    filler: np.ndarray,
    lengths: Sequence[int],
    symbols: Symbols,
    *,
    tokens_per_batch: int,
    progress: Callable[[int], object],
) -> dict[str, Any]:
    """Look for needles at every length and depth.

    Args:
        logits_fn: f32[B, n, V] of int32[B, L] and n.
        filler: int32 [num_trials, longest + 1], held-out text.
        lengths: Tokens of input; each at least `shortest`.
        symbols: What needles are made of.
        tokens_per_batch: Tokens computed at once.
        progress: Called with the number of tokens computed since the last call.

    Returns:
        "chance", "margin", "num_trials", "num_symbols" a trial, and "entries", one for each length
        and depth with "accuracy", its "interval" (95%) and the "distance" in tokens. Both are None
        where a logit is not finite.
    """
    entries = []
    for length in lengths:
        for depth in DEPTHS:
            rows, distance = needle_rows(filler, length, depth, symbols)
            hits = found(
                logits_fn,
                rows,
                symbols.values,
                count=_NEEDLE_SYMBOLS,
                step=1,
                tokens_per_batch=tokens_per_batch,
                progress=progress,
            )
            entries.append(_entry(hits, length=length, depth=depth, distance=distance))
    return _task(entries, filler, symbols, _NEEDLE_SYMBOLS)


def recall(
    logits_fn: LogitsFn,
    filler: np.ndarray,
    lengths: Sequence[int],
    symbols: Symbols,
    *,
    tokens_per_batch: int,
    progress: Callable[[int], object],
) -> dict[str, Any]:
    """Ask for the values of keys at every length.

    Args and returns are those of `needle`, but for depths.
    """
    entries = []
    for length in lengths:
        rows, distance = recall_rows(filler, length, symbols)
        hits = found(
            logits_fn,
            rows,
            symbols.values,
            count=2 * _PAIRS,
            step=2,
            tokens_per_batch=tokens_per_batch,
            progress=progress,
        )
        entries.append(_entry(hits, length=length, distance=distance))
    return _task(entries, filler, symbols, _PAIRS)


def _entry(hits: np.ndarray, **where: float) -> dict[str, Any]:
    known = bool(np.isfinite(hits).all())
    accuracy = float(hits.mean()) if known else None
    return {**where, "accuracy": accuracy, "interval": wilson(hits) if known else None}


def _task(
    entries: list[dict[str, Any]], filler: np.ndarray, symbols: Symbols, num_symbols: int
) -> dict[str, Any]:
    return {
        "chance": 1 / len(symbols.values),
        "margin": MARGIN,
        "num_trials": len(filler),
        "num_symbols": num_symbols,
        "entries": entries,
    }


def retrieves_to(task: dict[str, Any], bound: int) -> int:
    """Return the largest length at which answers are found, and at every shorter one.

    They are found at a length if at every depth a bound of the accuracy's interval is above chance
    by more than the margin.

    Args:
        task: From `needle` or `recall`.
        bound: Which bound: 0, the lower, or 1, the upper.

    Returns:
        Tokens; 0 if they are not found even at the shortest length.
    """
    threshold = task["chance"] + task["margin"]
    reached = 0
    for length in sorted({entry["length"] for entry in task["entries"]}):
        cells = [entry for entry in task["entries"] if entry["length"] == length]
        if not all(cell["interval"] and cell["interval"][bound] > threshold for cell in cells):
            break
        reached = length
    return reached
