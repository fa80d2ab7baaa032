"""Text for language models: byte tokens, held-out files, packing by grain, byte bigrams.

Tokens are bytes, 0 to 255, and two marks: 256 begins a document, 257 ends it. A packed row has
segment ids from 1 (grain's convention; 0 is padding, whose tokens are 0) and positions that start
again with every document.
"""

import dataclasses
import hashlib
import itertools
import math
import pathlib
import sysconfig
from collections.abc import Iterator, Sequence
from typing import Any

import grain
import numpy as np
from grain.experimental import FirstFitPackIterDataset

from dilax._types import refuse

BEGIN = 256
END = 257
VOCAB_SIZE = 258

_NOT_LIBRARY = frozenset(
    ("site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test")
)
_PACKED_AT_ONCE = 32  # rows that first-fit packing fills side by side

Batch = dict[str, np.ndarray]  # tokens, segment_ids, positions: int32 [B, length + 1]


@dataclasses.dataclass(frozen=True)
class Document:
    """One file (or one part of the only file): its name and its bytes."""

    name: str
    text: bytes


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Documents to train on and documents held out.

    Example:
        >>> Corpus((Document("a", b"x"),), (Document("b", b"y"),)).num_bytes
        (1, 1)
    """

    train: tuple[Document, ...]
    validation: tuple[Document, ...]
    skipped: int = 0  # files of the directories that are not UTF-8 text

    @property
    def num_bytes(self) -> tuple[int, int]:
        """Bytes to train on and bytes held out."""
        return sum(len(d.text) for d in self.train), sum(len(d.text) for d in self.validation)

    @property
    def fingerprint(self) -> str:
        """A hash of every name and byte: a resumed run must read what it read before."""
        digest = hashlib.sha256()
        for part in (self.train, self.validation):
            for document in part:
                digest.update(document.name.encode(errors="surrogateescape") + b"\0")
                digest.update(hashlib.sha256(document.text).digest())
            digest.update(b"\1")
        return digest.hexdigest()


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


def standard_library() -> tuple[Document, ...]:
    """The Python source files of the running interpreter's standard library, without tests.

    Raises:
        ValueError: this interpreter has no source files on disk.

    Example:
        >>> any(document.name == "ast.py" for document in standard_library())
        True
    """
    root = pathlib.Path(sysconfig.get_path("stdlib"))
    files = sorted(
        (path.relative_to(root).as_posix(), path)
        for path in root.rglob("*.py")
        if not _NOT_LIBRARY.intersection(path.relative_to(root).parts)
    )
    documents = tuple(Document(name, path.read_bytes()) for name, path in files if path.is_file())
    documents = tuple(d for d in documents if d.text)
    if not documents:
        raise refuse("text", f"a standard library with source files in {root}", "none")
    return documents


def read_documents(
    paths: Sequence[str | pathlib.Path], *, exclude: str | pathlib.Path | None = None
) -> tuple[Document, ...]:
    """Files, and the text files in directories (UTF-8, not hidden), in a fixed order.

    Args:
        paths: files and directories.
        exclude: a directory whose files are left out of directories that contain it.

    Raises:
        ValueError: a path does not exist, or there is no byte of text in all of them.
    """
    return _read(paths, exclude)[0]


def _read(
    paths: Sequence[str | pathlib.Path], exclude: str | pathlib.Path | None
) -> tuple[tuple[Document, ...], int]:
    """The documents, and how many files in directories are none because they are not UTF-8."""
    left_out = None if exclude is None else pathlib.Path(exclude).resolve()
    skipped = set()
    found: dict[pathlib.Path, Document] = {}
    if isinstance(paths, str | pathlib.Path):
        raise refuse("text", "a sequence of paths", paths)
    for given in map(pathlib.Path, paths):
        if given.is_file():
            found[given.resolve()] = Document(given.as_posix(), given.read_bytes())
            continue
        if not given.is_dir():
            raise refuse("text", "files and directories that exist", str(given))
        inner = left_out is not None and given.resolve() in left_out.parents
        for path in sorted(given.rglob("*")):
            if inner and left_out in path.resolve().parents:
                continue
            parts = path.relative_to(given).parts
            if path.is_file() and not any(p.startswith(".") or p == "__pycache__" for p in parts):
                text = path.read_bytes()
                if _is_text(text):
                    found.setdefault(path.resolve(), Document(path.as_posix(), text))
                else:
                    skipped.add(path.resolve())
    documents = tuple(d for d in found.values() if d.text)
    if not documents:
        wanted = "at least one file that is not empty"
        if skipped:
            wanted += f", and UTF-8 text if in a directory ({len(skipped)} are not)"
        raise refuse("text", wanted, [str(p) for p in paths])
    return documents, len(skipped - found.keys())


def _is_text(text: bytes) -> bool:
    try:
        text.decode()
    except UnicodeDecodeError:
        return False
    return b"\0" not in text


def load_corpus(
    paths: Sequence[str | pathlib.Path] | None = None,
    *,
    validation_fraction: float = 0.1,
    exclude: str | pathlib.Path | None = None,
) -> Corpus:
    """Documents split by file into those to train on and those held out.

    Args:
        paths: files and directories; None: the standard library's own source files.
        validation_fraction: share of the files that is held out, at least one. Which ones depends
            only on their names. Of a single file, the last part of this share is held out.
        exclude: as in `read_documents`.

    Raises:
        ValueError: a path does not exist, there is no text, or the fraction is not in (0, 1).

    Example:
        >>> corpus = load_corpus()
        >>> len(corpus.train) > 5 * len(corpus.validation) > 0
        True
    """
    if not isinstance(validation_fraction, float) or not 0 < validation_fraction < 1:
        raise refuse("validation_fraction", "a number between 0 and 1", validation_fraction)
    documents, skipped = (standard_library(), 0) if paths is None else _read(paths, exclude)
    if len(documents) == 1:
        (name, text) = documents[0].name, documents[0].text
        cut = len(text) - max(1, round(len(text) * validation_fraction))
        if cut < 1:
            raise refuse("text", "at least two bytes", f"{len(text)} in {name}")
        held_out = (Document(f"{name} (end)", text[cut:]),)
        return Corpus((Document(name, text[:cut]),), held_out, skipped)
    count = min(len(documents) - 1, max(1, math.floor(len(documents) * validation_fraction)))
    order = sorted(documents, key=lambda d: hashlib.sha256(_name_bytes(d)).digest())
    held_out = {id(d) for d in order[:count]}
    return Corpus(
        tuple(d for d in documents if id(d) not in held_out),
        tuple(d for d in order[:count]),
        skipped,
    )


def _name_bytes(document: Document) -> bytes:
    return document.name.encode(errors="surrogateescape")


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
