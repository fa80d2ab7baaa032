#!/usr/bin/env python3
"""Runs the project's tasks in an environment that it makes itself.

    python3 tools/bootstrap.py demo|test|test-gpu|setup
    python3 tools/bootstrap.py run COMMAND ...

Needs only the standard library of any Python >= 3.8. The environment is a folder .venv made with
the first Python >= 3.12 that really runs; it is used again as long as pyproject.toml is the same.
"""

import concurrent.futures
import contextlib
import fcntl
import glob
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import xml.etree.ElementTree

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
WANTED = (3, 12)
# The oldest supported first: it is the one for which every dependency has a wheel.
MINORS = (12, 13, 14)
OLDEST_JAX = "jax==0.11.2"
PYTEST = ("pytest", "-n", "2", "--dist", "worksteal")
OLDEST_TESTS = [
    "tests/test_reference.py",
    "tests/test_dilated.py",
    "tests/test_partial.py",
    "tests/test_modules.py",
    "tests/test_select.py",
]


class Failed(Exception):
    """A message for the user; no traceback."""


def say(text):
    print("bootstrap: " + text, file=sys.stderr, flush=True)


def clean_environ():
    """The environment without what would leak other packages into ours."""
    names = ("PYTHONHOME", "PYTHONPATH", "PIP_PREFIX", "PIP_TARGET", "PIP_USER", "VIRTUAL_ENV")
    environ = {k: v for k, v in os.environ.items() if k not in names}
    environ["PYTHONNOUSERSITE"] = "1"
    return environ


def quiet(command, **options):
    """(exit status, stdout) of a command that may not exist or not run."""
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=clean_environ(),
            timeout=120,
            **options,
        )
    except (OSError, subprocess.TimeoutExpired):
        return 127, ""
    return done.returncode, done.stdout.decode(errors="replace").strip()


def loud(command):
    """Run a command; its output is shown, and a failure ends the bootstrap."""
    say(" ".join(command))
    done = subprocess.run(command, stdin=subprocess.DEVNULL, env=clean_environ(), cwd=ROOT)
    if done.returncode:
        raise Failed("this command failed: " + " ".join(command))


# Which Python -------------------------------------------------------------------------------------


def really_runs(python):
    """Path of the interpreter behind a name if it runs and is new enough, else None.

    A name on PATH proves nothing: a pyenv shim of a version that is not active is there and fails.
    """
    code = (
        "import sys, zlib, ssl, ctypes; "
        f"fits = sys.version_info >= {WANTED} and sys.implementation.name == 'cpython'; "
        "print(sys.executable) if fits else sys.exit(1)"
    )
    status, out = quiet([python, "-c", code])
    return out.splitlines()[-1] if status == 0 and out else None


def candidates():
    """Names and paths to try, in order."""
    yield from (f"python3.{minor}" for minor in MINORS)
    yield from ("python3", "python")
    pyenv = os.environ.get("PYENV_ROOT") or os.path.expanduser("~/.pyenv")
    for minor in MINORS:
        found = glob.glob(os.path.join(pyenv, "versions", f"3.{minor}.*", "bin", "python3"))
        yield from sorted(found, key=release, reverse=True)


def release(path):
    """3.12.10 after 3.12.9."""
    version = path.split(os.sep)[-3]
    return [int(part) if part.isdigit() else -1 for part in version.split(".")]


def uv_command():
    """Path of uv: on PATH, or installed into a folder of its own with any pip there is."""
    if shutil.which("uv"):
        return shutil.which("uv")
    folder = os.path.join(ROOT, ".venv-uv")
    uv = os.path.join(folder, "bin", "uv")
    if quiet([uv, "--version"])[0] == 0:
        return uv
    say("no Python >= 3.12 yet: trying to install uv")
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--target", folder, "uv"]
    with locked(folder):
        there = quiet([uv, "--version"])[0] == 0 or quiet(install)[0] == 0
    return uv if there and quiet([uv, "--version"])[0] == 0 else None


def find_python():
    """The first interpreter >= 3.12 that really runs."""
    for name in candidates():
        python = really_runs(name)
        if python:
            return python
    uv = uv_command()
    if uv:
        version = f"{WANTED[0]}.{WANTED[1]}"
        say(f"asking uv for Python {version}")
        quiet([uv, "python", "install", version])
        status, out = quiet([uv, "python", "find", version])
        if status == 0 and really_runs(out):
            return out
    raise Failed(
        "no Python >= 3.12 runs on this machine. Looked for python3.12 to python3.14, python3 and "
        "python on PATH, then pyenv's versions, then uv's download. Install one, for example with "
        "`apt install python3.12 python3.12-venv`, `pyenv install 3.12` or `uv python install "
        "3.12`, and run this again."
    )


# The environment ----------------------------------------------------------------------------------


def make_empty(python, folder):
    """An environment with pip in `folder`, which may exist and be empty."""
    env_python = os.path.join(folder, "bin", "python")
    uv = shutil.which("uv")
    ways = [
        [python, "-m", "venv", folder],
        [python, "-m", "virtualenv", folder],  # Debian's python3 has no ensurepip of its own
        [sys.executable, "-m", "virtualenv", "--python", python, folder],
        [uv or "uv", "venv", "--seed", "--allow-existing", "--python", python, folder],
    ]
    for way in ways:
        if quiet(way)[0] == 0 and quiet([env_python, "-m", "pip", "--version"])[0] == 0:
            return
    with tempfile.TemporaryDirectory() as borrowed:  # any pip of this machine can bring another
        pip = [sys.executable, "-m", "pip"]
        if quiet([*pip, "install", "--quiet", "--target", borrowed, "virtualenv"])[0] == 0:
            environ = dict(clean_environ(), PYTHONPATH=borrowed)
            way = [sys.executable, "-m", "virtualenv", "--python", python, folder]
            if subprocess.run(way, env=environ, stdin=subprocess.DEVNULL).returncode == 0:
                return
    raise Failed(
        f"{python} cannot make an environment with pip: venv, virtualenv and uv all failed. On "
        "Debian and Ubuntu `apt install python3-venv` helps."
    )


def fingerprint(wishes):
    """What the environment depends on; a change means a new installation."""
    digest = hashlib.sha256()
    with open(os.path.join(ROOT, "pyproject.toml"), "rb") as file:
        digest.update(file.read())
    digest.update("\0".join(wishes).encode())
    return digest.hexdigest()


@contextlib.contextmanager
def locked(folder):
    """One process at a time builds; the others wait and find it built."""
    os.makedirs(folder, exist_ok=True)
    with open(os.path.join(folder, ".lock"), "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def read(path):
    with contextlib.suppress(OSError), open(path) as file:
        return file.read()
    return None


def write(path, text):
    with open(path, "w") as file:
        file.write(text)


def environment(name, wishes):
    """Path of an environment that has the project and `wishes` (pip's arguments) installed.

    The stamp says "building" until everything is in place, then what was installed and in which
    folder. So a run that was cut short is seen, and so is an environment that came with a moved or
    copied clone, whose scripts still name the Python of the old place: both are made anew.
    """
    folder = os.path.join(ROOT, name)
    stamp = os.path.join(folder, ".bootstrap")
    python = os.path.join(folder, "bin", "python")
    wanted = f"{fingerprint(wishes)} {folder}"
    with locked(folder):
        state = read(stamp)
        if state is None and set(os.listdir(folder)) - {".lock"}:
            raise Failed(f"{folder} is there but not made by this script: move it away.")
        in_place = state is not None and state.partition(" ")[2] == folder
        works = in_place and quiet([python, "-c", ""])[0] == 0
        if state == wanted and works:
            return folder
        write(stamp, "building")
        if not works:
            for entry in set(os.listdir(folder)) - {".lock", ".bootstrap"}:
                path = os.path.join(folder, entry)
                if os.path.isdir(path) and not os.path.islink(path):
                    shutil.rmtree(path)
                else:
                    os.remove(path)
            base = find_python()
            say(f"making {name} with {base}")
            make_empty(base, folder)
        pip = [python, "-m", "pip", "--disable-pip-version-check"]
        loud([*pip, "install", "-qq", "--upgrade", "pip>=25.1"])  # the first with --group
        loud([*pip, "install", "-qq", "--upgrade", *wishes])
        write(stamp, wanted)
    return folder


def newest():
    return environment(".venv", ["--editable", ".[train]", "--group", "dev"])


def oldest():
    """With what compiles for a GPU: a download that no task but the tests should wait for."""
    groups = ["--group", "test", "--group", "aot"]
    return environment(".venv-oldest", ["--editable", ".[train]", OLDEST_JAX, *groups])


# Tasks --------------------------------------------------------------------------------------------


def run(folder, *command, **variables):
    """Exit status of a command of the environment, never of one elsewhere on PATH."""
    ours = folder != os.environ.get("DILAX_ENV")
    environ = dict(clean_environ(), VIRTUAL_ENV=folder) if ours else dict(os.environ)
    binaries = os.path.join(folder, "bin")
    environ["PATH"] = binaries + os.pathsep + environ.get("PATH", "")
    environ.update(variables)
    say(" ".join(command))
    program = os.path.abspath(os.path.join(binaries, command[0]))
    try:
        return subprocess.run([program, *command[1:]], env=environ, cwd=ROOT).returncode
    except OSError as error:  # not there, or a script of a Python that is not there
        say(f"cannot run {program}: {error.strerror}")
        return 127


def test():
    """Lint, types, layers, tests with the newest jax; with the oldest, GPU code and core tests.

    Every step runs even if one before it failed. The last line printed is pytest's if all passed,
    else the list of what failed.
    """
    with concurrent.futures.ThreadPoolExecutor() as beside:  # one processor, and downloads
        making = beside.submit(oldest)
        folder = newest()
        types = beside.submit(run, folder, "pyright")
        steps = [
            (folder, "ruff", "check", "."),
            (folder, "ruff", "format", "--check", "."),
            (folder, "lint-imports"),
            (folder, *PYTEST, "-m", "not gpu"),
        ]
        failed = [" ".join(step[1:]) for step in steps if run(*step)]
        if types.result():
            failed.append("pyright")
    old = [path for path in OLDEST_TESTS if os.path.exists(os.path.join(ROOT, path))]
    chosen = ("-m", "not gpu and not slow and not aot and not newest", *old)
    for what, selection in (("compiling for a GPU", ("-m", "aot")), ("pytest", chosen)):
        # Without a platform named, jax would look for a GPU with the plugin that compiles for one.
        if run(making.result(), *PYTEST, *selection, JAX_PLATFORMS="cpu"):
            failed.append(f"{what} with {OLDEST_JAX}")
    if failed:
        raise Failed("failed: " + "; ".join(failed))
    return 0


def test_gpu():
    """The tests that need a GPU. A skip is a failure: a run that skips all proves nothing.

    On a machine without a network, DILAX_ENV names an environment that already has what is needed.
    """
    folder = os.environ.get("DILAX_ENV")
    folder = folder or environment(".venv-gpu", ["--editable", ".[cuda,train]", "--group", "test"])
    with tempfile.TemporaryDirectory() as scratch:
        report = os.path.join(scratch, "report.xml")
        status = run(folder, "pytest", "-v", "-n", "8", "-m", "gpu", "--junit-xml", report)
        if status:
            return status
        suite = xml.etree.ElementTree.parse(report).getroot().find("testsuite")
    if suite is None or int(suite.get("tests", 0)) == 0 or int(suite.get("skipped", 0)):
        raise Failed("tests that need the GPU were skipped: no GPU was seen, or jax lacks CUDA")
    return 0


def setup():
    """Only the environment."""
    newest()
    return 0


def demo():
    """Train a language model with dilated attention on real text."""
    return run(newest(), "dilax", "train")


def main(arguments):
    if arguments[:1] == ["run"] and len(arguments) > 1:
        return run(newest(), *arguments[1:])
    tasks = {"demo": demo, "setup": setup, "test": test, "test-gpu": test_gpu}
    if len(arguments) != 1 or arguments[0] not in tasks:
        print(__doc__)
        return 2
    return tasks[arguments[0]]()


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except Failed as error:
        say(f"error: {error}")
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
