"""Batches of text for language models: byte tokens, packing by grain, byte bigrams.

Tokens are bytes, 0 to 255, and two marks: 256 begins a document, 257 ends it. A packed row has
segment ids from 1 (grain's convention; 0 is padding, whose tokens are 0) and positions that start
again with every document.
"""

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import grain
import numpy as np
from grain.experimental import FirstFitPackIterDataset

from dilax._types import refuse
from dilax.corpus import Document

BEGIN = 256
END = 257
VOCAB_SIZE = 258

_PACKED_AT_ONCE = 32  # rows that first-fit packing fills side by side

Batch = dict[str, np.ndarray]  # tokens, segment_ids, positions: int32 [B, length + 1]


def encode(text: bytes) -> np.ndarray:
    """The tokens of one document, with its two marks: int32 [len(text) + 2].

    Example:
        >>> encode(b"hi").tolist()
        [256, 104, 105, 257]
    """
    return np.concatenate([[BEGIN], np.frombuffer(text, np.uint8), [END]]).astype(np.int32)


def decode(tokens: Any) -> bytes:
    """The bytes among tokens; marks are dropped.

    Example:
        >>> decode(encode(b"hi"))
        b'hi'
    """
    return bytes(int(t) for t in np.asarray(tokens).reshape(-1) if t < BEGIN)


def windows(documents: Sequence[Document], length: int) -> list[np.ndarray]:
    """Documents cut into windows of at most length + 1 tokens, each one token into the next.

    Every token but the first of a document is predicted in exactly one window.

    Example:
        >>> [w.tolist() for w in windows([Document("a", b"abc")], 3)]
        [[256, 97, 98, 99], [99, 257]]
    """
    cut = []
    for document in documents:
        tokens = encode(document.text)
        cut += [tokens[i : i + length + 1] for i in range(0, len(tokens) - 1, length)]
    return cut


def _packed(dataset: Any, length: int, seed: int, shuffle: bool) -> Any:
    """Rows of length + 1 tokens from windows, by grain's first-fit packing."""
    rows = FirstFitPackIterDataset(
        dataset.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)),
        length_struct={"tokens": length + 1},
        num_packing_bins=_PACKED_AT_ONCE,
        seed=seed,
        shuffle_bins=shuffle,
    )
    return rows.map(
        lambda row: {
            "tokens": row["tokens"],
            "segment_ids": row["tokens_segment_ids"],
            "positions": row["tokens_positions"],
        }
    )


def training_batches(
    documents: Sequence[Document], *, sequence_length: int, batch_size: int, seed: int
) -> Any:
    """An endless iterator of packed, shuffled batches, a new order every epoch.

    It is a grain iterator: `get_state()` is a JSON-able dict, and `set_state` on a new iterator
    over the same documents continues exactly there.

    Args:
        documents: to train on.
        sequence_length: T; rows have T + 1 tokens, the inputs and, one later, the targets.
        batch_size: B.
        seed: of the order.

    Raises:
        ValueError: there are no documents, or fewer than B * T tokens in them.

    Example:
        >>> batches = training_batches(
        ...     [Document("a", b"text " * 9)], sequence_length=16, batch_size=2, seed=0)
        >>> next(batches)["tokens"].shape
        (2, 17)
    """
    cut = _checked_windows(documents, sequence_length, batch_size)
    source = grain.MapDataset.source([{"tokens": w} for w in cut]).seed(seed).shuffle()
    packed = _packed(source.repeat(None), sequence_length, seed, shuffle=True)
    return iter(packed.batch(batch_size, drop_remainder=True))


def _checked_windows(documents, sequence_length: int, batch_size: int) -> list[np.ndarray]:
    for name, x in (("sequence_length", sequence_length), ("batch_size", batch_size)):
        if not isinstance(x, int) or isinstance(x, bool) or x < 1:
            raise refuse(name, "a positive int", x)
    if not documents:
        raise refuse("documents", "at least one document", documents)
    cut = windows(documents, sequence_length)
    total = sum(len(w) - 1 for w in cut)
    if total < sequence_length * batch_size:
        raise refuse(
            "sequence_length",
            f"a batch (batch_size {batch_size} times sequence_length) within the {total} tokens "
            "of the text",
            sequence_length,
        )
    return cut


def validation_batches(
    documents: Sequence[Document],
    *,
    sequence_length: int,
    batch_size: int,
    max_rows: int | None = None,
) -> Iterator[Batch]:
    """Packed batches of the held-out documents, always the same; the last is filled with padding.

    Windows are taken in a fixed shuffled order, so that the first rows sample every document.

    Args:
        documents: held out.
        sequence_length, batch_size: as for `training_batches`.
        max_rows: only this many rows, None for all.

    Example:
        >>> batches = validation_batches(
        ...     [Document("a", b"text " * 9)], sequence_length=16, batch_size=2)
        >>> [int((batch["segment_ids"] > 0).sum()) for batch in batches]
        [32, 17]
    """
    cut = [{"tokens": w} for w in windows(documents, sequence_length)]
    source = grain.MapDataset.source(cut).seed(0).shuffle()
    rows = list(itertools.islice(_packed(source, sequence_length, 0, shuffle=False), max_rows))
    for i in range(0, len(rows), batch_size):
        some = rows[i : i + batch_size]
        empty = {k: np.zeros_like(v) for k, v in some[0].items()}
        some = some + [empty] * (batch_size - len(some))
        yield {k: np.stack([row[k] for row in some]) for k in empty}


def shifted(batch: Batch) -> Batch:
    """Inputs [B, T] and what they predict: tokens, targets, segment_ids, positions, predicted.

    Example:
        >>> batch = {"tokens": np.array([[256, 104, 257]]), "segment_ids": np.ones((1, 3), int),
        ...          "positions": np.arange(3)[None]}
        >>> shifted(batch)["targets"].tolist()
        [[104, 257]]
    """
    inputs = {name: batch[name][:, :-1] for name in ("tokens", "segment_ids", "positions")}
    return {**inputs, "targets": batch["tokens"][:, 1:], "predicted": predicted(batch)}


def predicted(batch: Any) -> Any:
    """bool [B, T]: which targets `tokens[:, 1:]` are predicted: real, and of the input's document.

    Example:
        >>> predicted({"segment_ids": np.array([[1, 1, 2, 2, 0]])}).tolist()
        [[True, False, True, False]]
    """
    ids = batch["segment_ids"]
    return (ids[:, 1:] == ids[:, :-1]) & (ids[:, 1:] != 0)


def predicted_bytes(batches: Any) -> int:
    """How many bytes are predicted in batches; the marks are no bytes.

    Example:
        >>> predicted_bytes(
        ...     validation_batches([Document("a", b"abc")], sequence_length=4, batch_size=1))
        3
    """
    return sum(int((predicted(b) & (b["tokens"][:, 1:] < BEGIN)).sum()) for b in batches)


def bigram_counts(documents: Sequence[Document]) -> np.ndarray:
    """How often token b follows token a: int64 [VOCAB_SIZE, VOCAB_SIZE].

    Example:
        >>> int(bigram_counts([Document("a", b"aab")])[ord("a"), ord("b")])
        1
    """
    counts = np.zeros(VOCAB_SIZE**2, np.int64)
    for document in documents:
        tokens = encode(document.text)
        counts += np.bincount(tokens[:-1] * VOCAB_SIZE + tokens[1:], minlength=VOCAB_SIZE**2)
    return counts.reshape(VOCAB_SIZE, VOCAB_SIZE)


def bigram_bits_per_byte(counts: np.ndarray, batches: Any) -> float:
    """Bits per predicted token of add-one-smoothed bigrams, on the tokens a model would predict.

    Args:
        counts: of `bigram_counts`, on the documents to train on.
        batches: of `validation_batches`.

    Raises:
        ValueError: no token is predicted in the batches.

    Example:
        >>> held_out = validation_batches([Document("a", b"ab")], sequence_length=4, batch_size=1)
        >>> round(bigram_bits_per_byte(np.zeros((258, 258)), held_out), 3)
        8.011
    """
    log2 = np.log2(counts + 1.0) - np.log2((counts + 1.0).sum(1, keepdims=True))
    bits, number = 0.0, 0
    for batch in batches:
        chosen = predicted(batch)
        tokens = batch["tokens"]
        bits -= log2[tokens[:, :-1][chosen], tokens[:, 1:][chosen]].sum()
        number += int(chosen.sum())
    if not number:
        raise refuse("batches", "at least one predicted token", number)
    return float(bits / number)
