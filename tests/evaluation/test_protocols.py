"""Which tokens are scored, with which context, and how often."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alibi_jax.errors import UserError
from alibi_jax.evaluation import (
    Windows,
    evaluate,
    longest_windows,
    supported_lengths,
    token_losses,
)
from alibi_jax.evaluation.bootstrap import document_sums, interval, resamples
from alibi_jax.evaluation.protocols import input_strides, sliding_losses


@dataclasses.dataclass
class Split:
    """Documents whose token is its own index in the stream, so that a window tells its place."""

    tokens: np.ndarray
    offsets: np.ndarray

    @property
    def token_bytes(self):
        """As many bytes as a token's own number, to tell them apart."""
        return self.tokens


def split_of(*lengths):
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    return Split(np.arange(offsets[-1], dtype=np.uint16), offsets)


def starts(windows):
    return windows.tokens[:, 0].tolist()


def test_windows_are_runs_of_tokens_inside_one_document():
    split = split_of(7, 100, 3, 55, 21, 0, 20)
    windows = longest_windows(split, longest=20, num_windows=100, packing="documents")
    assert windows.tokens.dtype == np.int32
    np.testing.assert_array_equal(np.diff(windows.tokens, axis=1), 1)
    np.testing.assert_array_equal(windows.token_bytes, windows.tokens)
    for row, document in zip(windows.tokens, windows.document, strict=True):
        assert split.offsets[document] <= row[0]
        assert row[-1] < split.offsets[document + 1]
    # 99 // 20, 54 // 20 and 20 // 20 windows; 20 tokens hold no window of 20 targets.
    assert np.unique(windows.document, return_counts=True)[1].tolist() == [4, 2, 1]
    assert windows.unit == "document"


def test_no_target_is_in_two_windows():
    for packing in ("documents", "stream"):
        split = split_of(61, 100, 83)
        windows = longest_windows(split, longest=20, num_windows=100, packing=packing)
        assert np.unique(windows.tokens[:, 1:]).size == windows.tokens[:, 1:].size


@pytest.mark.parametrize("num_windows", [1, 3, 5, 6, 9, 40])
def test_every_long_document_gives_one_window_before_any_gives_two(num_windows):
    split = split_of(201, 11, 101, 5, 401, 21)
    windows = longest_windows(split, longest=10, num_windows=num_windows, packing="documents")
    assert len(windows.tokens) == num_windows
    share = np.bincount(windows.document, minlength=6)
    capacity = np.array([20, 1, 10, 0, 40, 2])
    assert (share <= capacity).all()
    # A document below its capacity may be at most one window behind any other.
    assert (share[share < capacity] >= share.max() - 1)[capacity[share < capacity] > 0].all()


def test_windows_are_spread_evenly_over_documents_and_within_one():
    ten = split_of(*[11] * 10)
    windows = longest_windows(ten, longest=10, num_windows=5, packing="documents")
    assert windows.document.tolist() == [1, 3, 5, 7, 9]
    one = split_of(101)
    assert starts(longest_windows(one, longest=10, num_windows=1, packing="documents")) == [50]
    assert starts(longest_windows(one, longest=10, num_windows=2, packing="documents")) == [20, 70]


def test_stream_windows_cross_documents():
    windows = longest_windows(split_of(*[7] * 10), longest=20, num_windows=9, packing="stream")
    assert starts(windows) == [0, 20, 40]  # 70 tokens hold 3 windows of 20 targets
    assert windows.document.tolist() == [0, 1, 2]
    assert windows.unit == "block"


@pytest.mark.parametrize(
    ("num_windows", "sizes"),
    [(1, [1]), (2, [1, 1]), (7, 7 * [1]), (8, 4 * [2]), (26, 13 * [2]), (64, 16 * [4])],
)
def test_blocks_of_a_stream_hold_the_cube_root_of_all_its_windows(num_windows, sizes):
    split = split_of(64 * 20 + 1)
    windows = longest_windows(split, longest=20, num_windows=num_windows, packing="stream")
    assert np.bincount(windows.document).tolist() == sizes
    assert (np.diff(windows.document) >= 0).all()  # consecutive


def test_blocks_cover_the_mean_of_a_stream_better_than_single_pieces():
    """Losses of neighbours correlate by a half: an article often ends in the piece after."""
    rng, pieces = np.random.default_rng(0), 27
    blocks = longest_windows(
        split_of(pieces * 20 + 1), longest=20, num_windows=pieces, packing="stream"
    ).document
    covered = {"blocks": 0, "pieces": 0}
    counts = {n: resamples(n, 400) for n in (9, pieces)}
    for _ in range(500):
        noise = rng.normal(size=pieces + 1)
        losses = (2 + noise[1:] + noise[:-1])[:, None]
        for name, document in (("blocks", blocks), ("pieces", np.arange(pieces))):
            nats = document_sums(losses, document)
            tokens = document_sums(np.ones_like(losses), document)
            low, high = interval(nats, tokens, counts[len(nats)])
            covered[name] += low <= 2 <= high
    assert covered["blocks"] >= 0.9 * 500
    assert covered["pieces"] <= 0.87 * 500


def copied(times, *lengths):
    """Documents that differ, and then the first of them as often again."""
    split = split_of(*lengths)
    first = split.tokens[: lengths[0]]
    tokens = np.concatenate([split.tokens, *[first] * times])
    return Split(tokens, np.concatenate([[0], np.cumsum([*lengths, *[lengths[0]] * times])]))


@pytest.mark.parametrize("packing", ["documents", "stream"])
def test_a_text_that_is_there_twenty_times_counts_once(packing):
    """Both give the windows of the text without its copies."""
    lengths = (50, 3, 70, 3)
    split = copied(19, *lengths)
    windows = longest_windows(split, longest=20, num_windows=100, packing=packing)
    once = longest_windows(split_of(*lengths), longest=20, num_windows=100, packing=packing)
    np.testing.assert_array_equal(windows.tokens, once.tokens)
    np.testing.assert_array_equal(windows.document, once.document)
    assert windows.copies == 19 and once.copies == 0
    short = longest_windows(split, longest=60, num_windows=100, packing=packing)
    assert short.copies == (0 if packing == "documents" else 19)


def test_copies_of_one_text_are_one_document():
    split = copied(19, 50)
    windows = longest_windows(split, longest=20, num_windows=100, packing="documents")
    assert len(windows.tokens) == 2 and len(set(windows.document.tolist())) == 1
    lengths, _ = supported_lengths(split, (10, 20), "documents")
    assert lengths == (10, 20)  # with one document one is enough
    nats = document_sums(np.ones((2, 20)), windows.document)
    assert interval(nats, nats, resamples(1, 100)) is None  # and not of width 0


def test_no_window_of_a_stream_crosses_a_copy_that_is_left_out():
    split = copied(1, 30, 25)
    tokens = np.concatenate([split.tokens, np.arange(1000, 1045)])
    split = Split(tokens, np.append(split.offsets, len(tokens)))
    windows = longest_windows(split, longest=20, num_windows=100, packing="stream")
    # 55 tokens before the copy hold two windows of 20 targets, 45 after it two.
    assert starts(windows) == [0, 20, 1000, 1020]


def test_text_without_a_single_window_is_refused():
    with pytest.raises(UserError, match="has the 21 tokens"):
        longest_windows(split_of(20, 19), longest=20, num_windows=4, packing="documents")


def test_lengths_need_two_documents():
    split = split_of(300, 130, 65)
    lengths, note = supported_lengths(split, (64, 128, 256), "documents")
    assert lengths == (64, 128)
    assert note is not None
    assert "left out: 256 (each needs 2 held-out documents" in note
    assert supported_lengths(split, (64, 128), "documents") == ((64, 128), None)


def test_lengths_in_a_stream_need_two_pieces():
    lengths, note = supported_lengths(split_of(*[50] * 10), (64, 128, 256), "stream")
    assert lengths == (64, 128)
    assert note is not None
    assert "pieces" in note


def test_one_document_alone_is_enough():
    lengths, note = supported_lengths(split_of(300), (64, 256, 512), "documents")
    assert lengths == (64, 256)
    assert note is not None
    assert "1 held-out document of" in note


@pytest.mark.parametrize("packing", ["documents", "stream"])
def test_text_too_short_for_the_training_length_is_refused(packing):
    with pytest.raises(UserError, match="needs 65 tokens"):
        supported_lengths(split_of(64), (64, 128), packing)


@pytest.mark.parametrize("length", [4, 8, 24])
@pytest.mark.parametrize("tokens_per_batch", [24, 50, 1000])
def test_every_token_is_scored_once_with_its_own_tile_as_context(length, tokens_per_batch):
    windows = longest_windows(split_of(25, 97, 60), longest=24, num_windows=7, packing="documents")
    contexts = {}

    def loss_fn(tokens):
        # The target itself is the loss; the first token that it may see is noted.
        for row in tokens:
            contexts.update(dict.fromkeys(row[1:].tolist(), int(row[0])))
        return tokens[:, 1:].astype(np.float32)

    counts = []
    losses = token_losses(
        loss_fn,
        windows,
        length,
        tokens_per_batch=tokens_per_batch,
        batch_multiple=1,
        progress=counts.append,
    )
    assert losses.dtype == np.float32
    np.testing.assert_array_equal(losses, windows.tokens[:, 1:])
    assert sum(counts) == windows.tokens[:, 1:].size
    for row in windows.tokens:
        for position, target in enumerate(row[1:].tolist()):
            assert contexts[target] == row[position - position % length]


@pytest.mark.parametrize(("longest", "num_targets"), [(1024, 64), (96, 48), (128, 5), (512, 200)])
def test_truncated_inputs_score_the_same_targets_with_nearly_all_of_their_context(
    longest, num_targets
):
    split = split_of(longest + 1, 3 * longest)
    windows = longest_windows(split, longest=longest, num_windows=3, packing="documents")
    strides = input_strides(longest, num_targets)
    lengths = list(strides)
    assert lengths[:-1] == [32 << i for i in range(9) if 32 << i <= longest - num_targets]
    assert lengths[-1] == longest
    for length, stride in strides.items():
        contexts, computed = {}, []

        def loss_fn(tokens, contexts=contexts, stride=stride):
            for row in tokens:
                contexts.update((target, target - row[0]) for target in row[-stride:].tolist())
            return tokens[:, 1:].astype(np.float32)

        losses = sliding_losses(
            loss_fn,
            windows,
            length,
            stride=stride,
            num_targets=num_targets,
            tokens_per_batch=500,
            progress=computed.append,
        )
        # A token is its own place.
        np.testing.assert_array_equal(losses, windows.tokens[:, -num_targets:])
        seen = [contexts[target] for target in losses.ravel()]
        assert max(seen) == length and min(seen) >= length - stride + 1
        if length < longest:
            assert min(seen) > length * 15 / 16
            assert sum(computed) <= len(windows.tokens) * (16 * num_targets + length)


@pytest.mark.parametrize("batch_multiple", [1, 8])
def test_each_length_compiles_once_and_bounds_the_batch(batch_multiple):
    windows = longest_windows(split_of(1000, 900), longest=64, num_windows=5, packing="documents")
    shapes = []

    @jax.jit
    def loss_fn(tokens):
        shapes.append(tokens.shape)  # runs when tracing, once for each compilation
        return tokens[:, 1:].astype(jnp.float32)

    losses = evaluate(
        loss_fn, windows, (16, 32, 64), tokens_per_batch=128, batch_multiple=batch_multiple
    )
    assert list(losses) == [16, 32, 64]
    for values in losses.values():
        np.testing.assert_array_equal(values, windows.tokens[:, 1:])
    expected = {1: [8, 4, 2], 8: [8, 8, 8]}[batch_multiple]
    assert shapes == [(rows, n + 1) for rows, n in zip(expected, (16, 32, 64), strict=True)]


def test_few_tiles_do_not_make_a_large_batch():
    tokens = np.zeros((1, 9), np.int32)
    windows = Windows(tokens, np.zeros(1, np.int64), "document", tokens)
    shapes = []

    def loss_fn(tokens):
        shapes.append(tokens.shape)
        return np.zeros((len(tokens), 4), np.float32)

    evaluate(loss_fn, windows, (4,), tokens_per_batch=10**6)
    assert shapes == [(2, 5)]
