"""A folder of images, sounds and clips with text beside them, as records.

In: `name.png`, `name.flac`, ... and `name.txt` or `name.json`. Out: one document per stem.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from weft.training.data.prepare import PrepareError
from weft.training.data.records import Record
from weft.training.data.source import MEDIA, TEXTS, Source, origin_of, sample_record, split_of
from weft.training.random import uniform


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
