"""Say in words how far the loss holds, and what the windows' gain is made of.

A model that is not clearly better than short n-grams of its training text gets neither: its loss
may well be the same at every length.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

from alibi_jax.evaluation.bootstrap import FEW
from alibi_jax.evaluation.ngrams import NAMES
from alibi_jax.evaluation.overlap import LARGE

TOLERANCE = 0.01  # the loss holds while it is at most this fraction above the training length's


class Loss(TypedDict):
    """A loss; None: a number is not finite or not known."""

    nats_per_token: float | None
    interval: list[float] | None  # 95%, nats per token
    perplexity: float | None  # exp(nats_per_token): per token, of a word-level tokenizer per word
    bits_per_byte: float | None  # of the source text's own bytes
    bits_per_byte_interval: list[float] | None  # 95%
    bytes_per_token: float | None  # of these targets


class Level(Loss):
    """A loss and its change against another."""

    change: float | None  # against the other loss, nats per token
    change_interval: list[float] | None  # 95%, paired
    relative_change: float | None  # as a fraction of the other loss
    relative_change_interval: list[float] | None  # 95%, paired
    document_nats: list[float | None]  # total of each document, from which runs can be compared


class Entry(Level):
    """One length under one protocol; the other loss is that of the training length."""

    length: int  # tokens of a window


class Floor(Level):
    """The n-grams of the training text; the other loss is the model's at the training length."""

    n: int


def percent(fraction: float) -> str:
    """Write a change with its sign and about three digits: +0.05%, -12.3%, +4,310%."""
    digits = 2 if abs(fraction) < 0.1 else 1 if abs(fraction) < 1 else 0
    rounded = round(100 * fraction, digits) + 0.0  # no "-0.00%"
    return f"{rounded:+,.{digits}f}%"


def relative_change(entry: Level) -> str:
    """Write a relative change with its interval: "+0.05% [-0.02%, +0.12%]"."""
    if entry["relative_change"] is None:
        return "not finite"
    text = percent(entry["relative_change"])
    if entry["relative_change_interval"] is not None:
        low, high = entry["relative_change_interval"]
        text += f" [{percent(low)}, {percent(high)}]"
    return text


def verdict(
    nonoverlapping: list[Entry],
    fixed_targets: list[Entry],
    floors: list[Floor],
    *,
    unit: str,
    num_documents: int,
    overlap: float,
) -> dict[str, Any]:
    """Judge how far beyond the training length the loss holds.

    It holds to a length if the loss on fixed targets is at most 1% above that at the training
    length, there and at every length below.

    Args:
        nonoverlapping: Entries by length; the first is the training length.
        fixed_targets: Entries by length, likewise.
        floors: Of the tokens of the nonoverlapping windows.
        unit: What the intervals resample: "document" or "block".
        num_documents: How many of them there are.
        overlap: The share of the text that stands in the training text as well.

    Returns:
        "text"; "learned", whether the model is clearly better than every floor, and
        "closest_ngram", the n of the best (None: the loss is not finite); "holds_to", tokens;
        "holds_factor", times the training length; "compared_at", the longest length that holds or
        else the first beyond the training length (None if there is none); and, at that length,
        "nonoverlapping_change", "fixed_targets_change" and their "..._interval", nats per token
        against the training length. "holds_to" and "holds_factor" are None where the model learned
        too little, or its loss is not finite.
    """
    train_length = fixed_targets[0]["length"]
    held = len(list(itertools.takewhile(_holds, fixed_targets[1:])))
    unbeaten = [floor for floor in floors if _lead(floor) <= 0]
    learned = not unbeaten
    closest = min(unbeaten or floors, key=lambda floor: floor["nats_per_token"] or 0.0)
    holds_to = fixed_targets[held]["length"] if learned else None
    sentences = (
        _sentences(nonoverlapping, fixed_targets, held)
        if learned
        else [_none(closest, train_length)]
    )
    sentences += [*few_documents(unit, num_documents), *much_seen(overlap)]
    result: dict[str, Any] = {
        "text": " ".join(sentences),
        "learned": learned,
        "closest_ngram": None if closest["change"] is None else closest["n"],
        "holds_to": holds_to,
        "holds_factor": holds_to and holds_to / train_length,
        "compared_at": None,
    }
    if len(fixed_targets) > 1:
        at = max(held, 1)
        result["compared_at"] = fixed_targets[at]["length"]
        for name, entry in (
            ("nonoverlapping_change", nonoverlapping[at]),
            ("fixed_targets_change", fixed_targets[at]),
        ):
            result[name] = entry["change"]
            result[f"{name}_interval"] = entry["change_interval"]
    return result


def _lead(floor: Floor) -> float:
    """Nats per token by which the model is surely better: an end of the interval if there is one.

    A model whose loss is not finite is not better.
    """
    surely = floor["change_interval"][0] if floor["change_interval"] else floor["change"]
    return -math.inf if surely is None else surely


def why_none(closest_ngram: int | None) -> str:
    """Say in a few words why there is no verdict on a model that has not learned."""
    if closest_ngram is None:
        return "the loss at the training length is not finite"
    return (
        "learned too little for a verdict: not clearly better than "
        f"{NAMES[closest_ngram]} of the training text"
    )


def _none(floor: Floor, train_length: int) -> str:
    """Say the same in full."""
    if floor["change"] is None:
        return (
            f"The loss at the training length of {train_length} tokens is not finite: there is "
            "nothing to compare other lengths with."
        )
    return (
        f"The model {why_none(floor['n'])}, whose loss on the same tokens is "
        f"{relative_change(floor)} against the model's at the training length of {train_length} "
        "tokens. How the model's changes with length says nothing about its use of context."
    )


def _holds(entry: Entry) -> bool:
    return entry["relative_change"] is not None and entry["relative_change"] <= TOLERANCE


def _sentences(nonoverlapping: list[Entry], fixed: list[Entry], held: int) -> list[str]:
    if len(fixed) == 1:
        return [
            f"Evaluated at the training length of {fixed[0]['length']} tokens only, which says "
            "nothing about longer ones."
        ]
    sentences = []
    if held:
        sentences += [_holding(fixed, held), *_gain(nonoverlapping[held], fixed[held])]
    if held + 1 < len(fixed):
        sentences.append(_failing(fixed, held))
        beyond = not_finite(fixed[held + 2 :])
        sentences += [f"At {beyond} it is not finite."] if beyond else []
    return sentences


def not_finite(entries: Sequence[Mapping[str, object]]) -> str:
    """Name the lengths at which a loss is not finite: "256 and 512 tokens"; nothing if none is."""
    lengths = [str(entry["length"]) for entry in entries if entry["nats_per_token"] is None]
    return f"{' and '.join(lengths)} tokens" if lengths else ""


def few_documents(unit: str, num_documents: int) -> list[str]:
    """Say, in at most one sentence, that too little was resampled for narrow intervals."""
    if num_documents == 1:
        return [
            f"All windows come from one {unit}, so there are no intervals: nothing here says what "
            "another text would show."
        ]
    if num_documents < FEW:
        return [f"Intervals are wide, of only {num_documents} {unit}s."]
    return []


def much_seen(overlap: float) -> list[str]:
    """Say, in at most one sentence, that much of the text is no news to the model."""
    if overlap < LARGE:
        return []
    return [
        f"{overlap:.0%} of the tokens stand in the training text as well: losses of new text would "
        "be higher."
    ]


def _holding(fixed: list[Entry], held: int) -> str:
    """Say how far the loss holds, what it does there and whether longer context helps."""
    entry = fixed[held]
    factor = entry["length"] / fixed[0]["length"]
    reach = " (the longest evaluated)" if held + 1 == len(fixed) else ""
    text = (
        f"The loss holds to {entry['length']} tokens{reach}, {factor:g}x the training length: on "
        f"the same targets it changes by {relative_change(entry)}"
    )
    interval = entry["relative_change_interval"]
    if interval is None:
        return text + "."
    low, high = interval
    if high > TOLERANCE:
        return text + ", an interval that reaches above +1%, so this is not certain."
    if high < 0:
        return text + ", a gain from longer context."
    if low > 0:
        return text + ", no gain from longer context."
    return text + ", no measurable gain from longer context."


def _gain(nonoverlapping: Entry, fixed: Entry) -> list[str]:
    """Bound the part of the nonoverlapping windows' gain that longer context can explain.

    A fixed target has the full length as context where other tokens have less, so the gain on
    fixed targets bounds what longer context does for the average token (if more context never does
    less). The bound taken is the far end of its interval.
    """
    change_interval, fixed_interval = nonoverlapping["change_interval"], fixed["change_interval"]
    change = nonoverlapping["change"]
    if change is None or change_interval is None or fixed_interval is None:
        return []
    if change_interval[1] >= 0:
        return []
    gain = f"{-change:.4f} nats per token that nonoverlapping windows gain"
    bound = max(0.0, -fixed_interval[0])
    if bound >= -change:
        return [f"Longer context could explain all of the {gain}."]
    # Rounded up, as a bound must be.
    most = f"at most {math.ceil(bound * 1e4) / 1e4:.4f}" if bound else "none"
    return [
        f"Of the {gain}, {most} is longer context; the rest is fewer tokens near a window's start."
    ]


def _failing(fixed: list[Entry], held: int) -> str:
    """Say where the loss first fails to hold, and by how much."""
    entry = fixed[held + 1]
    start = (
        f"It does not hold at {entry['length']} tokens: "
        if held
        else f"The loss does not hold beyond the training length of {fixed[0]['length']} tokens: "
        f"at {entry['length']}, "
    )
    if entry["relative_change"] is None:
        return f"{start}on the same targets it is not finite."
    interval = entry["relative_change_interval"]
    unsure = interval is not None and interval[0] <= TOLERANCE
    end = ", though the interval reaches below +1%" if unsure else ""
    return f"{start}on the same targets it changes by {relative_change(entry)}{end}."
