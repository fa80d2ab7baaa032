"""The command line: it finds the command, and says errors in one line. `dilax.commands` has those.

Each command imports what it needs and no other does, so that one runs without another's packages.
"""

import contextlib
import importlib
import io
import os
import sys
from collections.abc import Sequence
from typing import Any

from dilax._types import LostProcessError, UnsupportedError

# dilax.commands.NAME has the class Name.
COMMANDS = {
    "train": "train a LongNet language model on text, beside byte bigrams on the same files",
    "generate": "continue a text with a trained model",
    "explain": "say which implementation a call would run, and why not the others",
    "show": "draw which keys each query of each head sees",
    "bench": "time the implementations on this machine",
    "tune": "search the kernels' tile sizes on this machine's GPU",
}


def parse(arguments: Sequence[str]) -> Any:
    """The command that the arguments ask for, with its settings: call its `run`.

    Raises:
        SystemExit: the arguments are wrong, or ask for help.

    Example:
        >>> parse(["show", "--length", "64"]).length
        64
    """
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_overview())
        raise SystemExit(0 if arguments else 2)
    if arguments[0] == "--version":
        from importlib.metadata import version

        print(f"dilax-attention {version('dilax-attention')}")
        raise SystemExit(0)
    name = arguments[0]
    if name not in COMMANDS:
        raise SystemExit(_failure(f"command: wanted one of {', '.join(COMMANDS)}, got {name!r}"))
    import tyro

    command = tyro.conf.OmitArgPrefixes[_command(name)]
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(command, prog=f"dilax {name}", args=list(arguments[1:]))
    except SystemExit as stop:
        # A config that refuses its fields does so inside tyro, which draws a box around that.
        cause: BaseException | None = stop
        while cause is not None and not _is_refusal(cause):
            cause = cause.__context__
        if cause is not None:
            raise cause from None
        print(said.getvalue(), end="", file=sys.stderr)
        raise


def _command(name: str) -> Any:
    return getattr(importlib.import_module(f"dilax.commands.{name}"), name.capitalize())


def _is_refusal(error: BaseException) -> bool:
    """Is it one of our messages, and not a defect?"""
    return isinstance(error, ValueError) and ": wanted " in str(error)


def _overview() -> str:
    lines = [f"  {name:<10}{summary}" for name, summary in COMMANDS.items()]
    return "\n".join(
        [
            "usage: dilax COMMAND [OPTIONS]",
            "",
            *lines,
            "",
            "dilax COMMAND --help lists the options.",
        ]
    )


def _failure(message: str) -> int:
    print(f"error: {message}", file=sys.stderr)
    return 2


def _lost(error: LostProcessError) -> int:
    """Say so and go at once: an orderly end would wait for the lost process."""
    print(f"error: {error}", file=sys.stderr, flush=True)
    os._exit(1)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; an argument that the library refuses is one line and exit status 2.

    Example:
        >>> main(["show", "--length", "0"])
        2
    """
    try:
        return parse(sys.argv[1:] if arguments is None else arguments).run() or 0
    except UnsupportedError as error:
        return _failure(str(error))
    except ValueError as error:
        if not _is_refusal(error):
            raise
        return _failure(str(error))
    except LostProcessError as error:
        return _lost(error)
    except FloatingPointError as error:  # of `train`, which says what happened
        print(f"error: {error}", file=sys.stderr)
        return 1
    except ModuleNotFoundError as error:
        if error.name not in ("grain", "matplotlib", "optax", "orbax", "rich", "tyro"):
            raise
        return _failure(f"{error.name}: wanted it installed (dilax-attention[train]), got nothing")
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
