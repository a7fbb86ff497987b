"""From token losses to the numbers of `extrapolation.json`."""

import json
import math
import platform
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import numpy as np

from alibi_jax.data.tokenizers import Tokenizer
from alibi_jax.evaluation.bootstrap import document_sums, interval, resamples
from alibi_jax.evaluation.ngrams import NgramLosses
from alibi_jax.evaluation.verdict import Entry, Floor, Level, Loss, verdict
from alibi_jax.evaluation.windows import Windows
from alibi_jax.files import write_text


def summarize(
    losses: Mapping[int, np.ndarray],
    ngrams: NgramLosses,
    windows: Windows,
    overlap: Mapping[str, Any],
    *,
    train_length: int,
    num_targets: int,
    tokenizer: Tokenizer,
    num_bootstrap: int,
    left_out: Sequence[str],
) -> dict[str, Any]:
    """Reduce token losses to both protocols, with intervals and a verdict.

    Args:
        losses: For each length, nats per token, float32 [N, longest] (from `evaluate`).
        ngrams: Losses of the same tokens [N, longest].
        windows: The windows that were scored.
        overlap: From `training_overlap`.
        train_length: Tokens per training window, the shortest of the lengths.
        num_targets: Tokens at the end of each window that the fixed-target protocol scores.
        tokenizer: What the windows were tokenized with.
        num_bootstrap: Resamples behind each interval.
        left_out: What was asked for and is not among the losses, and why, a line each.

    Returns:
        What `extrapolation.json` holds, without "config" and "versions". Every number is finite
        or None.
    """
    num_documents = len(np.unique(windows.document))
    counts = resamples(num_documents, num_bootstrap)

    def entries(select: slice) -> list[Entry]:
        return by_length(
            {length: losses[length][:, select] for length in losses},
            train_length,
            windows,
            counts,
        )

    nonoverlapping, fixed_targets = entries(slice(None)), entries(slice(-num_targets, None))
    below = floors(ngrams, losses[train_length], num_targets, windows, counts)
    judged = verdict(
        nonoverlapping,
        fixed_targets,
        below["nonoverlapping"],
        unit=windows.unit,
        num_documents=num_documents,
        overlap=overlap["share"],
    )
    return {
        "train_length": train_length,
        "protocols": {"nonoverlapping": nonoverlapping, "fixed_targets": fixed_targets},
        "verdict": judged | {"floors": below},
        "left_out": list(left_out),
        "num_windows": len(windows.tokens),
        "num_documents": num_documents,
        "windows_per_document": windows.per_document,
        "unit": windows.unit,
        "num_copies": windows.copies,
        "training_overlap": overlap,
        "num_tokens": windows.tokens[:, 1:].size,
        "num_targets": num_targets,
        **units(windows, tokenizer),
    }


def units(windows: Windows, tokenizer: Tokenizer) -> dict[str, Any]:
    """Say what the tokens of the windows are, for whoever reads a loss per token or per byte.

    Args:
        windows: The windows that are scored.
        tokenizer: What they were tokenized with.

    Returns:
        "bytes_per_token", UTF-8 bytes of the source text per target; "unknown_bytes", the fraction
        of these for which a token stands that names no word: the model need not know them, so bits
        per byte are too few by what they would cost; "word_level", whether tokens are words.
    """
    return {
        "bytes_per_token": windows.bytes_per_token(),
        "unknown_bytes": windows.unknown_bytes(tokenizer.unknown),
        "word_level": tokenizer.word_level,
    }


def compared(
    losses: Mapping[Any, np.ndarray],
    reference: Any,
    windows: Windows,
    counts: np.ndarray,
) -> dict[Any, Level]:
    """Reduce losses of the same tokens in several settings to levels, and changes against one.

    Args:
        losses: For each setting, nats per token [N, P] of the last P targets of each window.
        reference: The setting with which the others are compared.
        windows: The windows that were scored.
        counts: From `resamples`.

    Returns:
        For each setting its level and, in pairs, its change.
    """
    document = windows.document
    nats = {setting: document_sums(values, document) for setting, values in losses.items()}
    base = nats[reference]
    targets = windows.token_bytes[:, -losses[reference].shape[1] :]
    num_bytes, tokens = (document_sums(of, document) for of in (targets, np.ones_like(targets)))

    def level(total: np.ndarray) -> Level:
        change = total - base
        return {
            **loss(total, tokens, num_bytes, counts),
            "change": ratio(change, tokens),
            "change_interval": interval(change, tokens, counts),
            "relative_change": ratio(change, base),
            "relative_change_interval": interval(change, base, counts),
            "document_nats": [finite(nats) for nats in total],
        }

    # A model beyond its length may well return infinities; they become None.
    with np.errstate(invalid="ignore"):
        return {setting: level(total) for setting, total in nats.items()}


def loss(nats: np.ndarray, tokens: np.ndarray, num_bytes: np.ndarray, counts: np.ndarray) -> Loss:
    """Reduce the totals of documents, float64 [num_documents], to a loss in each of its units."""
    bits = nats / math.log(2)
    per_token = ratio(nats, tokens)
    return {
        "nats_per_token": per_token,
        "interval": interval(nats, tokens, counts),
        "perplexity": perplexity(per_token),
        "bits_per_byte": ratio(bits, num_bytes),
        "bits_per_byte_interval": interval(bits, num_bytes, counts),
        "bytes_per_token": ratio(num_bytes, tokens),
    }


def perplexity(nats_per_token: float | None) -> float | None:
    """Perplexity per token; None if it is not finite."""
    with np.errstate(over="ignore"):
        return None if nats_per_token is None else finite(float(np.exp(nats_per_token)))


def by_length(losses: Mapping[int, np.ndarray], *args: Any, **kwargs: Any) -> list[Entry]:
    """Reduce the losses of every length as `compared` does, to entries from short to long."""
    levels = compared(losses, *args, **kwargs)
    return [{"length": length, **levels[length]} for length in sorted(levels)]


def floors(
    ngrams: NgramLosses,
    losses: np.ndarray,
    num_targets: int,
    windows: Windows,
    counts: np.ndarray,
) -> dict[str, Any]:
    """Reduce what n-grams make of the tokens that a model was scored on.

    Args:
        ngrams: Losses of the same tokens.
        losses: Of the model at the training length, nats per token [N, T].
        num_targets: The last so many are the fixed targets.
        windows: The windows that were scored.
        counts: From `resamples`.

    Returns:
        "num_counted", tokens of training text behind the n-grams; and a `Floor` for each n of the
        tokens of "nonoverlapping" and of "fixed_targets".
    """

    def of(select: slice) -> list[Floor]:
        of_ngrams = {n: values[:, select] for n, values in ngrams.by_order.items()}
        levels = compared({0: losses[:, select], **of_ngrams}, 0, windows, counts)
        return [{"n": n, **levels[n]} for n in of_ngrams]

    return {
        "num_counted": ngrams.num_counted,
        "nonoverlapping": of(slice(None)),
        "fixed_targets": of(slice(-num_targets, None)),
    }


def ratio(numerator: np.ndarray, denominator: np.ndarray) -> float | None:
    """Ratio of two totals; None if it is not finite."""
    total = float(denominator.sum())
    return finite(float(numerator.sum()) / total if total else math.nan)


def finite(value: float) -> float | None:
    """The value as JSON holds it: None if it is not finite."""
    return float(value) if math.isfinite(value) else None


def write_json(summary: Mapping[str, Any], path: Path) -> None:
    """Write a summary as strict JSON, all of it or nothing.

    Args:
        summary: From `summarize`, with whatever the caller adds.
        path: The file; one that exists is replaced.

    Raises:
        ValueError: If a number is not finite, which JSON cannot hold.
    """
    text = json.dumps(summary, indent=2, allow_nan=False) + "\n"
    write_text(path, text)


def versions() -> dict[str, str]:
    """Name the software and the device that produced a result."""
    packages = ("alibi_jax", "jax", "jaxlib", "flax", "optax", "numpy")
    device = jax.devices()[0]
    return {
        **{package: _version(package) for package in packages},
        "python": platform.python_version(),
        "platform": device.platform,
        "device": device.device_kind,
    }


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:  # a checkout that runs without being installed
        return "not installed"
