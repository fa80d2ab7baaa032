"""Byte tokens, the split by file, packing, resumable order, bigrams."""

import itertools
import json

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dilax import data
from dilax.data import Corpus, Document

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


def test_the_default_text_is_the_standard_library_without_tests():
    names = [d.name for d in data.standard_library()]
    assert names == sorted(names)
    assert {"ast.py", "json/decoder.py"} <= set(names)
    parts = {part for name in names for part in name.split("/")[:-1]}
    assert not parts & {"site-packages", "dist-packages", "test", "tests", "idle_test"}


def test_the_split_is_by_file_and_depends_on_names_only(tmp_path):
    for i in range(20):
        (tmp_path / f"{i}.txt").write_bytes(b"x%d" % i)
    corpus = data.load_corpus([tmp_path], validation_fraction=0.25)
    names = [{d.name for d in part} for part in (corpus.train, corpus.validation)]
    assert not names[0] & names[1]
    assert [len(n) for n in names] == [15, 5]
    for i in range(20):
        (tmp_path / f"{i}.txt").write_bytes(b"something else")
    again = data.load_corpus([tmp_path], validation_fraction=0.25)
    assert {d.name for d in again.validation} == names[1]
    assert again.fingerprint != corpus.fingerprint
    assert again.fingerprint == data.load_corpus([tmp_path], validation_fraction=0.25).fingerprint


def test_directories_give_their_text_files_and_files_are_taken_as_they_are(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / ".git").mkdir()
    (tmp_path / "sub" / "a.txt").write_text("ä")
    (tmp_path / "b.bin").write_bytes(b"\xff\xfe")
    (tmp_path / "c.txt").write_bytes(b"")
    (tmp_path / ".git" / "config").write_text("hidden")
    found = data.read_documents([tmp_path, tmp_path / "sub" / "a.txt"])
    assert [d.text for d in found] == ["ä".encode()]
    assert data.read_documents([tmp_path / "b.bin"])[0].text == b"\xff\xfe"


def test_files_that_are_no_text_are_counted_and_an_inner_directory_left_out(tmp_path):
    runs = tmp_path / "runs"
    runs.mkdir()
    (tmp_path / "b.bin").write_bytes(b"\xff")
    with pytest.raises(ValueError, match=r"UTF-8 text if in a directory \(1 are not\)"):
        data.load_corpus([tmp_path])
    for path in (tmp_path / "a.txt", tmp_path / "b.txt", runs / "c.txt"):
        path.write_text("text")
    corpus = data.load_corpus([tmp_path], exclude=runs)
    assert corpus.skipped == 1
    names = {d.name for d in corpus.train + corpus.validation}
    assert names == {(tmp_path / n).as_posix() for n in ("a.txt", "b.txt")}
    assert len(data.read_documents([runs], exclude=runs)) == 1
    assert len(data.read_documents([tmp_path])) == 3


def test_of_a_single_file_the_end_is_held_out(tmp_path):
    (tmp_path / "a.txt").write_bytes(bytes(range(100)))
    corpus = data.load_corpus([tmp_path / "a.txt"])
    assert corpus.train[0].text + corpus.validation[0].text == bytes(range(100))
    assert corpus.num_bytes == (90, 10)


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
        (lambda: data.load_corpus(["no such file"]), "text.*exist"),
        (lambda: data.load_corpus("a.txt"), "text.*sequence of paths"),
        (lambda: data.load_corpus([]), "text"),
        (lambda: data.load_corpus(validation_fraction=1.0), "validation_fraction"),
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


def test_an_empty_file_is_refused(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"")
    with pytest.raises(ValueError, match="not empty"):
        data.load_corpus([tmp_path / "a.txt"])
    (tmp_path / "a.txt").write_bytes(b"x")
    with pytest.raises(ValueError, match="two bytes"):
        data.load_corpus([tmp_path / "a.txt"])


def test_corpus_fingerprint_separates_the_two_parts():
    a, b = DOCUMENTS[:2]
    assert Corpus((a, b), ()).fingerprint != Corpus((a,), (b,)).fingerprint
