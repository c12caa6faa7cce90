"""Documents on their way into shards and back.

In: manifest objects (docs/interfaces.md), with media as paths, bytes or arrays. Out: the members of a sample: `json`
(the same object, media replaced by member suffixes) and the media themselves: `0.png`, `1.flac`, `2.npy`, `3.0.png`
(frame 0 of segment 3). `restore` is the inverse; it returns a `Document` whose segments hold bytes and arrays.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from weft.tokenizers.manifest import load_document
from weft.tokenizers.numbers import csv_table
from weft.tokenizers.registry import REGISTRY, by_name
from weft.tokenizers.segment import Document, Segment
from weft.training.data.index import MAX_SAMPLE_BYTES

SUFFIXES = {
    "image": ("png", "jpg", "jpeg", "webp"),
    "video": ("mp4",),
    "audio": ("wav", "flac", "ogg"),
    "sensor": ("npy",),
    "action": ("npy",),
}
"""File types that may enter a shard, per modality. Frames of a video are images."""
TABLES = {"sensor": ("csv",), "action": ("csv",)}
"""What a manifest may name besides; it becomes .npy."""
INLINE = 16
"""Arrays of at most this many numbers stay in the JSON."""
MAX_LINE_BYTES = 16 * 2**20

Members = list[tuple[str, bytes]]


class Refused(ValueError):
    """A document that cannot be used: `reason` is one of few words to count by, the text says what and where."""

    def __init__(self, reason: str, detail: str, segment: int | None = None) -> None:
        super().__init__(detail)
        self.reason, self.segment = reason, segment


@dataclass(frozen=True)
class Record:
    """One document as a source gives it."""

    line: int
    """Number in the source, from 1."""
    where: str
    """`manifest.jsonl line 12`."""
    spec: dict[str, Any]
    """The manifest object; media are paths (str), keys of `blobs`, or arrays."""
    base: Path | None = None
    """Folder that paths start from, and which they may not leave."""
    blobs: Mapping[str, bytes] = field(default_factory=dict)
    error: str = ""
    """Why there is no document in this line; empty where there is one."""

    def path(self, reference: str, segment: int) -> Path:
        """Where a medium lies. Raises `Refused` for a path that leaves the manifest's folder."""
        base = self.base or Path()
        if not reference or "\x00" in reference or not (base / reference).resolve().is_relative_to(base.resolve()):
            raise Refused(
                "bad manifest", f"path {reference!r} leaves the manifest's folder {base}; move the file there", segment
            )
        return base / reference

    def blob(self, reference: str, segment: int) -> bytes:
        """The bytes of one medium."""
        if reference in self.blobs:
            return self.blobs[reference]
        path = self.path(reference, segment)
        try:
            if path.stat().st_size > MAX_SAMPLE_BYTES:
                raise Refused("too large", f"{path} has more than {MAX_SAMPLE_BYTES} bytes; cut it", segment)
            return path.read_bytes()
        except FileNotFoundError:
            raise Refused(
                "missing file", f"{path} does not exist; check the path (it starts at {self.base})", segment
            ) from None
        except OSError as error:
            raise Refused("unreadable file", f"{path} cannot be read ({error.strerror})", segment) from error


def read_manifest(path: str | Path) -> Iterator[Record]:
    """One record per non-empty line of a JSONL manifest; a line that is not a JSON object becomes a record with `error`."""
    path = Path(path)
    with open(path, "rb") as file:
        for line, data in enumerate(file, start=1):
            if data.strip():
                where = f"{path} line {line}"
                try:
                    if len(data) > MAX_LINE_BYTES:
                        raise ValueError(f"{len(data)} bytes are more than {MAX_LINE_BYTES}; put arrays into .npy files")
                    spec = json.loads(data)
                    if not isinstance(spec, dict):
                        raise ValueError(f"a JSON object is needed, found {type(spec).__name__}")
                    yield Record(line, where, spec, path.parent)
                except (ValueError, RecursionError) as error:
                    yield Record(line, where, {}, path.parent, error=f"{where} is not a document: {error}")


def modality_of(segment: Any, where: str, number: int) -> str:
    """The one modality key of a manifest segment."""
    if not isinstance(segment, dict):
        raise Refused("bad manifest", f"{where}: segment {number} is {type(segment).__name__}, a JSON object is needed", number)
    found = [m.name for m in REGISTRY if m.name in segment]
    if len(found) != 1:
        known = ", ".join(m.name for m in REGISTRY)
        raise Refused(
            "bad manifest", f"{where}: segment {number} needs exactly one of {known}; it has {found or 'none'}", number
        )
    return found[0]


def explode(record: Record) -> tuple[dict[str, Any], Members]:
    """The object to store and its media members. Raises `Refused`."""
    if record.error:
        raise Refused("bad manifest", record.error)
    segments = record.spec.get("segments")
    if not isinstance(segments, list) or not segments:
        raise Refused("bad manifest", f"{record.where}: segments must be a list with at least one segment")
    members: Members = []
    stored = []
    for number, segment in enumerate(segments):
        modality = modality_of(segment, record.where, number)
        segment = dict(segment)
        value, more = _explode(record, modality, segment, number)
        stored.append({**segment, modality: value})
        members += more
    return {**record.spec, "segments": stored}, members


def _explode(record: Record, modality: str, segment: dict[str, Any], number: int) -> tuple[Any, Members]:
    value = segment[modality]
    if modality == "text":
        return value, []
    if isinstance(value, str):
        if modality in ("audio", "video") and value.lower().endswith(".npy"):
            return _explode_array(modality, _read_npy(record.blob(value, number), value, number), segment, number)
        if modality in ("sensor", "action") and value.lower().endswith(".csv"):
            return _explode_csv(modality, record.blob(value, number), value, segment, number)
        folder = None if value in record.blobs else record.path(value, number)
        if modality == "video" and folder is not None and folder.is_dir():
            from weft.tokenizers.media.video import _natural

            files = [f for f in folder.iterdir() if f.suffix.lower().lstrip(".") in SUFFIXES["image"]]
            value = [str(Path(value) / f.name) for f in sorted(files, key=_natural)]
            if not value:
                raise Refused("unreadable file", f"{folder} holds no {', '.join(SUFFIXES['image'])} frame", number)
        else:
            suffix = f"{number}.{_suffix(modality, value, number)}"
            return suffix, [(suffix, record.blob(value, number))]
    if modality == "video" and isinstance(value, list) and value and all(isinstance(v, str) for v in value):
        frames = [(f"{number}.{i}.{_suffix('image', v, number)}", record.blob(v, number)) for i, v in enumerate(value)]
        return [suffix for suffix, _ in frames], frames
    return _explode_array(modality, value, segment, number)


def _read_npy(data: bytes, name: str, number: int) -> np.ndarray:
    try:
        return np.lib.format.read_array(io.BytesIO(data), allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise Refused(
            "unreadable media", f"{name} is no readable .npy array ({error}); save it with numpy.save", number
        ) from error


def _explode_csv(modality: str, data: bytes, name: str, segment: dict[str, Any], number: int) -> tuple[Any, Members]:
    """A table as an array; what its header says stands in for channels and units that the manifest does not give."""
    try:
        array, channels, units = csv_table(data)
    except ValueError as error:
        raise Refused(
            "unreadable media", f"{name} is no table of numbers ({error}); put commas between them", number
        ) from error
    for key, names in (("channels", channels), ("units", units)):
        if modality == "sensor" and names and segment.get(key) is None:
            segment[key] = list(names)
    return _explode_array(modality, array, segment, number)


def _suffix(modality: str, name: str, number: int) -> str:
    suffix = Path(name).suffix.lower().lstrip(".")
    if suffix not in SUFFIXES[modality]:
        need = ", ".join((*SUFFIXES[modality], *TABLES.get(modality, ())))
        raise Refused("file type", f"{name} cannot be a segment of {modality}: {need} are read; convert it", number)
    return suffix


def _explode_array(modality: str, value: Any, segment: dict[str, Any], number: int) -> tuple[Any, Members]:
    """An array in the manifest: sensors and actions as .npy, pictures as PNG, sound as WAV, all without loss."""
    try:
        array = np.asarray(value)
        if array.dtype == object:
            array = np.asarray(value, np.float64)  # null is a missing reading
        if array.dtype.kind not in "buif":
            raise TypeError(f"dtype {array.dtype}")
    except (TypeError, ValueError) as error:
        raise Refused("bad values", f"segment {number}: {modality} is no regular array of numbers ({error})", number) from error
    if modality in ("sensor", "action"):
        if modality == "action" and array.dtype.kind == "f" and np.isfinite(array).all() and (array == np.floor(array)).all():
            array = array.astype(np.int64)  # as the manifest reader does
        if array.size <= INLINE:
            return _plain(array), []
        suffix = f"{number}.npy"
        return suffix, [(suffix, npy(array))]
    if modality == "image":
        return f"{number}.png", [(f"{number}.png", _png(array, number))]
    if modality == "video":
        frames = [(f"{number}.{i}.png", _png(frame, number)) for i, frame in enumerate(array)]
        return [name for name, _ in frames], frames
    rate_hz = segment.pop("rate_hz", None)  # the file says it
    return f"{number}.wav", [(f"{number}.wav", _wav(array, rate_hz, number))]


def _plain(array: np.ndarray) -> Any:
    """Nested lists with null where a reading is missing: NaN is no JSON."""
    if array.dtype.kind != "f":
        return array.astype(np.int64).tolist()
    holes = np.isnan(array)
    plain = array.astype(np.float64).astype(object)
    plain[holes] = None
    return plain.tolist()


def npy(array: np.ndarray) -> bytes:
    """The .npy file of an array, little-endian, C order."""
    out = io.BytesIO()
    array = np.ascontiguousarray(array)
    np.lib.format.write_array(out, array.astype(array.dtype.newbyteorder("<")), allow_pickle=False)
    return out.getvalue()


def _png(array: np.ndarray, number: int) -> bytes:
    import PIL.Image

    if array.dtype.kind == "f":
        if not (array.size and np.isfinite(array).all() and array.min() >= 0 and array.max() <= 1):
            raise Refused("bad values", f"segment {number}: float pixels must lie in [0, 1]", number)
        array = np.round(array * 255)
    if (
        array.ndim not in (2, 3)
        or (array.ndim == 3 and array.shape[2] not in (1, 3, 4))
        or array.min() < 0
        or array.max() > 255
    ):
        raise Refused(
            "bad values", f"segment {number}: pixels of shape {array.shape} must be [H W] or [H W C] in 0..255", number
        )
    array = array[..., 0] if array.ndim == 3 and array.shape[2] == 1 else array
    out = io.BytesIO()
    PIL.Image.fromarray(array.astype(np.uint8)).save(out, "PNG", compress_level=4)
    return out.getvalue()


def _wav(array: np.ndarray, rate_hz: Any, number: int) -> bytes:
    import soundfile

    if rate_hz is None:
        raise Refused("bad values", f"segment {number}: samples in the manifest need rate_hz", number)
    if array.dtype.kind in "ui":
        array = array / max(abs(float(np.iinfo(array.dtype).min)), float(np.iinfo(array.dtype).max))
    out = io.BytesIO()
    soundfile.write(out, array.astype(np.float32), int(rate_hz), format="WAV", subtype="FLOAT")
    return out.getvalue()


def restore(members: Mapping[str, bytes], where: str) -> Document:
    """The document of a sample: images, sound and clips as bytes, readings and actions as arrays. Raises `ManifestError`."""
    spec = json.loads(members["json"])
    document = load_document({**spec, "segments": [_without_media(s) for s in spec["segments"]]}, Path())
    attached = [_attach(s, raw, members) for s, raw in zip(document.segments, spec["segments"])]
    return replace(document, segments=tuple(attached))


def restore_segment(members: Mapping[str, bytes], number: int) -> Segment:
    """One segment of a sample; of the media only its own are needed. Raises `ManifestError`."""
    raw = json.loads(members["json"])["segments"][number]
    (segment,) = load_document({"segments": [_without_media(raw)]}, Path()).segments
    return _attach(segment, raw, members)


def _without_media(segment: Any) -> Any:
    """The manifest reader opens files; members are no files, so it gets a name and an array that always exist."""
    if isinstance(segment, dict):
        stand_in = {"image": ".", "audio": ".", "video": ".", "sensor": [0], "action": [0]}
        return {k: stand_in[k] if k in stand_in and _is_member(v) else v for k, v in segment.items()}
    return segment


def _is_member(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, list) and bool(value) and isinstance(value[0], str))


def _attach(segment: Any, raw: dict[str, Any], members: Mapping[str, bytes]) -> Any:
    """Put the bytes or the array of a member where its name stands."""
    value = raw[segment.modality]
    if segment.modality == "text" or not _is_member(value):
        return segment
    content: Any
    if segment.modality in ("sensor", "action"):
        content = np.lib.format.read_array(io.BytesIO(members[value]), allow_pickle=False)
    else:
        content = [members[v] for v in value] if isinstance(value, list) else members[value]
    return replace(segment, **{by_name()[segment.modality].content: content})
