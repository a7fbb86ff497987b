"""How far attention looks back: the nearest keys that hold most of its probability, by head."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from alibi_jax.evaluation.bootstrap import document_sums, resamples, widened
from alibi_jax.evaluation.protocols import in_batches
from alibi_jax.evaluation.windows import Windows

# f32[layers, B, H, len(edges) + 1] of int32[B, T], edges and a number of queries: the mean
# attention probability of the last queries at distances [0, edges[0]), ..., [edges[-1], T).
MassFn = Callable[[np.ndarray, tuple[int, ...], int], Any]

QUANTILES = (0.5, 0.9, 0.99)
_EDGES_PER_OCTAVE = 4


def mass_edges(length: int) -> tuple[int, ...]:
    """Distances below `length` that divide it evenly on a log scale: 1, 2, 3, 4, 5, 6, 7, 8, 10."""
    steps = np.arange(math.ceil(_EDGES_PER_OCTAVE * math.log2(length)))
    edges = np.unique(np.round(2.0 ** (steps / _EDGES_PER_OCTAVE)).astype(int))
    return tuple(int(edge) for edge in edges if edge < length)


def attention_mass(
    mass_fn: MassFn,
    windows: Windows,
    length: int,
    *,
    num_queries: int,
    num_bootstrap: int,
    slopes: np.ndarray | None,
    sink: bool,
    tokens_per_batch: int,
    progress: Callable[[int], object],
) -> dict[str, Any]:
    """Measure how many of the nearest keys hold 50, 90 and 99% of the attention of each head.

    The slope's own number is that of a head whose queries and keys say nothing, so that only the
    bias is left.

    Args:
        mass_fn: f32[layers, B, H, len(edges) + 1] of int32[B, length].
        windows: The text, of which the last `length` tokens of every window are read.
        length: Tokens of context.
        num_queries: The last so many tokens look back.
        num_bootstrap: Resamples behind each interval.
        slopes: f32[H] or f32[layers, H], the linear bias of each head; None: it has none.
        sink: Whether the bias puts the first key at distance 0 from all.
        tokens_per_batch: Tokens computed at once.
        progress: Called with the number of tokens computed since the last call.

    Returns:
        "length", "num_queries", "quantiles", "sink" and "heads": for each head its "layer" and
        "head" from 0, "keys", their 95% "intervals" over documents, "slope" and "slope_keys", one
        value for each quantile. A slope of 0 has None.
    """
    edges = mass_edges(length)
    mass = in_batches(
        lambda rows: np.moveaxis(np.asarray(mass_fn(rows[:, 1:], edges, num_queries)), 1, 0),
        windows.tokens[:, -length - 1 :],
        tokens_per_batch=tokens_per_batch,
        progress=progress,
    )
    _, num_layers, num_heads, _ = mass.shape
    if slopes is not None:
        slopes = np.broadcast_to(slopes, (num_layers, num_heads))
    counts = resamples(len(np.unique(windows.document)), num_bootstrap)

    def describe(layer: int, head: int) -> dict[str, Any]:
        slope = None if slopes is None else float(slopes[layer, head])
        bins = mass[:, layer, head].T
        by_document = np.stack([document_sums(row[:, None], windows.document) for row in bins])
        total = nearest_keys(by_document.sum(axis=1), edges, length)
        alone = [slope_keys(slope, p, length, sink) for p in QUANTILES] if slope else None
        return {
            "layer": layer,
            "head": head,
            "keys": [float(keys) if np.isfinite(keys) else None for keys in total],
            "intervals": _intervals(total, counts, by_document, edges, length),
            "slope": slope,
            "slope_keys": alone,
        }

    return {
        "length": length,
        "num_queries": num_queries,
        "quantiles": list(QUANTILES),
        "sink": sink,
        "heads": [
            describe(layer, head) for layer in range(num_layers) for head in range(num_heads)
        ],
    }


def nearest_keys(mass: np.ndarray, edges: tuple[int, ...], length: int) -> np.ndarray:
    """Find how many of the nearest keys hold each of `QUANTILES` of the mass.

    Args:
        mass: [..., len(edges) + 1], at distances [0, edges[0]), ..., [edges[-1], length).
        edges: Distances, rising.
        length: The largest number of keys.

    Returns:
        float64 [..., len(QUANTILES)], interpolated between edges.
    """
    bounds = np.array([0, *edges, length], np.float64)
    held = np.concatenate([np.zeros((*mass.shape[:-1], 1)), np.cumsum(mass, axis=-1)], axis=-1)
    held = held / held[..., -1:]
    flat = held.reshape(-1, held.shape[-1])
    found = np.array([[np.interp(p, row, bounds) for p in QUANTILES] for row in flat])
    return found.reshape(*mass.shape[:-1], len(QUANTILES))


def slope_keys(slope: float, p: float, length: int, sink: bool) -> int:
    """Return the fewest nearest of `length` keys that hold `p` of a distribution exp(-slope d).

    A sink, the farthest key, has as much as the nearest.
    """
    weight = np.exp(-slope * np.arange(length))
    weight[-1] = 1.0 if sink else weight[-1]
    held = np.cumsum(weight)
    return int(np.searchsorted(held, p * held[-1])) + 1


def _intervals(
    total: np.ndarray,
    counts: np.ndarray,
    by_document: np.ndarray,
    edges: tuple[int, ...],
    length: int,
) -> list[list[float]] | None:
    """95% intervals of the keys, `total`, that hold each of `QUANTILES`."""
    if counts.shape[1] < 2:
        return None
    found = nearest_keys(counts @ by_document.T, edges, length)
    if not np.isfinite(found).all():
        return None
    bounds = np.percentile(widened(total, found, counts.shape[1]), [2.5, 97.5], axis=0)
    return [[float(x) for x in pair] for pair in np.clip(bounds, 0, length).T]
