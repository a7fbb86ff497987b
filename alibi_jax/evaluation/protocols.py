"""Score the same held-out tokens with windows of several lengths.

Take N "longest windows" of `max(lengths)` targets each from held-out text. At each length L, tile
every one of them by windows of L tokens and score every token with only its own tile as context:
`losses[L]` is [N, longest] nats per token, and every length scores the very same tokens. Two
protocols of the literature are two means of this one array:

- nonoverlapping (Press et al., ICLR 2022, Tables 2-5, https://arxiv.org/abs/2108.12409): the mean
  over all positions. A longer window has a smaller share of tokens near its start, which have
  little context, so this falls with length even if the model sees no further than before
  (Press et al., App. B, the "early token curse").
- fixed targets (Kazemnejad et al., 2023, App. F, https://arxiv.org/abs/2305.19466; FIRE,
  https://arxiv.org/abs/2310.04418; DAPE, https://arxiv.org/abs/2405.14722): the mean over the last
  `num_targets` positions. Those tokens end a tile at every length, so only the amount of context
  before them differs and lengths are compared in pairs.

By position is a third: means over ranges of positions within a tile, each at the shortest L that
holds the range, where most tiles have it.

Three more protocols score with other contexts:

- sliding window (Press et al., App. B): windows that overlap, each of which scores its last
  `stride` tokens, so that every target has at least L - stride tokens of context.
- truncated input (Khandelwal et al., ACL 2018, https://arxiv.org/abs/1805.04623): the fixed targets
  of the longest length, each with no more than the C tokens before it as input. Where the loss
  stops falling with C, longer inputs stop helping.
- truncation: the same targets with all the input, while in every layer a query sees only the keys
  at a distance below W. Layers pass on what they saw, so N of them reach N (W - 1) tokens back.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from tqdm import tqdm

from alibi_jax.distributed import is_main
from alibi_jax.evaluation.windows import Windows

# Nats per token, f32[B, L], of the last L tokens of each row of int32[B, L+1]; compiled by the
# caller. Any array that NumPy can read may come back.
LossFn = Callable[[np.ndarray], Any]
# The same, where attention sees only keys at a distance below the window; None: all keys.
WindowedLossFn = Callable[[np.ndarray, int | None], Any]

SHORTEST_WINDOW = 32  # of a truncation, in tokens
_INPUT_OVERLAP = 16  # truncated inputs move by a 16th of themselves: all targets have 15/16 of them


def evaluate(
    loss_fn: LossFn,
    windows: Windows,
    lengths: Sequence[int],
    *,
    tokens_per_batch: int,
    batch_multiple: int = 1,
) -> dict[int, np.ndarray]:
    """Score every token of the windows once at each length, with a progress bar.

    Args:
        loss_fn: Nats per token f32[B, L] of int32[B, L+1]; called with one shape per length.
        windows: The tokens to score.
        lengths: Tokens per tile; each divides the windows' length.
        tokens_per_batch: Tokens scored at once.
        batch_multiple: Rows of a batch come in multiples of this: the devices that share them.

    Returns:
        For each length, float32 [N, longest]: nats of each token given its tile so far.
    """
    with progress_bar(len(lengths) * windows.num_targets) as bar:
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


def progress_bar(num_tokens: int) -> tqdm:
    """Make a bar that counts tokens; there is none where the output is not a terminal."""
    return tqdm(
        total=num_tokens,
        desc="evaluate",
        unit="token",
        unit_scale=True,
        leave=False,
        disable=None if is_main() else True,  # None: where the output is not a terminal
    )


def token_losses(
    loss_fn: LossFn,
    windows: Windows,
    length: int,
    *,
    tokens_per_batch: int,
    batch_multiple: int = 1,
    progress: Callable[[int], object],
) -> np.ndarray:
    """Score every token of the windows with only its own tile of `length` tokens as context.

    Args:
        loss_fn: Nats per token f32[B, length] of int32[B, length+1]; B is the same in every call.
        windows: The tokens to score.
        length: Tokens per tile; divides the windows' length.
        tokens_per_batch: Tokens scored at once.
        batch_multiple: B is a multiple of this, even if that takes more than `tokens_per_batch`.
        progress: Called with the number of tokens computed since the last call.

    Returns:
        float32 [N, longest].
    """
    # A tile's targets are its last `length` tokens; its first token is the one before them.
    tiles = np.lib.stride_tricks.sliding_window_view(windows.tokens, length + 1, axis=1)
    tiles = tiles[:, ::length].reshape(-1, length + 1)
    losses = in_batches(
        loss_fn,
        tiles,
        tokens_per_batch=tokens_per_batch,
        batch_multiple=batch_multiple,
        progress=progress,
    )
    return losses.reshape(len(windows.tokens), -1)


def sliding_lengths(lengths: Sequence[int]) -> tuple[int, ...]:
    """Return the lengths that a sliding window can have: at most half the longest window.

    Its targets are the second half of the longest windows, the same at every length.
    """
    return tuple(length for length in lengths if 2 * length <= lengths[-1])


def sliding_losses(
    loss_fn: LossFn,
    windows: Windows,
    length: int,
    *,
    stride: int,
    num_targets: int,
    tokens_per_batch: int,
    progress: Callable[[int], object],
) -> np.ndarray:
    """Score the last tokens of the windows with length - stride + 1 to length tokens of input each.

    It computes length / stride tokens for each that it scores.

    Args:
        loss_fn: Nats per token f32[B, length] of int32[B, length+1].
        windows: The tokens to score.
        length: Tokens of a sliding window: at most longest - num_targets, or longest.
        stride: Tokens from one sliding window to the next; each scores its last `stride`.
        num_targets: Tokens at the end of each window that are scored.
        tokens_per_batch: Tokens computed at once.
        progress: Called with the number of tokens computed since the last call.

    Returns:
        float32 [N, num_targets].
    """
    longest = windows.tokens.shape[1] - 1
    ends = sliding_ends(longest, stride, num_targets)
    rows = np.stack([windows.tokens[:, end - length : end + 1] for end in ends], axis=1)
    losses = in_batches(
        lambda tokens: np.asarray(loss_fn(tokens))[:, -stride:],
        rows.reshape(-1, length + 1),
        tokens_per_batch=tokens_per_batch,
        progress=progress,
    )
    return losses.reshape(len(windows.tokens), -1)[:, -num_targets:]


def sliding_ends(longest: int, stride: int, num_targets: int) -> np.ndarray:
    """Ends of the sliding windows whose last `stride` tokens cover the targets, ascending."""
    return longest - stride * np.arange(-(-num_targets // stride))[::-1]


def input_strides(longest: int, num_targets: int) -> dict[int, int]:
    """Strides of the truncated inputs of 32, 64, ... tokens and, last, of the whole one.

    An input of C tokens scores its last `stride` targets, which have C - stride + 1 to C tokens as
    context: one each would cost C tokens a target, and a 16th of C costs about 16. A longer C than
    the tokens before the first target is left out, for there it would not be cut for all of them.
    """
    lengths = _doublings(longest - num_targets + 1)
    strides = {length: min(length // _INPUT_OVERLAP, num_targets) for length in lengths}
    return strides | {longest: num_targets}


def truncation_windows(longest: int) -> tuple[int | None, ...]:
    """Windows of the truncation: 32, 64, ... below `longest`, and last None, which cuts nothing."""
    return (*_doublings(longest), None)


def _doublings(end: int) -> list[int]:
    """SHORTEST_WINDOW, twice that, and so on, below `end`."""
    count = max(0, math.ceil(math.log2(end / SHORTEST_WINDOW)))
    return [SHORTEST_WINDOW << i for i in range(count)]


def truncated_losses(
    loss_fn: WindowedLossFn,
    windows: Windows,
    window: int | None,
    *,
    num_targets: int,
    tokens_per_batch: int,
    progress: Callable[[int], object],
) -> np.ndarray:
    """Score the last tokens of the windows where attention reaches only so far.

    Args:
        loss_fn: Nats per token f32[B, longest] of int32[B, longest+1] and the window.
        windows: The tokens to score.
        window: In every layer a query sees only keys at a distance below this; None: all.
        num_targets: Tokens at the end of each window that are scored.
        tokens_per_batch: Tokens computed at once.
        progress: Called with the number of tokens computed since the last call.

    Returns:
        float32 [N, num_targets].
    """
    return in_batches(
        lambda tokens: np.asarray(loss_fn(tokens, window))[:, -num_targets:],
        windows.tokens,
        tokens_per_batch=tokens_per_batch,
        progress=progress,
    )


def position_starts(longest: int, train_length: int) -> tuple[int, ...]:
    """Starts of ranges of positions: 0, then two an octave, among them the training length."""
    halves = np.arange(
        math.ceil(-2 * math.log2(train_length)), math.ceil(2 * math.log2(longest / train_length))
    )
    starts = np.unique(np.round(train_length * 2.0 ** (halves / 2)).astype(int))
    return (0, *(int(start) for start in starts if 0 < start < longest))


def in_batches(
    function: Callable[[np.ndarray], Any],
    rows: np.ndarray,
    *,
    tokens_per_batch: int,
    batch_multiple: int = 1,
    progress: Callable[[int], object],
) -> np.ndarray:
    """Call a function on rows of tokens, a batch at a time.

    Args:
        function: From int32[B, L+1] to an array [B, ...]; B is the same in every call.
        rows: int32 [N, L+1].
        tokens_per_batch: B * L is at most this, if that leaves a row.
        batch_multiple: B is a multiple of this, even if that takes more tokens.
        progress: Called with L times the number of rows that were new.

    Returns:
        float32 [N, ...].
    """
    length = rows.shape[1] - 1
    batch_size = min(tokens_per_batch // length, len(rows))
    batch_size = max(1, -(-batch_size // batch_multiple)) * batch_multiple
    results = []
    for start in range(0, len(rows), batch_size):
        # The last batch is filled with repeats, for one shape and so one compilation per length.
        index = np.arange(start, start + batch_size) % len(rows)
        num_new = min(batch_size, len(rows) - start)
        results.append(np.asarray(function(rows[index]), np.float32)[:num_new])
        progress(num_new * length)
    return np.concatenate(results)
