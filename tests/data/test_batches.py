"""Every window once an epoch, a batch from its step alone, no target across documents."""

import dataclasses

import grain
import numpy as np
import pytest

from alibi_jax.data import TokenizedSplit, batches, stream_identity, training_iterator
from alibi_jax.errors import UserError

L, B = 7, 4


def numbered(lengths):
    """Documents whose tokens are all different: 0, 1, 2, ..."""
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    tokens = np.arange(offsets[-1], dtype=np.uint16)
    return TokenizedSplit(tokens, tokens % 7, offsets, int((tokens % 7).sum()))


SPLIT = numbered([3, 14, 5, 40, 3, 3, 3, 30, 21])
NUM_WINDOWS = (122 - 1) // L


def stream(split=SPLIT, **changes):
    options = {"sequence_length": L, "batch_size": B, "seed": 3, "packing": "documents"}
    return batches(split, **{**options, **changes})


def first_tokens(dataset, num_batches):
    return np.concatenate([dataset[i]["tokens"][:, 0] for i in range(num_batches)])


def test_windows_are_consecutive_and_share_one_token():
    batch = stream()[0]
    assert batch["tokens"].shape == batch["segment_ids"].shape == (B, L + 1)
    assert batch["tokens"].dtype == batch["segment_ids"].dtype == np.int32
    np.testing.assert_array_equal(batch["token_bytes"], batch["tokens"] % 7)
    starts = batch["tokens"][:, :1]
    np.testing.assert_array_equal(batch["tokens"], starts + np.arange(L + 1))
    assert not (starts % L).any()


def test_an_epoch_has_every_window_once():
    starts = first_tokens(stream(), 3 * NUM_WINDOWS)[: 10 * NUM_WINDOWS].reshape(10, -1)
    for epoch in starts:
        np.testing.assert_array_equal(np.sort(epoch), L * np.arange(NUM_WINDOWS))
    assert len({tuple(epoch) for epoch in starts}) == 10


def test_the_last_window_is_not_lost():
    """L + 1 tokens are one window, 2 L + 1 are two, one token less is one."""
    for num_tokens, expected in ((L + 1, 1), (2 * L, 1), (2 * L + 1, 2)):
        starts = first_tokens(stream(numbered([num_tokens]), batch_size=1), 2 * expected)
        assert sorted(set(starts)) == [L * i for i in range(expected)]


def test_segments_are_documents():
    seen = set()
    document_of = np.repeat(np.arange(SPLIT.num_documents), np.diff(SPLIT.offsets))
    for i in range(NUM_WINDOWS):
        batch = stream()[i]
        for tokens, segment_ids in zip(batch["tokens"], batch["segment_ids"], strict=True):
            documents = document_of[tokens]  # here a token is its own position
            np.testing.assert_array_equal(segment_ids, documents - documents[0] + 1)
            same = segment_ids[1:] == segment_ids[:-1]
            seen.update(tokens[1:][same].tolist())
    # Exactly the targets that exist: all but the first token of each document, and the dropped end.
    last = NUM_WINDOWS * L
    assert seen == set(range(last + 1)) - set(SPLIT.offsets.tolist())


def test_stream_packing_is_one_segment():
    documents, plain = stream()[5], stream(packing="stream")[5]
    assert (plain["segment_ids"] == 1).all()
    np.testing.assert_array_equal(documents["tokens"], plain["tokens"])


def test_a_step_is_the_batch_of_the_iterator():
    iterator = training_iterator(stream())
    for step in range(12):
        np.testing.assert_equal(next(iterator), stream()[step])
    iterator.close()


@pytest.mark.parametrize("rows", [[0], [1, 2], [0, 3], [0, 1, 2, 3]])
def test_a_process_reads_rows_of_the_same_batches(rows):
    part = stream(rows=np.array(rows))
    for step in (0, 5, NUM_WINDOWS):
        np.testing.assert_equal(part[step], {k: v[rows] for k, v in stream()[step].items()})
    iterators = [training_iterator(dataset) for dataset in (stream(), part)]
    for iterator in iterators:
        next(iterator), next(iterator)
    assert iterators[0].get_state() == iterators[1].get_state()  # one position for all processes
    for iterator in iterators:
        iterator.close()


def test_other_rows_are_not_read():
    class Counted:
        def __init__(self):
            self.reads = 0

        def __len__(self):
            return len(SPLIT.tokens)

        def __getitem__(self, index):
            self.reads += 1
            return SPLIT.tokens[index]

    tokens = Counted()
    split = dataclasses.replace(SPLIT, tokens=tokens, token_bytes=tokens)
    stream(split, rows=np.array([1, 2]))[3]
    assert tokens.reads == 2 * 2  # two rows of each


def test_the_seed_decides_the_order():
    one, two = (first_tokens(stream(seed=seed), 8) for seed in (1, 2))
    assert (one != two).any()
    np.testing.assert_array_equal(one, first_tokens(stream(seed=1), 8))
    # Grain seeds epoch e with seed + e: without mixing, seed 2 would be seed 1 one epoch later.
    later = first_tokens(stream(seed=1), 2 * NUM_WINDOWS)[NUM_WINDOWS:]
    assert (later[:NUM_WINDOWS] != first_tokens(stream(seed=2), NUM_WINDOWS)[:NUM_WINDOWS]).any()


def test_restoring_the_iterator_is_exact():
    limited = grain.experimental.LimitIterDataset(
        stream().to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=8)), 10
    )
    grain.experimental.assert_equal_output_after_checkpoint(limited)


def test_restoring_far_into_the_stream():
    iterator = training_iterator(stream())
    for _ in range(3):
        next(iterator)
    state = iterator.get_state()
    expected = [next(iterator) for _ in range(20)]
    iterator.close()
    restored = training_iterator(stream())
    restored.set_state(state)
    np.testing.assert_equal([next(restored) for _ in range(20)], expected)
    restored.close()


def test_fewer_windows_than_a_batch_repeat():
    tokens = stream(numbered([2 * L + 1]), batch_size=6)[0]["tokens"]
    assert sorted(tokens[:, 0].tolist()) == [0, 0, 0, L, L, L]


def test_a_split_shorter_than_a_window():
    with pytest.raises(UserError, match=r"needs 8 tokens and the split has 7; .* at most 6"):
        stream(numbered([7]))


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_seed_out_of_range(seed):
    with pytest.raises(UserError, match="seed must be from 0 to 4294967295"):
        stream(seed=seed)


def test_identity_tells_streams_apart():
    options = {
        "fingerprint": "f",
        "sequence_length": L,
        "batch_size": B,
        "seed": 0,
        "packing": "stream",
    }
    changes = {
        "fingerprint": "g",
        "sequence_length": 9,
        "batch_size": 9,
        "seed": 9,
        "packing": "documents",
    }
    for name, value in changes.items():
        assert stream_identity(**options) != stream_identity(**{**options, name: value})


def test_stdlib_batches(stdlib_corpus):
    batch = batches(
        stdlib_corpus.train, sequence_length=512, batch_size=8, seed=0, packing="documents"
    )[1000]
    assert batch["tokens"].max() <= 256 and batch["tokens"].min() >= 0
    assert (np.diff(batch["segment_ids"], axis=1) >= 0).all()
