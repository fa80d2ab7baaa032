"""What the README tells people to type works."""

import re
import shlex
from pathlib import Path

import pytest

from dilax import cli

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
PYTHON = [text for language, text in BLOCKS if language == "python"]
SHELL = [line for language, text in BLOCKS if language == "sh" for line in text.splitlines()]
COMMANDS = [line for line in SHELL if line.startswith("dilax ")]


def test_there_is_something_to_test():
    assert PYTHON
    assert {shlex.split(line)[1] for line in COMMANDS} == set(cli.COMMANDS)


@pytest.mark.parametrize("code", PYTHON)
def test_python_block_runs(code):
    names = {}
    exec(compile(code, "README.md", "exec"), names)
    assert names["out"].shape == (1, 1000, 4, 64)
    assert ("y" in names) == ("layer = " in code)
    if "y" in names:
        assert names["y"].shape == names["z"].shape == (1, 1000, 256)


@pytest.mark.parametrize("line", COMMANDS)
def test_command_parses(line):
    assert cli.parse(shlex.split(line)[1:]) is not None


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text()
    mentioned = set(re.findall(r"make ([a-z-]+)`", README)) | {
        line.split("make ")[1].split()[0] for line in SHELL if "&& make " in line
    }
    assert {"demo", "test", "test-gpu"} <= mentioned
    assert all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in mentioned)


def test_linked_files_exist():
    for target in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / target).is_file(), target


def test_ci_runs_what_a_person_runs():
    assert "make --no-print-directory test\n" in (ROOT / ".ci" / "run").read_text()
