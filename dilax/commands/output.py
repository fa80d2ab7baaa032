"""The files that commands write."""

import os
from pathlib import Path

from dilax._types import refuse


def check_output(name: str, path: Path | None, suffix: str | None = None) -> None:
    """Refuse a file that could not be written, before anything is computed."""
    if path is None:
        return
    if suffix is not None and path.suffix.lower() != suffix:
        raise refuse(name, f"a file name that ends in {suffix}", str(path))
    if path.is_dir() or not path.parent.is_dir():
        raise refuse(name, "a file in a directory that exists", str(path))
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise refuse(name, "a file that may be written", str(path))
