"""What every adapter shares: a source is records in a fixed order; files that share a key are one document.

In: file names and bytes. Out: `Source`, splits by name, types by first bytes, and `sample_record`.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from weft.training.data.records import SUFFIXES, Record

SPLIT_WORDS = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "dev": "val",
    "test": "test",
}
TEXTS = ("txt", "caption", "text")
MEDIA = {suffix: modality for modality in ("image", "video", "audio") for suffix in SUFFIXES[modality]}
MAGIC = (
    (b"\x89PNG\r\n\x1a\n", 0, "png"),
    (b"\xff\xd8\xff", 0, "jpg"),
    (b"WEBP", 8, "webp"),
    (b"WAVE", 8, "wav"),
    (b"fLaC", 0, "flac"),
    (b"OggS", 0, "ogg"),
    (b"ftyp", 4, "mp4"),
)


@dataclass(frozen=True)
class Source:
    """Records in a fixed order."""

    records: Callable[[], Iterable[Record]]
    origin: str
    """Digest of the files behind it: names, sizes and times of change."""


def origin_of(kind: str, files: Iterable[Path | str], **settings: Any) -> str:
    """Digest of an adapter's settings and of its files' names, sizes and times of change."""
    total = hashlib.sha256(json.dumps([kind, settings], sort_keys=True, default=str).encode())
    for file in files:
        stat = os.stat(file) if os.path.exists(file) else None
        total.update(f"{file} {stat.st_size if stat else ''} {stat.st_mtime_ns if stat else ''}\n".encode())
    return total.hexdigest()


def split_of(path: str) -> str | None:
    """train, val or test if a folder or the first word of the file's name says so."""
    parts = Path(path).parts
    for word in (*reversed(parts[:-1]), Path(path).stem.replace("_", "-").split("-")[0]):
        if word.lower() in SPLIT_WORDS:
            return SPLIT_WORDS[word.lower()]
    return None


def sniff(data: bytes) -> str | None:
    """File type of media bytes by their first bytes; None if it is none that we read."""
    return next((suffix for magic, at, suffix in MAGIC if data[at : at + len(magic)] == magic), None)


def sample_record(
    line: int,
    where: str,
    key: str,
    source: str,
    split: str,
    media: Mapping[str, str],
    blobs: Mapping[str, bytes],
    base: Path | None = None,
) -> Record:
    """One document of files that share a key: media first, text after. `media` maps a suffix to a path or a key of `blobs`.

    A .json with `segments` is a manifest object of ours; else its `text` or `caption` is read, and the rest becomes metadata.
    """
    facts: dict[str, Any] = {}
    words: list[str] = []
    for suffix, reference in sorted(media.items()):
        kind = suffix.rsplit(".", 1)[-1]
        if kind in ("json", *TEXTS):
            try:
                data = blobs[os.path.basename(reference)] if reference not in blobs else blobs[reference]
                if kind == "json":
                    facts = json.loads(data)
                    facts = facts if isinstance(facts, dict) else {"value": facts}
                else:
                    words.append(data.decode("utf-8-sig").strip())
            except (ValueError, KeyError, RecursionError) as error:
                said = f"{where}.{suffix} cannot be read: {error}; save it as {'JSON' if kind == 'json' else 'text'} in UTF-8"
                return Record(line, where, {"id": key}, base, blobs, error=said)
    if "segments" in facts:
        return Record(line, where, {"id": key, "source": source, "split": split, **facts}, base, blobs)
    words += [str(facts.pop(k)) for k in ("caption", "text") if isinstance(facts.get(k), str)]
    segments: list[dict[str, Any]] = [
        {MEDIA[kind]: reference} for suffix, reference in sorted(media.items()) if (kind := suffix.rsplit(".", 1)[-1]) in MEDIA
    ]
    segments += [{"text": text} for text in dict.fromkeys(words) if text]
    spec = {"id": key, "source": source, "split": split, "metadata": facts, "segments": segments}
    return Record(line, where, spec, base, blobs)
