"""A file that readers see whole or not at all: written beside its place, flushed to the disk, then renamed."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path


def publish(path: str | Path, data: bytes) -> None:
    """Write `data` to `path` by one rename. Raises OSError; then the old file, if any, is as it was."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".part")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
