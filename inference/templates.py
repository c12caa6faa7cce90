"""What a segment that is still to be written looks like: its times and places, without its codes.

In: a modality, a grid, a rate. Out: `Tokens` with zero codes. Positions in a stream follow from times and places alone, so a
stream built from a template has the positions of the real one, token by token, up to where the real one ends.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from weft.tokenizers.base import Tokens
from weft.tokenizers.clock import rate_times
from weft.tokenizers.image import raster
from weft.tokenizers.registry import Modality
from weft.tokenizers.segment import Action, Audio, Image, Segment, Sensor, Text, Video

EMPTY: Mapping[str, Segment] = {
    "text": Text(""),
    "image": Image(None),
    "video": Video(None),
    "audio": Audio(None),
    "sensor": Sensor(None),
    "action": Action(None),
}
"""A segment of each modality without content."""


def template(
    entry: Modality, tokenizer: Any, shape: tuple[int, ...], length: int, rate_hz: float | None, together: bool = False
) -> Tokens:
    """`length` body tokens of modality `entry`, whose opening tokens state `shape`.

    `rate_hz` is frames, readings or steps a second; None puts them all at the segment's start. `together`: the codes of one
    compressed chunk, which have neither times nor channels of their own.
    """
    zeros = np.zeros(length, np.int64)
    if entry.place == "grid":
        frames, h, w = (1, *shape)[-3:]
        time = np.repeat(_times(rate_hz, frames, entry.name), h * w)
        return Tokens(zeros, shape, time, place=np.tile(raster(h, w), (frames, 1)), group=h * w)
    if together:
        return Tokens(zeros, (1, *shape), zeros, group=max(length, 1))
    if entry.place == "channel":
        (unit,) = shape
        steps = -(-length // unit)
        channel = np.tile(np.arange(unit, dtype=np.int32), steps)[:length]
        time = np.repeat(_times(rate_hz, steps, entry.name), unit)[:length]
        place = np.stack([channel, np.zeros_like(channel)], 1)
        return Tokens(zeros, (steps, unit), time, place=place, group=unit if length == steps * unit else 1)
    # Sound runs at its tokenizer's own rate; text has no clock inside.
    time = tokenizer.times(length) if hasattr(tokenizer, "times") else zeros
    return Tokens(zeros, (length,), time)


def _times(rate_hz: float | None, count: int, modality: str) -> np.ndarray:
    return np.zeros(count, np.int64) if rate_hz is None else rate_times(rate_hz, count, f"produced {modality}")
