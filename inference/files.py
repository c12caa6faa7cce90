"""Prompts from files, replies to files: what the command line needs of inference.

In: strings that are text or name files. Out: segments by suffix, in the same order. Back: every segment of a reply as one
file with a name that says what it is: `reply-0-text.txt`, `reply-1-image.png`, `reply-2-audio.wav`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from weft.inference.errors import PromptError
from weft.tokenizers.numbers import Names, csv_table
from weft.tokenizers.segment import Action, Audio, Image, Segment, Sensor, Text, Video

if TYPE_CHECKING:
    from weft.inference.reply import Reply

IMAGE = (".png", ".jpg", ".jpeg", ".webp")
AUDIO = (".wav", ".flac", ".ogg")
VIDEO = (".mp4", ".mov", ".mkv", ".webm")
TEXT = (".txt", ".md")
TABLE = (".npy", ".csv")
MEDIA = IMAGE + AUDIO + VIDEO + TEXT + TABLE + (".json",)


def read_prompt(items: Sequence[str], rate_hz: float | None = None, kind: str = "default") -> list[Segment]:
    """Segments from strings: a name of a file is read by its suffix, anything else is text.

    `rate_hz` is the rate of sensor tables and of frame folders, `kind` the fitted scaling of the sensor. A name with a
    known suffix that does not exist and a file of another kind are refused, so that neither becomes a text prompt.
    """
    if not items:
        raise PromptError("the prompt is empty; give a text or the name of a file")
    return [segment for item in items for segment in _read(item, rate_hz, kind)]


def _read(item: str, rate_hz: float | None, kind: str) -> list[Segment]:
    suffix = Path(item).suffix.lower() if len(item) < 4096 and "\n" not in item else ""
    if suffix not in MEDIA:
        may_be_path = bool(item) and len(item) < 256 and "\x00" not in item
        if suffix and may_be_path and Path(item).is_file():
            raise PromptError(f"{item} is a file of a kind that is not read; convert it to one of {' '.join(MEDIA)}")
        is_folder = may_be_path and Path(item).is_dir()
        return [Video(item, rate_hz=_needed(rate_hz, item))] if is_folder else [Text(item)]
    path = Path(item)
    if not path.is_file():
        raise PromptError(f"no file {item}; check the name, or drop the suffix {suffix} if you mean it as text")
    name = path.name
    if suffix in IMAGE:
        return [Image(str(path), name=name)]
    if suffix in AUDIO:
        return [Audio(str(path), name=name)]
    if suffix in VIDEO:
        return [Video(str(path), name=name)]
    if suffix in TEXT:
        return [Text(_text(path), name=name)]
    if suffix in TABLE:
        values, channels, units = _table(path)
        return [Sensor(values, _needed(rate_hz, item), channels=channels, units=units, kind=kind, name=name)]
    return _manifest(path)


def _needed(rate_hz: float | None, item: str) -> float:
    if rate_hz is None:
        raise PromptError(f"{item} has no rate of its own; say how many readings or frames a second it has (--rate-hz)")
    return rate_hz


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (UnicodeDecodeError, OSError) as error:
        raise PromptError(f"{path} is not readable UTF-8 text ({error}); convert it first") from error


def _table(path: Path) -> tuple[np.ndarray, Names, Names]:
    """Readings [N C], channels and units; .npy has no names."""
    try:
        if path.suffix.lower() == ".npy":
            return np.asarray(np.load(path, allow_pickle=False), np.float64), None, None
        return csv_table(path.read_bytes())
    except (ValueError, OSError, EOFError) as error:
        raise PromptError(f"{path} is not a table of readings ({error}); save [N channels] numbers") from error


def _manifest(path: Path) -> list[Segment]:
    """The segments of a document manifest (one JSON object)."""
    from weft.tokenizers.manifest import load_document

    try:
        line = json.loads(_text(path))
    except json.JSONDecodeError as error:
        raise PromptError(f"{path} is not a document manifest: line {error.lineno}: {error.msg}") from error
    return list(load_document(line, path.parent).segments)


def save_reply(reply: Reply, folder: str | Path, stem: str = "reply") -> list[Path]:
    """Write every segment of a reply into `folder` and say where: text, PNG, WAV, a folder of frames, CSV."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    return [save_segment(s, folder / f"{stem}-{i}-{s.modality}") for i, s in enumerate(reply.segments)]


def save_segment(segment: Segment, base: Path) -> Path:
    """Write one segment beside `base`, with the suffix of its kind."""
    if isinstance(segment, Text):
        path = base.with_suffix(".txt")
        path.write_text(segment.text, encoding="utf-8")
    elif isinstance(segment, Image):
        path = base.with_suffix(".png")
        picture(segment.pixels).save(path)
    elif isinstance(segment, Audio):
        import soundfile

        path = base.with_suffix(".wav")
        soundfile.write(path, np.clip(np.asarray(segment.samples, np.float32), -1.0, 1.0), int(segment.rate_hz or 16_000))
    elif isinstance(segment, Video):
        path = base
        path.mkdir(exist_ok=True)
        for i, frame in enumerate(np.asarray(segment.frames)):
            picture(frame).save(path / f"{i:04d}.png")
    elif isinstance(segment, Sensor | Action):
        path = base.with_suffix(".csv")
        _write_table(segment, path)
    else:
        raise PromptError(f"no file format for a {segment.modality} segment")
    return path


def picture(pixels: Any) -> Any:
    """A PIL image from [H W] or [H W C], uint8 or float 0..1."""
    from PIL import Image as Pillow

    array = np.asarray(pixels)
    if array.dtype.kind == "f":
        array = np.clip(np.rint(array * 255.0), 0, 255)
    array = array.astype(np.uint8)
    return Pillow.fromarray(array[..., 0] if array.ndim == 3 and array.shape[2] == 1 else array)


def _write_table(segment: Sensor | Action, path: Path) -> None:
    values = np.asarray(segment.values)
    values = values[:, None] if values.ndim == 1 else values
    word = "channel" if isinstance(segment, Sensor) else "dimension"
    names = getattr(segment, "channels", None) or [f"{word} {c}" for c in range(values.shape[1])]
    units = getattr(segment, "units", None)
    header = [f"{name} [{unit}]" for name, unit in zip(names, units)] if units else list(names)
    np.savetxt(path, values, delimiter=",", header=",".join(header), comments="", fmt="%.9g")
