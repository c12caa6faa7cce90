"""Other people's data as records: where a name or folder points, which adapter reads it, and the folder adapter itself.

In: `manifest.jsonl`, tar files or URLs in WebDataset layout, a folder of Parquet files (Hugging Face included),
`minari:PATH`, or a folder of media with sidecar text. Out: a `Source`: records again and again in one fixed order, and
a digest of what was there.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from weft.training.data.index import SPLITS
from weft.training.data.prepare import PrepareError, PrepareReport, prepare, prepare_records
from weft.training.data.records import SUFFIXES, Record
from weft.training.random import uniform

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


def prepare_from(
    where: str | os.PathLike[str],
    out_dir: str | Path,
    *,
    columns: Mapping[str, str] | None = None,
    name: str | None = None,
    rate_hz: float | None = None,
    **settings: Any,
) -> PrepareReport:
    """`prepare` for whatever `where` points to; see `open_source`. `settings` are those of `prepare_records`."""
    text = os.fspath(where)
    if text.endswith(".jsonl"):
        return prepare(text, out_dir, **settings)
    source = open_source(text, columns=columns, name=name, rate_hz=rate_hz)
    return prepare_records(source.records, out_dir, origin=source.origin, **settings)


def open_source(
    where: str, *, columns: Mapping[str, str] | None = None, name: str | None = None, rate_hz: float | None = None
) -> Source:
    """Choose the adapter. `columns` maps Parquet columns to modalities; `rate_hz` is the clock of Minari episodes."""
    if where.startswith("minari:"):
        from weft.training.data.source_minari import minari_source

        return minari_source(where.removeprefix("minari:"), name=name, rate_hz=rate_hz)
    if ".tar" in Path(where).name:
        from weft.training.data.source_tar import tar_source

        return tar_source(where, name=name)
    folder = Path(where)
    if not folder.is_dir():
        raise PrepareError(f"{where} is no .jsonl manifest, .tar file or URL, minari: dataset or folder; check the path")
    if parquet := sorted(folder.rglob("*.parquet")):
        from weft.training.data.source_parquet import parquet_source

        return parquet_source(parquet, folder, columns=columns, name=name)
    if any(folder.glob("*.tar")):
        from weft.training.data.source_tar import tar_source

        return tar_source(str(folder / "*.tar"), name=name)
    return media_source(folder, name=name)


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


def media_source(folder: str | Path, *, name: str | None = None, val_share: float = 0.0) -> Source:
    """A folder of images, sounds and clips; a text file of the same stem describes each. Files of one stem make one document.

    The split is that of the folder or file name, or `val_share` of the rest by a hash of the stem.
    """
    folder = Path(folder)
    known = (*MEDIA, *TEXTS, "json")
    files = sorted(f for f in folder.rglob("*") if f.is_file() and f.suffix.lower().lstrip(".") in known)
    if not any(f.suffix.lower().lstrip(".") in MEDIA for f in files):
        raise PrepareError(f"{folder} holds no media; {', '.join(sorted(MEDIA))} are read, text beside them as .txt")
    title = name or folder.resolve().name

    def records() -> Iterator[Record]:
        stems: dict[str, list[Path]] = {}
        for file in files:
            stems.setdefault(str(file.relative_to(folder).with_suffix("")), []).append(file)
        for line, (stem, group) in enumerate(sorted(stems.items()), start=1):
            if any(f.suffix.lower().lstrip(".") in MEDIA for f in group):
                split = split_of(f"{stem}.x") or ("val" if uniform(0, "split", stem) < val_share else "train")
                blobs = {f.name: f.read_bytes() for f in group if f.suffix.lower().lstrip(".") not in MEDIA}
                paths = {f.suffix.lower().lstrip("."): str(f.relative_to(folder)) for f in group}
                yield sample_record(line, f"{folder / stem}", stem, title, split, paths, blobs, folder)

    return Source(records, origin_of("media", files, name=title, val_share=val_share))


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
                    words.append(data.decode("utf-8").strip())
            except (ValueError, KeyError, RecursionError) as error:
                return Record(line, where, {"id": key}, base, blobs, error=f"{where}.{suffix} cannot be read: {error}")
    if "segments" in facts:
        return Record(line, where, {"id": key, "source": source, "split": split, **facts}, base, blobs)
    words += [str(facts.pop(k)) for k in ("caption", "text") if isinstance(facts.get(k), str)]
    segments: list[dict[str, Any]] = [
        {MEDIA[kind]: reference} for suffix, reference in sorted(media.items()) if (kind := suffix.rsplit(".", 1)[-1]) in MEDIA
    ]
    segments += [{"text": text} for text in dict.fromkeys(words) if text]
    spec = {"id": key, "source": source, "split": split, "metadata": facts, "segments": segments}
    return Record(line, where, spec, base, blobs)


__all__ = ["SPLITS", "Source", "media_source", "open_source", "origin_of", "prepare_from", "sample_record", "sniff", "split_of"]
