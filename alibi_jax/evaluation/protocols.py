"""Score the same held-out tokens with windows of several lengths.

Take N "longest windows" of `max(lengths)` targets each from held-out text. At each length L, tile
every one of them by windows of L tokens and score every token with only its own tile as context:
`losses[L]` is [N, longest] nats per token, and every length scores the very same tokens. The two
protocols of the literature are two means of this one array:

- nonoverlapping (Press et al., ICLR 2022, Tables 2-5, https://arxiv.org/abs/2108.12409): the mean
  over all positions. A longer window has a smaller share of tokens near its start, which have
  little context, so this falls with length even if the model sees no further than before
  (Press et al., App. B, the "early token curse").
- fixed targets (Kazemnejad et al., 2023, App. F, https://arxiv.org/abs/2305.19466; FIRE,
  https://arxiv.org/abs/2310.04418; DAPE, https://arxiv.org/abs/2405.14722): the mean over the last
  `num_targets` positions. Those tokens end a tile at every length, so only the amount of context
  before them differs and lengths are compared in pairs.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from tqdm import tqdm

from alibi_jax.distributed import is_main
from alibi_jax.errors import UserError

# Nats per token, f32[B, L], of the last L tokens of each row of int32[B, L+1]; compiled by the
# caller. Any array that NumPy can read may come back.
LossFn = Callable[[np.ndarray], Any]

_MIN_UNITS = 2  # fewer documents give no interval


class TokenizedDocuments(Protocol):
    """Tokenized documents, one after the other (`alibi_jax.data.corpus.TokenizedSplit`)."""

    @property
    def tokens(self) -> np.ndarray:
        """Token ids, int [total]."""

    @property
    def offsets(self) -> np.ndarray:
        """Where documents start, and the end of the last, int64 [num_documents + 1]."""


@dataclass(frozen=True)
class Windows:
    """The held-out tokens that every length scores.

    Attributes:
        tokens: int32 [N, longest + 1]; the first of each row is context only.
        document: int64 [N], which unit a window comes from; the bootstrap resamples these.
        unit: What such a unit is: "document", or "piece" of the concatenated stream.
    """

    tokens: np.ndarray
    document: np.ndarray
    unit: str


def supported_lengths(
    split: TokenizedDocuments, lengths: Sequence[int], packing: str
) -> tuple[tuple[int, ...], str | None]:
    """Leave out the lengths that the held-out documents are too short for.

    A length stays if two documents (or pieces of the stream) hold it, so that it has an interval;
    where even the first length has only one, one is enough.

    Args:
        split: Held-out documents.
        lengths: Tokens per window, shortest first.
        packing: "documents": a window lies inside one document; "stream": it may cross documents.

    Returns:
        The lengths that stay, and a line that says which do not and why (None if all stay).

    Raises:
        UserError: If not even the first length is possible.
    """
    units = [_num_units(split, length, packing) for length in lengths]
    longest = max(np.diff(_offsets(split, packing)), default=0)
    text = "the held-out text" if packing == "stream" else "the longest held-out document"
    if units[0] == 0:
        raise UserError(
            f"evaluation needs {lengths[0] + 1} tokens for one window of {lengths[0]}, but {text} "
            f"has {longest}; give longer held-out text or train at a shorter length"
        )
    needed = min(_MIN_UNITS, units[0])
    kept = tuple(length for length, count in zip(lengths, units, strict=True) if count >= needed)
    if len(kept) == len(lengths):
        return kept, None
    left_out = ", ".join(str(length) for length in lengths[len(kept) :])
    unit = _unit(packing) + ("s" if needed > 1 else "")
    return kept, (
        f"evaluation lengths left out: {left_out} (each needs {needed} held-out {unit} of more "
        f"than that many tokens; {text} has {longest})"
    )


def longest_windows(
    split: TokenizedDocuments, *, longest: int, num_windows: int, packing: str
) -> Windows:
    """Take windows of `longest` targets, spread evenly over the held-out text.

    With packing "documents" every document that is long enough gives one window before any gives
    a second, and the windows of a document are spread evenly over it (a single one comes from its
    middle: books begin with title pages). No two windows score the same token, and nothing is
    random.

    Args:
        split: Held-out documents.
        longest: Targets per window.
        num_windows: Windows wanted; fewer come back if the text holds no more.
        packing: "documents": a window lies inside one document; "stream": windows are pieces of
            the concatenated documents, and each counts as a unit of its own.

    Returns:
        The windows, in the order of the text.

    Raises:
        UserError: If the text does not hold a single window.
    """
    offsets = _offsets(split, packing)
    capacity = _capacity(offsets, longest)
    share = _shares(capacity, num_windows)
    if not share.any():
        raise UserError(
            f"no held-out {_unit(packing)} has the {longest + 1} tokens of an evaluation window of "
            f"{longest}; give longer held-out text or shorten config.evaluation.multiples"
        )
    document = np.repeat(np.arange(len(share)), share)
    starts = np.concatenate(
        [offsets[i] + longest * _spread(capacity[i], share[i]) for i in np.flatnonzero(share)]
    )
    tokens = np.stack([split.tokens[start : start + longest + 1] for start in starts])
    if packing == "stream":
        document = np.arange(len(starts))
    return Windows(tokens=tokens.astype(np.int32), document=document, unit=_unit(packing))


def bytes_per_token(windows: Windows, decode: Callable[[np.ndarray], str]) -> float:
    """Measure UTF-8 bytes per target of the windows, which turns nats per token into bits per byte.

    Args:
        windows: The windows that are scored.
        decode: Text of token ids [n].
    """
    targets = windows.tokens[:, 1:]
    return sum(len(decode(row).encode()) for row in targets) / targets.size


def evaluate(
    loss_fn: LossFn,
    windows: Windows,
    lengths: Sequence[int],
    *,
    tokens_per_batch: int,
    batch_multiple: int = 1,
) -> dict[int, np.ndarray]:
    """Score every token of the windows once at each length.

    Args:
        loss_fn: Nats per token f32[B, L] of int32[B, L+1]; called with one shape per length.
        windows: The tokens to score.
        lengths: Tokens per tile; each divides the windows' length.
        tokens_per_batch: Tokens scored at once.
        batch_multiple: Rows of a batch come in multiples of this: the devices that share them.

    Returns:
        For each length, float32 [N, longest]: nats of each token given its tile so far.
    """
    num_targets = windows.tokens[:, 1:].size
    with tqdm(
        total=len(lengths) * num_targets,
        desc="evaluate",
        unit="token",
        unit_scale=True,
        leave=False,
        disable=None if is_main() else True,  # None: no bar where the output is not a terminal
    ) as bar:
        return {
            length: token_losses(
                loss_fn,
                windows,
                length,
                tokens_per_batch=tokens_per_batch,
                batch_multiple=batch_multiple,
                progress=bar.update,
            )
            for length in lengths
        }


def token_losses(
    loss_fn: LossFn,
    windows: Windows,
    length: int,
    *,
    tokens_per_batch: int,
    batch_multiple: int,
    progress: Callable[[int], object],
) -> np.ndarray:
    """Score every token of the windows with only its own tile of `length` tokens as context.

    Args:
        loss_fn: Nats per token f32[B, length] of int32[B, length+1]; B is the same in every call.
        windows: The tokens to score.
        length: Tokens per tile; divides the windows' length.
        tokens_per_batch: Tokens scored at once.
        batch_multiple: B is a multiple of this, even if that takes more than `tokens_per_batch`.
        progress: Called with the number of tokens scored since the last call.

    Returns:
        float32 [N, longest].
    """
    # A tile's targets are its last `length` tokens; its first token is the one before them.
    tiles = np.lib.stride_tricks.sliding_window_view(windows.tokens, length + 1, axis=1)
    tiles = tiles[:, ::length].reshape(-1, length + 1)
    batch_size = min(tokens_per_batch // length, len(tiles))
    batch_size = max(1, -(-batch_size // batch_multiple)) * batch_multiple
    losses = []
    for start in range(0, len(tiles), batch_size):
        # The last batch is filled with repeats, for one shape and so one compilation per length.
        rows = np.arange(start, start + batch_size) % len(tiles)
        num_new = min(batch_size, len(tiles) - start)
        losses.append(np.asarray(loss_fn(tiles[rows]), np.float32)[:num_new])
        progress(num_new * length)
    return np.concatenate(losses).reshape(len(windows.tokens), -1)


def _unit(packing: str) -> str:
    return {"documents": "document", "stream": "piece"}[packing]


def _offsets(split: TokenizedDocuments, packing: str) -> np.ndarray:
    """Bounds that no window crosses; the stream is one long document."""
    return np.array([0, len(split.tokens)]) if packing == "stream" else split.offsets


def _capacity(offsets: np.ndarray, length: int) -> np.ndarray:
    """Windows of `length` targets that each document holds, int [num_documents]."""
    return np.maximum(np.diff(offsets) - 1, 0) // length


def _num_units(split: TokenizedDocuments, length: int, packing: str) -> int:
    """Units with a window of this length: documents, or pieces of the stream."""
    capacity = _capacity(_offsets(split, packing), length)
    return int(capacity.sum() if packing == "stream" else np.count_nonzero(capacity))


def _shares(capacity: np.ndarray, num_windows: int) -> np.ndarray:
    """Windows to take from each document: one from each, then a second from each, and so on."""
    share = np.zeros_like(capacity)
    while num_windows > 0 and (open_documents := np.flatnonzero(capacity > share)).size:
        count = min(num_windows, len(open_documents))
        share[open_documents[_spread(len(open_documents), count)]] += 1
        num_windows -= count
    return share


def _spread(total: int, count: int) -> np.ndarray:
    """`count` of the indices 0..total-1, evenly spaced and centred, int64 [count]."""
    return (2 * np.arange(count) + 1) * total // (2 * count)
