"""Byte tokens, packing, resumable order, bigrams."""

import itertools
import json

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dilax import data
from dilax.corpus import Document

DOCUMENTS = tuple(
    Document(f"{i}.txt", bytes((i * 7 + j) % 256 for j in range(5 + 9 * i))) for i in range(12)
)


@given(st.binary(max_size=300))
def test_decode_inverts_encode(text):
    tokens = data.encode(text)
    assert tokens.dtype == np.int32
    assert tokens[0] == data.BEGIN
    assert tokens[-1] == data.END
    assert data.decode(tokens) == text


@given(st.lists(st.binary(min_size=1, max_size=40), min_size=1, max_size=5), st.integers(1, 20))
def test_every_token_but_the_first_is_predicted_once(texts, length):
    documents = [Document(str(i), text) for i, text in enumerate(texts)]
    targets = [w[1:] for w in data.windows(documents, length)]
    assert all(1 <= len(t) <= length for t in targets)
    wanted = np.concatenate([data.encode(text)[1:] for text in texts])
    np.testing.assert_array_equal(np.concatenate(targets), wanted)


def _segments(batch):
    """The packed windows of a batch: (tokens, positions) of every segment."""
    for tokens, ids, positions in zip(*(batch[k] for k in batch), strict=True):
        for number in range(1, ids.max(initial=0) + 1):
            yield tokens[ids == number], positions[ids == number]


def test_packed_rows_hold_whole_windows_with_ids_and_positions():
    batches = data.validation_batches(DOCUMENTS, sequence_length=40, batch_size=3)
    found, several = [], False
    for batch in batches:
        several = several or bool((batch["segment_ids"] > 1).any())
        assert list(batch) == ["tokens", "segment_ids", "positions"]
        for x in batch.values():
            assert x.shape == (3, 41)
            assert x.dtype == np.int32
        assert (batch["tokens"][batch["segment_ids"] == 0] == 0).all()
        for ids in batch["segment_ids"]:  # contiguous from 1, padding at the end
            steps = np.diff(np.append(ids, 0))
            assert (steps[steps != 0][:-1] == 1).all()
        for tokens, positions in _segments(batch):
            np.testing.assert_array_equal(positions, np.arange(len(tokens)))
            found.append(tuple(tokens.tolist()))
    assert sorted(found) == sorted(tuple(w.tolist()) for w in data.windows(DOCUMENTS, 40))
    assert several


def test_the_first_validation_rows_are_those_of_all():
    def rows(max_rows):
        return data.validation_batches(
            DOCUMENTS, sequence_length=40, batch_size=1, max_rows=max_rows
        )

    for one, other in itertools.zip_longest(rows(3), itertools.islice(rows(None), 3)):
        np.testing.assert_array_equal(one["tokens"], other["tokens"])


def _batches(seed=0, documents=DOCUMENTS):
    return data.training_batches(documents, sequence_length=40, batch_size=2, seed=seed)


def _take(iterator, count):
    return [next(iterator)["tokens"] for _ in range(count)]


@pytest.mark.parametrize("done", [0, 1, 7, 40, 93])
def test_the_order_goes_on_exactly_where_it_was(done):
    """Over several epochs and several fillings of the packer, through JSON as in a checkpoint."""
    first = _batches()
    _take(first, done)
    state = json.loads(json.dumps(first.get_state()))
    second = _batches()
    second.set_state(state)
    for one, other in zip(_take(first, 20), _take(second, 20), strict=True):
        np.testing.assert_array_equal(one, other)


def test_seeds_and_epochs_shuffle():
    one, other = np.concatenate(_take(_batches(0), 30)), np.concatenate(_take(_batches(1), 30))
    assert not np.array_equal(one, other)
    epoch = len(data.windows(DOCUMENTS, 40))
    begins = [
        tuple(tokens[:6].tolist())
        for batch in itertools.islice(_batches(), 60)
        for tokens, _ in _segments(batch)
    ]
    assert len(set(begins)) <= epoch < len(begins)


def test_targets_across_documents_and_padding_are_not_predicted():
    ids = np.array([[1, 1, 2, 2, 3, 0, 0]])
    assert data.predicted({"segment_ids": ids}).tolist() == [
        [True, False, True, False, False, False]
    ]
    assert bool(
        jax.numpy.array_equal(
            data.predicted({"segment_ids": jax.numpy.asarray(ids)}),
            data.predicted({"segment_ids": ids}),
        )
    )


def test_bigrams_are_add_one_smoothed_and_counted_on_the_same_targets():
    train, held_out = [Document("a", b"abab")], [Document("b", b"aab")]
    batches = data.validation_batches(held_out, sequence_length=8, batch_size=2)
    V = data.VOCAB_SIZE
    wanted = [
        (1 + 1) / (1 + V),  # begin -> a
        (0 + 1) / (2 + V),  # a -> a
        (2 + 1) / (2 + V),  # a -> b
        (1 + 1) / (2 + V),  # b -> end
    ]
    bits = data.bigram_bits_per_byte(data.bigram_counts(train), batches)
    assert bits == pytest.approx(-np.mean(np.log2(wanted)), rel=1e-12)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: _batches(documents=()), "documents"),
        (lambda: _batches(documents=DOCUMENTS[:2]), "sequence_length.*within the"),
        (
            lambda: data.training_batches(DOCUMENTS, sequence_length=0, batch_size=1, seed=0),
            "sequence_length",
        ),
        (lambda: data.bigram_bits_per_byte(np.zeros((258, 258)), []), "batches"),
    ],
)
def test_wrong_arguments_are_refused_by_name(call, message):
    with pytest.raises(ValueError, match=message):
        call()
