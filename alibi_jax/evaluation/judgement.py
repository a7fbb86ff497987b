"""The three lengths that a deployer needs: to which the loss holds, context helps, text is found.

- It holds to X: the largest length at which the loss on fixed targets is at most 1% above that at
  the training length, there and at every length below.
- It uses context to Y: the smallest C such that, with no more than the last C tokens as input, the
  loss on fixed targets is at most 0.5% above the lowest that this or any larger C gives, all of the
  longest windows among them. So a longer input gains at most 0.5% of the loss.
- It retrieves to Z: the largest length at which a needle is found at every depth, there and at
  every length below: the 95% interval of the accuracy lies above chance by more than a margin.

X and Y have 95% intervals over documents: both are found anew in every resample. Z is found with
lower bounds of accuracies, and its interval ends where upper bounds would put it.

A fourth is for those who build models and not in the sentence: the window of a layer, the smallest
W such that the loss obeys the rule of Y where keys at a distance of W or more are masked in every
layer. Each layer passes on what it saw, so N of them reach N (W - 1) tokens back, and Y may be far
above W.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from alibi_jax.evaluation.bootstrap import document_sums, interval_of_a_length
from alibi_jax.evaluation.protocols import SHORTEST_WINDOW
from alibi_jax.evaluation.retrieval import retrieves_to
from alibi_jax.evaluation.verdict import (
    TOLERANCE,
    Entry,
    not_finite,
    relative_change,
    verdict,
    why_none,
)

CONTEXT_TOLERANCE = 0.005  # context beyond is not used if it lowers the loss by less than this


def held_to(totals: np.ndarray, lengths: Sequence[int]) -> np.ndarray:
    """Find X from losses float64 [R, L] at each length, the training length first: int [R]."""
    with np.errstate(invalid="ignore"):
        holds = totals <= (1 + TOLERANCE) * totals[:, :1]
    held = np.cumprod(holds[:, 1:], axis=1).sum(axis=1)
    return np.asarray(lengths)[held]


def used_to(totals: np.ndarray, windows: Sequence[int]) -> np.ndarray:
    """Find Y from losses float64 [R, W] with each C, rising; the last cuts nothing: int [R].

    The window of a layer is found likewise. A loss that is not a number counts as infinite.
    """
    totals = np.where(np.isnan(totals), np.inf, totals)
    lowest = np.minimum.accumulate(totals[:, ::-1], axis=1)[:, ::-1]
    enough = totals <= (1 + CONTEXT_TOLERANCE) * lowest
    return np.asarray(windows)[np.argmax(enough, axis=1)]


def holds_interval(
    losses: Mapping[int, np.ndarray], document: np.ndarray, counts: np.ndarray
) -> list[int] | None:
    """Compute the 95% interval of X from losses [N, P] of fixed targets at each length."""
    lengths = sorted(losses)
    totals = np.stack([document_sums(losses[length], document) for length in lengths])
    return interval_of_a_length(lambda drawn: held_to(drawn, lengths), totals, counts)


def enough(
    name: str, losses: Mapping[int, np.ndarray], document: np.ndarray, counts: np.ndarray
) -> dict[str, Any]:
    """Find Y, or the window of a layer, and its interval from losses [N, P] with each C, or W.

    Args:
        name: "uses_context_to" or "layer_window".
        losses: Of fixed targets, by C or W; the largest cuts nothing.
        document: int [N], the document of each window.
        counts: From `bootstrap.resamples`.

    Returns:
        The name with tokens, or None where no loss is finite; and its "..._interval".
    """
    windows = sorted(losses)
    totals = np.stack([document_sums(losses[window], document) for window in windows])
    point = totals.sum(axis=1)[None]
    known = bool(np.isfinite(point).any())
    interval = interval_of_a_length(lambda drawn: used_to(drawn, windows), totals, counts)
    return {
        name: int(used_to(point, windows)[0]) if known else None,
        f"{name}_interval": interval if known else None,
    }


def retrieval_range(task: dict[str, Any]) -> dict[str, Any]:
    """Find Z and its interval from what `retrieval.needle` returned."""
    bounds = [retrieves_to(task, bound) for bound in (0, 1)]
    return {"retrieves_to": bounds[0], "retrieves_to_interval": bounds}


def holding(
    nonoverlapping: list[Entry],
    fixed_targets: list[Entry],
    floors: dict[str, Any],
    interval: list[int] | None,
    *,
    unit: str,
    num_documents: int,
    overlap: float,
) -> dict[str, Any]:
    """Find X: what `verdict` finds, its words as "details", with an interval and a warning.

    Args:
        nonoverlapping: As for `verdict`.
        fixed_targets: As for `verdict`.
        floors: From `report.floors`.
        interval: From `holds_interval`.
        unit: As for `verdict`.
        num_documents: As for `verdict`.
        overlap: As for `verdict`.
    """
    found = verdict(
        nonoverlapping,
        fixed_targets,
        floors["nonoverlapping"],
        unit=unit,
        num_documents=num_documents,
        overlap=overlap,
    )
    return {
        **found,
        "floors": floors,
        "holds_to_interval": interval if found["learned"] else None,
        "not_finite_at": not_finite(fixed_targets),
        "details": found["text"],
        "warning": warning(nonoverlapping, fixed_targets),
    }


def warning(nonoverlapping: list[Entry], fixed_targets: list[Entry]) -> str | None:
    """Name the longest length where the nonoverlapping curve alone would mislead; None: none.

    Args:
        nonoverlapping: Entries by length, the training length first.
        fixed_targets: Entries of the same lengths.
    """
    pairs = list(zip(nonoverlapping, fixed_targets, strict=True))[1:]
    whole, fixed = next((pair for pair in reversed(pairs) if _misleads(*pair)), (None, None))
    if whole is None or fixed is None:
        return None
    return (
        f"nonoverlapping windows alone would mislead: at {whole['length']} tokens their loss "
        f"changes by {relative_change(whole)}, but on the same targets longer context changes it "
        f"by {relative_change(fixed)}."
    )


def _misleads(whole: Entry, fixed: Entry) -> bool:
    """Say whether fewer tokens near the start of a window make most of a gain.

    They do where the nonoverlapping curve falls, while longer context gains nothing that can be
    measured on fixed targets, or less than half of it for sure (the far end of the interval).
    """
    change = whole["change"]
    whole_interval, fixed_interval = whole["change_interval"], fixed["change_interval"]
    if change is None or whole_interval is None or fixed_interval is None:
        return False
    falls, gains = whole_interval[1] < 0, fixed_interval[1] < 0
    return falls and not (gains and -fixed_interval[0] > -change / 2)


# The protocol behind each length of the verdict.
MEASURED_BY = {
    "holds_to": "fixed_targets",
    "uses_context_to": "truncated_input",
    "retrieves_to": "needle",
    "layer_window": "truncation",
}


def conclude(judged: Mapping[str, Any], longest: int) -> dict[str, Any]:
    """Complete the verdict from what the protocols found; what was not measured is None.

    Args:
        judged: What `holding`, `enough` and `retrieval_range` returned.
        longest: The longest length that was measured.

    Returns:
        "text", one line; "holds_to", "uses_context_to", "retrieves_to" and "layer_window" in
        tokens, each with its "..._interval" and "..._protocol"; "warning"; and what `holding` adds.
        How much context is used is None, too, where the model learned too little to say.
    """
    complete: dict[str, Any] = {"text": "", "warning": None, "learned": None}
    for name, protocol in MEASURED_BY.items():
        complete |= {name: None, f"{name}_interval": None, f"{name}_protocol": protocol}
    complete |= judged
    if complete["learned"] is False:
        for name in ("uses_context_to", "layer_window"):
            complete |= {name: None, f"{name}_interval": None}
    return complete | {"text": sentence(complete, longest)}


def sentence(judged: Mapping[str, Any], longest: int) -> str:
    """Write the verdict in one line; `longest` is the longest length that was measured."""
    parts = []
    if judged["learned"] is False:
        parts.append(why_none(judged["closest_ngram"]))
    if judged["holds_to"] is not None:
        within = f"(paired, within {100 * TOLERANCE:g}%)"
        parts.append(f"holds to {_tokens(judged, 'holds_to', longest)} {within}")
        if judged.get("not_finite_at"):  # a file of an earlier version does not say
            parts.append(f"is not finite at {judged['not_finite_at']}")
    if judged["uses_context_to"] is not None:
        unknown = "" if judged["learned"] else " (compared with n-grams only by fixed_targets)"
        parts.append(f"uses context to {_tokens(judged, 'uses_context_to', longest)}{unknown}")
    if judged["retrieves_to"]:
        parts.append(f"retrieves to {_tokens(judged, 'retrieves_to', longest)}")
    elif judged["retrieves_to"] == 0:
        parts.append("retrieves from no length reliably")
    text = ", ".join(parts) or "nothing was measured that a verdict needs"
    return text[0].upper() + text[1:] + "."


def _tokens(judged: Mapping[str, Any], name: str, longest: int) -> str:
    tokens, interval = judged[name], judged[f"{name}_interval"]
    low, high = (tokens, tokens) if interval is None else interval
    bound = "at least " if low == tokens == longest else ""
    if name == "uses_context_to" and tokens == high == SHORTEST_WINDOW:
        bound = "at most "
    ends = "" if interval is None else f" [{low}, {high}]"
    return f"{bound}{tokens} tokens{ends}"
