"""Times as the user writes them -> int64 nanoseconds: the only place where units of time are decided.

`int` is nanoseconds, `float` is seconds, `datetime` must carry a time zone (nanoseconds since 1970 UTC).
Numbers in `times` count from the segment's `start`; datetimes in `times`, and any times without a `start`, are absolute.
"""

from __future__ import annotations

import math
from datetime import UTC, datetime
from typing import Any

import numpy as np

from weft.tokenizers.segment import Segment, Time

SECOND = 1_000_000_000
LIMIT = 1 << 61
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


class TimeError(ValueError):
    """A time that cannot be placed on the document's clock."""


def label(segment: Segment) -> str:
    """How errors call a segment: its modality and, where it has one, its name."""
    return segment.modality + (f" segment {segment.name!r}" if segment.name else " segment")


def to_ns(time: Time | Any, where: str = "time") -> int:
    """One time in int nanoseconds; `where` names it in the error."""
    if isinstance(time, datetime):
        if time.tzinfo is None or time.utcoffset() is None:
            raise TimeError(f"{where}: {time.isoformat()} has no time zone; give one, for example tzinfo=datetime.UTC")
        delta = time - _EPOCH
        return (delta.days * 86_400 + delta.seconds) * SECOND + delta.microseconds * 1_000
    if isinstance(time, bool | np.bool_) or not isinstance(time, int | float | np.integer | np.floating):
        raise TimeError(f"{where}: {time!r} is not a time; give int ns, float seconds or an aware datetime")
    if isinstance(time, float | np.floating):
        if not math.isfinite(time):
            raise TimeError(f"{where}: {time!r} is not finite; drop the reading or give its time")
        time = round(float(time) * SECOND)
    if not -LIMIT < int(time) < LIMIT:
        raise TimeError(f"{where}: {time!r} is beyond +-{LIMIT} ns (73 years); an int is ns, a float is seconds")
    return int(time)


def segment_start(segment: Segment) -> int | None:
    """When the segment begins, in ns on the document's clock; None where it has no clock."""
    if segment.start is not None:
        return to_ns(segment.start, f"{label(segment)} start")
    times = getattr(segment, "times", None)
    return None if times is None or len(times) == 0 else to_ns(times[0], f"{label(segment)} times[0]")


def segment_times(segment: Segment, count: int) -> np.ndarray:
    """int64 [count]: ns after the segment's start at which its `count` readings, frames or steps happen."""
    times, rate_hz = getattr(segment, "times", None), getattr(segment, "rate_hz", None)
    if times is not None and rate_hz is not None:
        raise TimeError(f"{label(segment)} has both rate_hz and times; give one of them")
    if rate_hz is not None:
        return rate_times(rate_hz, count, label(segment))
    if times is None:
        if count > 1 and segment.start is not None:
            raise TimeError(f"{label(segment)} has a start and {count} readings; give rate_hz or one time per reading")
        return np.zeros(count, np.int64)
    if len(times) != count:
        raise TimeError(f"{label(segment)} has {len(times)} times for {count} readings; give one time per reading")
    origin = segment_start(segment) or 0
    offset = [to_ns(t, f"{label(segment)} times[{i}]") for i, t in enumerate(times)]
    absolute = np.array([segment.start is None or isinstance(t, datetime) for t in times], bool)
    ns = np.array(offset, np.int64) - np.where(absolute, origin, 0)
    back = np.flatnonzero(np.diff(ns) < 0)
    if len(back):
        i = int(back[0]) + 1
        raise TimeError(
            f"{label(segment)} times[{i}] lies {ns[i - 1] - ns[i]} ns before times[{i - 1}]; sort the readings by time"
        )
    return ns


def rate_times(rate_hz: float, count: int, where: str) -> np.ndarray:
    """int64 [count]: k / rate_hz in nanoseconds, rounded."""
    if not (isinstance(rate_hz, int | float | np.integer | np.floating) and math.isfinite(rate_hz) and rate_hz > 0):
        raise TimeError(f"{where}: rate_hz={rate_hz!r} must be a finite number of readings per second above 0")
    if count / rate_hz * SECOND >= LIMIT:
        raise TimeError(f"{where}: {count} readings at {rate_hz} Hz last more than 73 years; check rate_hz")
    return np.round(np.arange(count, dtype=np.float64) * (SECOND / float(rate_hz))).astype(np.int64)
