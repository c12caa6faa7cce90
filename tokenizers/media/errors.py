"""The one error of everything that reads media."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


class MediaError(ValueError):
    """A medium that cannot be read or is larger than the limits: names it and says what to do."""


def source_name(source: Any) -> str:
    """How errors call a source: its path, or what kind of thing it is."""
    if isinstance(source, str | Path):
        return str(source)
    if isinstance(source, bytes | bytearray | memoryview):
        return f"{len(source)} bytes"
    return type(source).__name__


@contextmanager
def border(source: Any, repair: str) -> Iterator[None]:
    """Whatever a decoding library raises inside becomes a MediaError that names `source` and the `repair`."""
    try:
        yield
    except MediaError:
        raise
    except FileNotFoundError as error:
        raise MediaError(f"{source_name(source)} does not exist; check the path") from error
    except Exception as error:
        text = str(error).split("\n")[0][:200]
        raise MediaError(f"{source_name(source)} cannot be read ({type(error).__name__}: {text}); {repair}") from error
