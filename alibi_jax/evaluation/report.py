"""From token losses to the numbers of `extrapolation.json` and the table on the screen."""

import json
import math
import platform
import textwrap
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import numpy as np

from alibi_jax.evaluation.bootstrap import document_sums, interval, resamples
from alibi_jax.evaluation.protocols import Windows
from alibi_jax.evaluation.verdict import Entry, percent, relative_change, verdict
from alibi_jax.files import write_text

_WIDTH = 100  # columns of the table


def summarize(
    losses: Mapping[int, np.ndarray],
    windows: Windows,
    *,
    train_length: int,
    num_targets: int,
    bytes_per_token: float,
    num_bootstrap: int,
) -> dict[str, Any]:
    """Reduce token losses to both protocols, with intervals and a verdict.

    Args:
        losses: For each length, nats per token, float32 [N, longest] (from `evaluate`).
        windows: The windows that were scored.
        train_length: Tokens per training window, the shortest of the lengths.
        num_targets: Tokens at the end of each window that the fixed-target protocol scores.
        bytes_per_token: UTF-8 bytes per token of the held-out text.
        num_bootstrap: Resamples behind each interval.

    Returns:
        What `extrapolation.json` holds, without "config" and "versions". Every number is finite
        or None.
    """
    num_documents = len(np.unique(windows.document))
    counts = resamples(num_documents, num_bootstrap)

    def entries(select: slice) -> list[Entry]:
        return _entries(
            {length: losses[length][:, select] for length in sorted(losses)},
            windows.document,
            counts,
            train_length=train_length,
            bits_per_nat=1 / (math.log(2) * bytes_per_token),
        )

    nonoverlapping, fixed_targets = entries(slice(None)), entries(slice(-num_targets, None))
    return {
        "train_length": train_length,
        "protocols": {"nonoverlapping": nonoverlapping, "fixed_targets": fixed_targets},
        "verdict": verdict(
            nonoverlapping, fixed_targets, unit=windows.unit, num_documents=num_documents
        ),
        "num_windows": len(windows.tokens),
        "num_documents": num_documents,
        "unit": windows.unit,
        "num_tokens": windows.tokens[:, 1:].size,
        "num_targets": num_targets,
        "bytes_per_token": bytes_per_token,
    }


def _entries(
    losses: Mapping[int, np.ndarray],
    document: np.ndarray,
    counts: np.ndarray,
    *,
    train_length: int,
    bits_per_nat: float,
) -> list[Entry]:
    """One protocol: `losses` holds its [N, P] tokens at each length, P the same at all."""
    nats = {length: document_sums(values, document) for length, values in losses.items()}
    tokens = document_sums(np.ones_like(losses[train_length]), document)
    train = nats[train_length]

    def entry(length: int) -> Entry:
        level, change = nats[length], nats[length] - train
        return {
            "length": length,
            "nats_per_token": _ratio(level, tokens),
            "interval": interval(level, tokens, counts),
            "bits_per_byte": _ratio(level * bits_per_nat, tokens),
            "change": _ratio(change, tokens),
            "change_interval": interval(change, tokens, counts),
            "relative_change": _ratio(change, train),
            "relative_change_interval": interval(change, train, counts),
        }

    # A model beyond its length may well return infinities; they become None.
    with np.errstate(invalid="ignore"):
        return [entry(length) for length in losses]


def _ratio(numerator: np.ndarray, denominator: np.ndarray) -> float | None:
    """Ratio of two totals; None if it is not finite."""
    total = float(denominator.sum())
    ratio = float(numerator.sum()) / total if total else math.nan
    return ratio if math.isfinite(ratio) else None


def table(summary: Mapping[str, Any]) -> str:
    """Write a summary as plain text of at most 100 columns that ends with the verdict."""
    protocols = summary["protocols"]
    lines = [
        f"{'':16}{'nonoverlapping windows':<28}fixed targets (the last {summary['num_targets']} "
        "tokens of each window)",
        f"{'tokens':>8}{'x':>6}  {'bits/byte':>9}  {'loss change':<17}{'bits/byte':>9}  "
        "loss change [95% interval]",
    ]
    for window, fixed in zip(protocols["nonoverlapping"], protocols["fixed_targets"], strict=True):
        length = window["length"]
        trained = length == summary["train_length"]
        change = "" if trained else _or(percent, window["relative_change"])
        fixed_change = "(training length)" if trained else relative_change(fixed)
        lines.append(
            f"{length:>8}{length / summary['train_length']:>6g}  "
            f"{_or('{:.4f}'.format, window['bits_per_byte']):>9}  {change:<17}"
            f"{_or('{:.4f}'.format, fixed['bits_per_byte']):>9}  {fixed_change}"
        )
    longest = protocols["nonoverlapping"][-1]["length"]
    lines += [
        f"{_plural(summary['num_windows'], 'window')} of {longest} tokens from "
        f"{_plural(summary['num_documents'], summary['unit'])}.",
        "",
        *textwrap.wrap(summary["verdict"]["text"], _WIDTH),
    ]
    return "\n".join(line.rstrip() for line in lines)


def _or(write: Callable[[float], str], number: float | None) -> str:
    return "not finite" if number is None else write(number)


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}" + ("" if count == 1 else "s")


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
