"""Messages between a process and its workers: one JSON object and some blobs or arrays. No pickle, no shared memory.

Frame: uint32 length of the JSON, the JSON (with the lengths of the blobs), the blobs.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from typing import Any, BinaryIO

import numpy as np

Message = tuple[dict[str, Any], list[bytes]]
_LIMIT = 2**31


def send(out: BinaryIO, header: dict[str, Any], blobs: Sequence[bytes] = ()) -> None:
    """Write one message and flush."""
    text = json.dumps({**header, "blobs": [len(b) for b in blobs]}).encode()
    out.write(struct.pack("<I", len(text)) + text)
    for blob in blobs:
        out.write(blob)
    out.flush()


def receive(source: BinaryIO) -> Message | None:
    """Read one message; None where the other side has closed."""
    head = source.read(4)
    if len(head) < 4:
        return None
    header = json.loads(_exactly(source, struct.unpack("<I", head)[0]))
    sizes = header.pop("blobs")
    return header, [_exactly(source, size) for size in sizes]


def _exactly(source: BinaryIO, size: int) -> bytes:
    if not 0 <= size <= _LIMIT:
        raise EOFError(f"a message part of {size} bytes is no message of ours")
    data = source.read(size)
    if len(data) != size:
        raise EOFError(f"the other side closed after {len(data)} of {size} bytes")
    return data


def from_arrays(arrays: dict[str, np.ndarray | None]) -> tuple[dict[str, Any], list[bytes]]:
    """Arrays as a JSON table and their bytes; None is left out."""
    table, blobs = {}, []
    for name, array in arrays.items():
        if array is not None:
            table[name] = [array.dtype.str, list(array.shape)]
            blobs.append(np.ascontiguousarray(array).tobytes())
    return table, blobs


def to_arrays(table: dict[str, Any], blobs: Sequence[bytes]) -> dict[str, np.ndarray]:
    """The inverse of `from_arrays`; the arrays are read-only views of the blobs."""
    return {name: np.frombuffer(b, dtype).reshape(shape) for (name, (dtype, shape)), b in zip(table.items(), blobs)}
