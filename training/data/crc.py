"""CRC-32C (Castagnoli) of bytes: what finds a flipped bit in a sample before it is used.

google-crc32c's C extension runs at several GiB/s; its pure Python fallback would be a thousand times slower, so it is
refused.
"""

from __future__ import annotations

import functools


@functools.cache
def _extension() -> object:
    import google_crc32c

    if google_crc32c.implementation != "c":
        raise ModuleNotFoundError(
            f"google-crc32c runs as {google_crc32c.implementation!r}, its C extension is needed; "
            "pip install --force-reinstall google-crc32c"
        )
    return google_crc32c


def crc32c(data: bytes, before: int = 0) -> int:
    """CRC-32C of `data`, continuing from the CRC of the bytes before it."""
    return _extension().extend(before, data)  # type: ignore[attr-defined]
