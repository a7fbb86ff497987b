"""Token windows of a split as an endless stream of batches, exact at any step."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import numpy as np

from alibi_jax.data.corpus import TokenizedSplit
from alibi_jax.errors import UserError

if TYPE_CHECKING:
    import grain

Batch = dict[str, np.ndarray]

# Reading a batch is a few copies from mapped memory: more threads would only wait for each other.
_READ_THREADS = 2
_BATCHES_AHEAD = 8


def batches(
    split: TokenizedSplit,
    *,
    sequence_length: int,
    batch_size: int,
    seed: int,
    packing: str,
    rows: np.ndarray | None = None,
) -> grain.MapDataset[Batch]:
    """Return the endless stream of shuffled batches of a split.

    The documents stand one after the other and window i is tokens[i*L : i*L + L + 1], L being
    `sequence_length`: neighbours share one token, so every token but the first of all is a target
    once an epoch (what is left at the end, less than a window, is dropped). Epochs are shuffled
    differently and follow one another without a gap: a batch may hold windows of two epochs, or,
    where a split has fewer windows than `batch_size`, of several.

    Args:
        split: Where the tokens come from.
        sequence_length: L, tokens of a sequence.
        batch_size: B, sequences of a batch.
        seed: From 0 to 2**32 - 1. The order of the windows depends on nothing else.
        packing: "documents" or "stream", as `DataConfig.packing`.
        rows: Rows of every batch to read, int [n]; None: all. One of several processes reads its
            own: the batches are the same for any number of them, and so is the position.

    Returns:
        A data set whose element k is the batch of step k, each of its arrays int32 [B, L+1] (with
        `rows`, [n, L+1]): "tokens"; "segment_ids", the number of the document within the window
        from 1 on ("stream": all 1); "token_bytes", as `TokenizedSplit.token_bytes`. A target is to
        be predicted where its segment id is that of the token before. There is no padding, so no
        segment id is 0.

    Raises:
        UserError: The split is shorter than one window, or the seed is out of range.
    """
    import grain

    if not 0 <= seed < 2**32:
        raise UserError(f"seed must be from 0 to {2**32 - 1}, not {seed}")
    num_windows = (len(split.tokens) - 1) // sequence_length
    if num_windows < 1:
        raise UserError(
            f"sequence_length {sequence_length} needs {sequence_length + 1} tokens and the split "
            f"has {len(split.tokens)}; give more text or a sequence_length of at most "
            f"{len(split.tokens) - 1}"
        )
    # Only numbers of windows go through Grain one by one; the tokens are read a batch at a time,
    # and only those of `rows`.
    numbers = grain.MapDataset.range(num_windows).seed(seed).shuffle().repeat()
    return numbers.batch(batch_size, drop_remainder=True).map(
        functools.partial(_read_windows, split, sequence_length, packing, rows)
    )


def training_iterator(dataset: grain.MapDataset[Batch]) -> grain.DatasetIterator[Batch]:
    """Iterate over batches, prepared ahead in threads.

    Args:
        dataset: What `batches` returned.

    Returns:
        An iterator whose `get_state` and `set_state` hold the position exactly. Call its `close`
        at the end.
    """
    import grain

    options = grain.ReadOptions(num_threads=_READ_THREADS, prefetch_buffer_size=_BATCHES_AHEAD)
    return iter(dataset.to_iter_dataset(options))


def stream_identity(
    *, fingerprint: str, sequence_length: int, batch_size: int, seed: int, packing: str
) -> dict[str, str | int]:
    """Return what identifies a stream of batches, for a checkpoint to store and to compare.

    Grain takes the position of one stream for that of another without a word.

    Args:
        fingerprint: `Corpus.fingerprint`.
        sequence_length: As given to `batches`.
        batch_size: As given to `batches`.
        seed: As given to `batches`.
        packing: As given to `batches`.
    """
    return {
        "corpus": fingerprint,
        "sequence_length": sequence_length,
        "batch_size": batch_size,
        "seed": seed,
        "packing": packing,
    }


def _read_windows(
    split: TokenizedSplit,
    sequence_length: int,
    packing: str,
    rows: np.ndarray | None,
    numbers: np.ndarray,
) -> Batch:
    """Return `rows` of the batch of the windows with these numbers, int [B]."""
    numbers = numbers if rows is None else numbers[rows]
    starts = numbers * sequence_length
    stops = starts + sequence_length + 1
    tokens = np.empty((len(numbers), sequence_length + 1), np.int32)
    token_bytes = np.empty_like(tokens)
    # 1 where a segment begins, then their running sum.
    segment_ids = np.zeros_like(tokens)
    segment_ids[:, 0] = 1
    first = np.searchsorted(split.offsets, starts)
    last = np.searchsorted(split.offsets, stops)
    for row, (start, stop) in enumerate(zip(starts, stops, strict=True)):
        tokens[row] = split.tokens[start:stop]
        token_bytes[row] = split.token_bytes[start:stop]
        if packing == "documents":
            segment_ids[row, split.offsets[first[row] : last[row]] - start] = 1
    segment_ids = np.cumsum(segment_ids, axis=1, dtype=np.int32)
    return {"tokens": tokens, "segment_ids": segment_ids, "token_bytes": token_bytes}
