"""Which files are documents, and the split by file."""

import pytest

from dilax.corpus import Corpus, Document, load_corpus, read_documents, standard_library


def test_the_default_text_is_the_standard_library_without_tests():
    names = [d.name for d in standard_library()]
    assert names == sorted(names)
    assert {"ast.py", "json/decoder.py"} <= set(names)
    parts = {part for name in names for part in name.split("/")[:-1]}
    assert not parts & {"site-packages", "dist-packages", "test", "tests", "idle_test"}


def test_the_split_is_by_file_and_depends_on_names_only(tmp_path):
    for i in range(20):
        (tmp_path / f"{i}.txt").write_bytes(b"x%d" % i)
    corpus = load_corpus([tmp_path], validation_fraction=0.25)
    names = [{d.name for d in part} for part in (corpus.train, corpus.validation)]
    assert not names[0] & names[1]
    assert [len(n) for n in names] == [15, 5]
    for i in range(20):
        (tmp_path / f"{i}.txt").write_bytes(b"something else")
    again = load_corpus([tmp_path], validation_fraction=0.25)
    assert {d.name for d in again.validation} == names[1]
    assert again.fingerprint != corpus.fingerprint
    assert again.fingerprint == load_corpus([tmp_path], validation_fraction=0.25).fingerprint


def test_directories_give_their_text_files_and_files_are_taken_as_they_are(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / ".git").mkdir()
    (tmp_path / "sub" / "a.txt").write_text("ä")
    (tmp_path / "b.bin").write_bytes(b"\xff\xfe")
    (tmp_path / "c.txt").write_bytes(b"")
    (tmp_path / ".git" / "config").write_text("hidden")
    found = read_documents([tmp_path, tmp_path / "sub" / "a.txt"])
    assert [d.text for d in found] == ["ä".encode()]
    assert read_documents([tmp_path / "b.bin"])[0].text == b"\xff\xfe"


def test_files_that_are_no_text_are_counted_and_an_inner_directory_left_out(tmp_path):
    runs = tmp_path / "runs"
    runs.mkdir()
    (tmp_path / "b.bin").write_bytes(b"\xff")
    with pytest.raises(ValueError, match=r"UTF-8 text if in a directory \(1 are not\)"):
        load_corpus([tmp_path])
    for path in (tmp_path / "a.txt", tmp_path / "b.txt", runs / "c.txt"):
        path.write_text("text")
    corpus = load_corpus([tmp_path], exclude=runs)
    assert corpus.skipped == 1
    names = {d.name for d in corpus.train + corpus.validation}
    assert names == {(tmp_path / n).as_posix() for n in ("a.txt", "b.txt")}
    assert len(read_documents([runs], exclude=runs)) == 1
    assert len(read_documents([tmp_path])) == 3


def test_of_a_single_file_the_end_is_held_out(tmp_path):
    (tmp_path / "a.txt").write_bytes(bytes(range(100)))
    corpus = load_corpus([tmp_path / "a.txt"])
    assert corpus.train[0].text + corpus.validation[0].text == bytes(range(100))
    assert corpus.num_bytes == (90, 10)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: load_corpus(["no such file"]), "text.*exist"),
        (lambda: load_corpus("a.txt"), "text.*sequence of paths"),
        (lambda: load_corpus([]), "text"),
        (lambda: load_corpus(validation_fraction=1.0), "validation_fraction"),
    ],
)
def test_wrong_arguments_are_refused_by_name(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_an_empty_file_is_refused(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"")
    with pytest.raises(ValueError, match="not empty"):
        load_corpus([tmp_path / "a.txt"])
    (tmp_path / "a.txt").write_bytes(b"x")
    with pytest.raises(ValueError, match="two bytes"):
        load_corpus([tmp_path / "a.txt"])


def test_corpus_fingerprint_separates_the_two_parts():
    a, b = Document("a", b"x"), Document("b", b"y")
    assert Corpus((a, b), ()).fingerprint != Corpus((a,), (b,)).fingerprint
