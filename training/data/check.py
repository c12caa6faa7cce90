"""Is a sample usable? Every medium is decoded once, before it enters a shard, and counted.

In: the members of a sample. Out: counts per modality (segments, bytes, seconds, cells), or `Refused` with the segment
and reason. Cells: characters of text, pixels of images, pixels of kept video frames (10 per second, longer side 256),
samples of audio at 16 kHz, values of sensors and actions.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from weft.tokenizers.clock import ClockError, segment_times
from weft.tokenizers.media.errors import MediaError
from weft.tokenizers.segment import Action, Document, Segment, Sensor
from weft.training.data.index import SPLITS
from weft.training.data.records import Refused, restore

MAX_TEXT_BYTES = 4 * 2**20
MAX_READINGS, MAX_CHANNELS = 10**6, 512
AUDIO_HZ = 16_000
Counts = dict[str, dict[str, float]]


def check_sample(members: Mapping[str, bytes], where: str) -> Counts:
    """Counts of an intact sample. Raises `Refused`."""
    try:
        document = restore(members, where)
    except Refused:
        raise
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise Refused("bad manifest", f"{where}: {error}") from error
    counts: Counts = {}
    for number, segment in enumerate(document.segments):
        try:
            seconds, cells = measure(segment)
        except (MediaError, ClockError) as error:
            reason = "bad times" if isinstance(error, ClockError) else "unreadable media"
            raise Refused(reason, f"{where}: segment {number}: {error}", number) from error
        except (ValueError, TypeError) as error:
            raise Refused("bad values", f"{where}: segment {number}: {error}", number) from error
        count = counts.setdefault(segment.modality, {"segments": 0, "bytes": 0, "seconds": 0.0, "cells": 0})
        count["segments"] += 1
        count["bytes"] += content_bytes(number, segment, members)
        count["seconds"] = round(count["seconds"] + seconds, 6)
        count["cells"] += cells
    return counts


def content_bytes(number: int, segment: Segment, members: Mapping[str, bytes]) -> int:
    """Stored bytes of one segment's medium."""
    if segment.modality == "text":
        return len(segment.text.encode("utf-8", "surrogatepass"))  # type: ignore[attr-defined]
    return sum(len(data) for suffix, data in members.items() if suffix.startswith(f"{number}."))


def measure(segment: Any) -> tuple[float, int]:
    """(seconds, cells) of one segment, its media decoded."""
    if segment.modality == "text":
        return 0.0, _text(segment.text)
    if segment.modality == "image":
        from weft.tokenizers.media.image import load_image

        pixels = load_image(segment.pixels)
        return 0.0, pixels.shape[0] * pixels.shape[1]
    if segment.modality == "audio":
        from weft.tokenizers.media.audio import read_audio

        samples, rate_hz = read_audio(segment.samples, segment.rate_hz)
        return len(samples) / rate_hz, round(len(samples) / rate_hz * AUDIO_HZ)
    if segment.modality == "video":
        from weft.tokenizers.media.video import load_video

        frames, clock = load_video(segment.frames, max_side=256, max_rate_hz=10.0)
        clock = segment_times(segment, len(frames)) if clock is None else clock
        return _seconds(clock), int(np.prod(frames.shape[:3]))
    if segment.modality in ("sensor", "action"):
        return _readings(segment)
    return 0.0, 0


def _text(text: str) -> int:
    size = len(text.encode("utf-8", "surrogatepass"))
    if size > MAX_TEXT_BYTES:
        raise ValueError(f"text of {size} bytes is longer than {MAX_TEXT_BYTES}; split it into documents")
    return len(text)


def _readings(segment: Sensor | Action) -> tuple[float, int]:
    values = np.asarray(segment.values)
    values = values[:, None] if values.ndim == 1 else values
    if values.ndim != 2 or values.dtype.kind not in "buif" or not len(values):
        raise ValueError(
            f"{segment.modality} values have shape {values.shape} and dtype {values.dtype}; give numbers [N channels]"
        )
    if len(values) > MAX_READINGS or values.shape[1] > MAX_CHANNELS:
        raise ValueError(
            f"{segment.modality} values {values.shape} exceed {MAX_READINGS} readings x {MAX_CHANNELS} channels; split them"
        )
    if np.isinf(values).any() or (isinstance(segment, Action) and np.isnan(values).any()):
        raise ValueError(f"{segment.modality} values are not finite; NaN may stand for a missing sensor reading, nothing else")
    if isinstance(segment, Action):
        _action(values, segment)
    elif segment.channels is not None and len(segment.channels) != values.shape[1]:
        raise ValueError(f"sensor has {values.shape[1]} channels and {len(segment.channels)} channel names")
    return _seconds(segment_times(segment, len(values))), values.size


def _action(values: np.ndarray, segment: Action) -> None:
    space = segment.space
    if values.shape[1] != space.dims:
        raise ValueError(f"actions have {values.shape[1]} dimensions, their space has {space.dims}")
    if space.n is not None:
        if (values != np.round(values)).any() or values.min() < 0 or values.max() >= space.n:
            raise ValueError(f"actions {values.min():g}..{values.max():g} are no integers from 0 to {space.n - 1}")
    elif (values < np.array(space.low)).any() or (values > np.array(space.high)).any():
        raise ValueError(f"actions leave their space: low {space.low}, high {space.high}")


def _seconds(times: np.ndarray) -> float:
    """From the first reading to the last, one mean interval added."""
    if len(times) < 2:
        return 0.0
    return float(times[-1] - times[0]) / 1e9 * len(times) / (len(times) - 1)


def about(spec: Mapping[str, Any], where: str, default_split: str = "train") -> dict[str, Any]:
    """Split, source, task and pair of a manifest object; wrong types and unknown splits are refused."""
    split = spec.get("split") or default_split
    split = {"validation": "val", "dev": "val", "valid": "val"}.get(split, split) if isinstance(split, str) else split
    if split not in SPLITS:
        raise Refused("bad manifest", f"{where}: split {split!r} must be one of {', '.join(SPLITS)}")
    metadata = spec.get("metadata") or {}
    if not isinstance(metadata, dict):
        raise Refused("bad manifest", f"{where}: metadata must be a JSON object, found {type(metadata).__name__}")
    pair = spec.get("pair")
    task = metadata.get("task", "")
    return {
        "split": split,
        "source": str(spec.get("source") or ""),
        "task": str(task),
        "pair": None if pair is None else str(pair),
    }


__all__ = ["Counts", "Document", "about", "check_sample", "measure"]
