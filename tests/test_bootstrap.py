"""The bootstrap finds an interpreter that really runs, and makes its environment once."""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture
def bootstrap(tmp_path, monkeypatch):
    """The script as a module, at work in an empty project."""
    path = ROOT / "tools" / "bootstrap.py"
    spec = importlib.util.spec_from_file_location("bootstrap", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "ROOT", str(tmp_path))
    (tmp_path / "pyproject.toml").write_text("one")
    return module


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A machine without any Python: an empty PATH and an empty pyenv."""
    for name, folder in (("PATH", "bin"), ("PYENV_ROOT", "pyenv")):
        (tmp_path / folder).mkdir()
        monkeypatch.setenv(name, str(tmp_path / folder))
    return tmp_path


def put(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("#!/bin/sh\n" + text)
    path.chmod(0o755)


def works():
    return f'exec {sys.executable} "$@"\n'


def test_a_name_that_does_not_run_is_passed_over(bootstrap, machine):
    put(
        machine / "bin" / "python3.12",
        "echo 'pyenv: command not found' >&2; exit 127\n",
    )
    put(machine / "bin" / "python3", "echo 3.11; exit 1\n")
    assert bootstrap.really_runs("python3.12") is None
    put(machine / "pyenv" / "versions" / "3.12.9" / "bin" / "python3", "exit 1\n")
    put(machine / "pyenv" / "versions" / "3.12.10" / "bin" / "python3", works())
    assert os.path.samefile(bootstrap.find_python(), sys.executable)


def test_pyenv_versions_are_tried_newest_first(bootstrap, machine):
    for version in ("3.13.0", "3.12.9", "3.12.10", "3.11.7"):
        put(machine / "pyenv" / "versions" / version / "bin" / "python3", "exit 1\n")
    found = [name.split(os.sep)[-3] for name in bootstrap.candidates() if os.sep in name]
    assert found == ["3.12.10", "3.12.9", "3.13.0"]


def test_uv_is_asked_last(bootstrap, machine):
    put(machine / "found", works())
    put(machine / "bin" / "uv", f'[ "$2" = find ] && echo {machine / "found"}; exit 0\n')
    assert bootstrap.find_python() == str(machine / "found")


def test_no_python_is_a_clear_error(bootstrap, machine, monkeypatch):
    monkeypatch.setattr(bootstrap, "uv_command", lambda: None)
    with pytest.raises(bootstrap.Failed, match=r"no Python >= 3\.12 runs .* Install one"):
        bootstrap.find_python()


@pytest.fixture
def builds(bootstrap, tmp_path, monkeypatch):
    """Environments whose installation only writes down that it ran; returns those notes."""
    notes = []

    def make_empty(python, folder):
        notes.append("made")
        put(Path(folder) / "bin" / "python", "exit 0\n")

    monkeypatch.setattr(bootstrap, "make_empty", make_empty)
    monkeypatch.setattr(bootstrap, "find_python", lambda: sys.executable)
    monkeypatch.setattr(bootstrap, "loud", lambda command: notes.append(command[-1]))
    return notes


def test_an_environment_is_made_once(bootstrap, builds, tmp_path):
    for _ in range(2):
        assert bootstrap.environment(".venv", ["wish"]) == str(tmp_path / ".venv")
    assert builds == ["made", "pip>=25.1", "wish"]


def test_a_changed_project_is_installed_again_in_place(bootstrap, builds, tmp_path):
    bootstrap.environment(".venv", ["wish"])
    (tmp_path / "pyproject.toml").write_text("two")
    bootstrap.environment(".venv", ["wish"])
    assert builds == ["made", "pip>=25.1", "wish", "pip>=25.1", "wish"]


def test_an_interrupted_environment_is_made_anew(bootstrap, builds, tmp_path, monkeypatch):
    def interrupted(command):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(bootstrap, "loud", interrupted)
        with pytest.raises(KeyboardInterrupt):
            bootstrap.environment(".venv", ["wish"])
    left = tmp_path / ".venv" / "half"
    left.mkdir()
    bootstrap.environment(".venv", ["wish"])
    assert builds == ["made", "made", "pip>=25.1", "wish"]
    assert not left.exists()


@pytest.mark.parametrize("copied", [False, True], ids=["moved", "copied"])
def test_an_environment_from_elsewhere_is_made_anew(copied, bootstrap, builds, tmp_path):
    """Its scripts name the Python of the old place, or of nothing."""
    old, new = tmp_path / "old", tmp_path / "new"
    old.mkdir()
    (old / "pyproject.toml").write_text("one")
    bootstrap.ROOT = str(old)
    folder = Path(bootstrap.environment(".venv", ["wish"]))
    put(folder / "bin" / "pytest", "exit 0\n")
    if copied:
        shutil.copytree(old, new)
    else:
        old.rename(new)
    bootstrap.ROOT = str(new)
    for _ in range(2):
        assert bootstrap.environment(".venv", ["wish"]) == str(new / ".venv")
    assert builds == ["made", "pip>=25.1", "wish"] * 2
    assert not (new / ".venv" / "bin" / "pytest").exists()


@pytest.mark.parametrize("stale", [False, True], ids=["absent", "stale"])
def test_no_tool_of_another_place_runs(stale, bootstrap, machine, capfd):
    put(machine / "bin" / "pytest", "echo foreign\n")
    folder = machine / ".venv"
    if stale:
        put(folder / "bin" / "pytest", "")
        (folder / "bin" / "pytest").write_text(f"#!{machine}/gone/python\n")
    assert bootstrap.run(str(folder), "pytest") == 127
    printed = capfd.readouterr()
    assert printed.out == ""
    assert f"cannot run {folder / 'bin' / 'pytest'}" in printed.err
    put(folder / "bin" / "pytest", "echo ours $1; exit 3\n")
    assert bootstrap.run(str(folder), "pytest", "-q") == 3
    assert capfd.readouterr().out == "ours -q\n"


def test_a_folder_of_someone_else_is_left_alone(bootstrap, builds, tmp_path):
    (tmp_path / ".venv").mkdir()
    (tmp_path / ".venv" / "theirs").write_text("")
    with pytest.raises(bootstrap.Failed, match="not made by this script"):
        bootstrap.environment(".venv", ["wish"])
    assert (tmp_path / ".venv" / "theirs").exists()
    assert builds == []


@pytest.mark.parametrize("arguments", [[], ["tset"], ["test", "more"]])
def test_an_unknown_task_is_exit_status_2(arguments):
    path = ROOT / "tools" / "bootstrap.py"
    done = subprocess.run([sys.executable, str(path), *arguments], capture_output=True, text=True)
    assert done.returncode == 2
    assert "demo|test|test-gpu|setup" in done.stdout


def test_every_failed_step_is_reported(bootstrap, monkeypatch):
    monkeypatch.setattr(bootstrap, "newest", lambda: "new")
    monkeypatch.setattr(bootstrap, "oldest", lambda: "old")
    ran = []

    def run(folder, *command, **variables):
        ran.append((folder, command[0]))
        return int(command[0] == "pyright" or command[-1] in ("not gpu", "aot"))

    monkeypatch.setattr(bootstrap, "run", run)
    with pytest.raises(bootstrap.Failed, match=r"failed: pytest -n 2 .*; pyright; compiling .*2$"):
        bootstrap.test()
    assert ran[-1] == ("old", "pytest")
    assert ("new", "lint-imports") in ran
