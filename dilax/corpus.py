"""The documents of a language model: files that are text, some of them held out."""

import dataclasses
import hashlib
import math
import pathlib
import sysconfig
from collections.abc import Sequence

from dilax._types import refuse

_NOT_LIBRARY = frozenset(
    ("site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test")
)


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
