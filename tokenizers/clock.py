"""Physical time: whatever a user calls a time becomes int64 nanoseconds, and nothing else is accepted.

In: int (ns), float (seconds), datetime with a time zone, alone or one per reading. Out: ns on the document's clock.

`Segment.times` stand on the document's clock when the segment has no `start`; with a `start`, numbers count from the start and
datetimes keep their own meaning. Equal neighbours are legal (events on a coarse clock), a step backwards is not.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np

from weft.tokenizers.segment import Segment

NS = 1_000_000_000
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_LIMIT = 1 << 62


class ClockError(ValueError):
    """A time that is naive, not finite, out of range or out of order."""


def to_ns(time: Any, name: str) -> int:
    """Nanoseconds of one user time: int = ns, float = seconds, datetime = since 1970 in UTC. `name` is for the error."""
    if isinstance(time, (bool, np.bool_)):
        raise ClockError(
            f"{name}: time {time!r} is a truth value; give ns (int), seconds (float) or a datetime with a time zone"
        )
    if isinstance(time, (int, np.integer)):
        ns = int(time)
    elif isinstance(time, (float, np.floating)):
        if not math.isfinite(time):
            raise ClockError(f"{name}: time {time!r} is not finite; drop the reading or give it a time")
        ns = _seconds(float(time))
    elif isinstance(time, datetime):
        if time.utcoffset() is None:
            raise ClockError(f"{name}: {time.isoformat()} has no time zone; add one, for example tzinfo=timezone.utc")
        ns = (time - _EPOCH) // timedelta(microseconds=1) * 1000
    else:
        kind = type(time).__name__
        raise ClockError(f"{name}: time {time!r} is a {kind}; give ns (int), seconds (float) or a datetime with a time zone")
    if not -_LIMIT < ns < _LIMIT:
        raise ClockError(f"{name}: time {time!r} is beyond 146 years; an int means nanoseconds, a float means seconds")
    return ns


def _seconds(time: float) -> int:
    """Seconds to ns through whole and fraction, so that epoch seconds keep the digits that the float has."""
    whole = math.floor(time)
    return whole * NS + round((time - whole) * NS)


def rate_times(rate_hz: float, count: int, name: str) -> np.ndarray:
    """int64 [count]: ns of readings 0 .. count - 1 at `rate_hz`, each rounded once (no drift)."""
    if isinstance(rate_hz, bool) or not isinstance(rate_hz, (int, float, np.integer, np.floating)):
        raise ClockError(f"{name}: rate_hz={rate_hz!r} is not a number; give readings per second")
    if not math.isfinite(rate_hz) or rate_hz <= 0:
        raise ClockError(f"{name}: rate_hz={rate_hz!r} must be above zero and finite; give readings per second")
    if count and (count - 1) / rate_hz > _LIMIT / NS:
        raise ClockError(f"{name}: {count} readings at rate_hz={rate_hz} last longer than 146 years; check the rate's unit")
    index = np.arange(count, dtype=np.int64)
    if float(rate_hz).is_integer() and count < _LIMIT // NS and rate_hz < NS:
        return (index * NS + int(rate_hz) // 2) // int(rate_hz)
    return np.rint(index.astype(np.longdouble) * (np.longdouble(NS) / np.longdouble(rate_hz))).astype(np.int64)


def label(segment: Segment) -> str:
    """How errors call a segment."""
    return f"{segment.modality} segment {segment.name!r}" if segment.name else f"{segment.modality} segment"


def segment_start(segment: Segment) -> int | None:
    """ns on the document's clock, or None for a segment without a clock: `start`, else the first of its own times."""
    if segment.start is not None:
        return to_ns(segment.start, f"{label(segment)}, start")
    times = _times(segment)
    if times is None or len(times) == 0:
        return None
    return to_ns(times[0], f"{label(segment)}, times[0]")


def segment_times(segment: Segment, count: int) -> np.ndarray:
    """int64 [count]: ns after the segment's start of its `count` readings or frames, never decreasing.

    Raises ClockError where neither `times` nor `rate_hz` is given and count > 1, where both are, where the number of times is
    not `count`, or where they go backwards.
    """
    name = label(segment)
    times = _times(segment)
    rate_hz = getattr(segment, "rate_hz", None)
    if times is not None and rate_hz is not None:
        raise ClockError(f"{name}: has both times and rate_hz={rate_hz}; keep the one that is measured")
    if times is not None:
        return _own_times(segment, times, count, name)
    if rate_hz is not None:
        return rate_times(rate_hz, count, name)
    if count <= 1:
        return np.zeros(count, np.int64)
    raise ClockError(f"{name}: {count} readings have no clock; give rate_hz (readings per second) or one time per reading")


def _times(segment: Segment) -> Sequence[Any] | None:
    """`segment.times`, with a torch tensor turned into numpy."""
    times: Any = getattr(segment, "times", None)
    return times.numpy() if hasattr(times, "numpy") else times


def _own_times(segment: Segment, times: Sequence[Any], count: int, name: str) -> np.ndarray:
    if len(times) != count:
        raise ClockError(f"{name}: {len(times)} times for {count} readings; give exactly one time per reading")
    if count == 0:
        return np.zeros(0, np.int64)
    start = segment_start(segment)
    assert start is not None
    ns = _many(times, name)
    absolute = segment.start is None or isinstance(times[0], datetime)
    offset = ns - start if absolute else ns
    if offset[0] < 0:
        raise ClockError(
            f"{name}: times[0] lies {-int(offset[0])} ns before the start; times count from start where one is given"
        )
    back = np.flatnonzero(np.diff(offset) < 0)
    if len(back):
        at = int(back[0]) + 1
        raise ClockError(
            f"{name}: times[{at}]={times[at]!r} lies before times[{at - 1}]={times[at - 1]!r}; sort the readings by time"
        )
    return offset


def _many(times: Sequence[Any], name: str) -> np.ndarray:
    """int64 [n]: all of one kind, numbers in one vectorised step."""
    if isinstance(times, np.ndarray) and times.dtype.kind in "iu":
        return times.astype(np.int64)
    if isinstance(times, np.ndarray) and times.dtype.kind == "f" and _reasonable(times):
        whole = np.floor(times)
        return whole.astype(np.int64) * NS + np.rint((times - whole) * NS).astype(np.int64)
    kinds = {_kind(time) for time in times}
    if len(kinds) > 1:
        raise ClockError(
            f"{name}: times mix {' and '.join(sorted(kinds))}; an int means ns and a float seconds, so use one kind"
        )
    return np.array([to_ns(time, f"{name}, times[{i}]") for i, time in enumerate(times)], dtype=np.int64)


def _reasonable(seconds: np.ndarray) -> bool:
    return bool(np.isfinite(seconds).all() and (np.abs(seconds) < _LIMIT / NS).all())


def _kind(time: Any) -> str:
    if isinstance(time, (float, np.floating)):
        return "seconds (float)"
    if isinstance(time, (int, np.integer)):
        return "ns (int)"
    return "datetimes" if isinstance(time, datetime) else type(time).__name__
