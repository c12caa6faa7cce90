"""What a segment's media are, as a digest: two segments with the same key have the same tokens.

Paths count by their absolute name, size and modification time; everything else by its bytes. Start, role and name are left out.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from weft.tokenizers.segment import Segment

ORIENTATION = 0x0112  # EXIF tag


def media_key(segment: Segment) -> str:
    """Hex digest of a segment's content and of every field that changes its tokens."""
    hasher = hashlib.blake2b(digest_size=16)
    fields = {k: v for k, v in vars(segment).items() if k not in ("start", "role", "name")}
    # Times on the document's clock turn into offsets from the start, so the start matters to them.
    if fields.get("times") is not None:
        fields["start"] = segment.start
    hasher.update(f"{type(segment).__module__}.{type(segment).__qualname__}".encode())
    for name, value in sorted(fields.items()):
        for part in _parts(value, media=segment.modality != "text"):
            hasher.update(len(part).to_bytes(8, "little") + part)
        hasher.update(name.encode())
    return hasher.hexdigest()


def _parts(value: Any, media: bool) -> Iterable[bytes]:
    """The bytes that identify a value."""
    if isinstance(value, Path) or (media and isinstance(value, str) and os.path.exists(value)):
        yield _file(Path(value))
    elif isinstance(value, bytes):
        yield value
    elif isinstance(value, np.ndarray):
        yield f"{value.dtype}{value.shape}".encode()
        yield np.ascontiguousarray(value).tobytes()
    elif hasattr(value, "detach") and hasattr(value, "numpy"):
        yield from _parts(value.detach().cpu().numpy(), media)
    elif hasattr(value, "tobytes") and hasattr(value, "mode") and hasattr(value, "size"):
        told = (value.mode, value.size, value.getpalette(), value.info.get("transparency"), value.getexif().get(ORIENTATION))
        yield repr(told).encode()
        yield value.tobytes()
    elif isinstance(value, (list, tuple)):
        yield f"[{len(value)}".encode()
        for item in value:
            yield from _parts(item, media)
    else:
        yield repr(value).encode("utf-8", "surrogatepass")


def _file(path: Path) -> bytes:
    """A file by name, size and time; a folder by those of its files."""
    paths = sorted(path.iterdir()) if path.is_dir() else [path]
    told = [f"{p.name}:{p.stat().st_size}:{p.stat().st_mtime_ns}" for p in paths]
    return f"{path.resolve()}|{'|'.join(told)}".encode()
