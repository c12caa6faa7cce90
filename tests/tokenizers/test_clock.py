"""Times are exact, and what is ambiguous, naive or out of order is refused by name."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta, timezone
from zoneinfo import ZoneInfo

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from weft.tokenizers.clock import NS, ClockError, rate_times, segment_start, segment_times, to_ns
from weft.tokenizers.segment import Sensor, Text

YEAR = 365 * 86_400 * NS


@given(st.integers(-(2**61), 2**61))
def test_integers_are_nanoseconds_and_stay_exact(ns: int) -> None:
    assert to_ns(ns, "x") == to_ns(np.int64(ns), "x") == ns


@given(st.integers(0, 4 * 10**12))
def test_seconds_keep_every_millisecond(ms: int) -> None:
    assert abs(to_ns(ms / 1000, "x") - ms * 1_000_000) <= 500  # a double of epoch size resolves 0.24 us


@given(st.datetimes(min_value=datetime(1950, 1, 1), max_value=datetime(2100, 1, 1)), st.integers(-12, 14))
def test_dates_are_exact_in_any_zone(date: datetime, hours: int) -> None:
    aware = date.replace(tzinfo=timezone(timedelta(hours=hours)))
    back = datetime(1970, 1, 1, tzinfo=UTC) + timedelta(microseconds=to_ns(aware, "x") / 1000)
    assert abs(back - aware) <= timedelta(microseconds=1)


def test_the_hour_that_happens_twice_is_two_hours() -> None:
    berlin = ZoneInfo("Europe/Berlin")
    first = datetime(2024, 10, 27, 2, 30, tzinfo=berlin)
    assert to_ns(first.replace(fold=1), "x") - to_ns(first, "x") == 3600 * NS


@pytest.mark.parametrize(
    ("time", "message"),
    [
        (datetime(2024, 1, 1), "no time zone"),
        (float("nan"), "not finite"),
        (float("inf"), "not finite"),
        (True, "truth value"),
        ("2024-01-01", "is a str"),
        (None, "NoneType"),
        (1e12, "146 years"),
        (2**63, "146 years"),
        (np.datetime64("2024-01-01"), "datetime64"),
    ],
)
def test_what_is_no_time_is_refused_with_its_name(time: object, message: str) -> None:
    with pytest.raises(ClockError, match=f"wheel.*{message}"):
        to_ns(time, "wheel")


@given(st.floats(1e-3, 1e6), st.integers(1, 200))
def test_a_rate_never_drifts(rate_hz: float, count: int) -> None:
    times = rate_times(rate_hz, count, "x")
    assert len(times) == count and times[0] == 0 and (np.diff(times) >= 0).all()
    assert abs(int(times[-1]) - (count - 1) * 1e9 / rate_hz) <= 1 + (count - 1) * 1e9 / rate_hz * 1e-15


def test_a_day_at_three_hertz_ends_on_the_nanosecond() -> None:
    times = rate_times(3.0, 3 * 86_400 + 1, "x")
    assert times[-1] == 86_400 * NS and set(np.diff(times)) <= {333333333, 333333334}


@pytest.mark.parametrize("rate", [0.0, -1.0, float("nan"), float("inf"), True, "10"])
def test_a_rate_that_is_none_is_refused(rate: object) -> None:
    with pytest.raises(ClockError, match="rate_hz"):
        rate_times(rate, 3, "x")  # type: ignore[arg-type]


def test_a_rate_in_the_wrong_unit_is_noticed() -> None:
    with pytest.raises(ClockError, match="146 years"):
        rate_times(1e-9, 100, "x")


@pytest.mark.parametrize("kind", ["tuple", "float array", "int array", "tensor", "dates"])
def test_own_times_may_be_any_one_kind(kind: str) -> None:
    seconds = [10.0, 10.25, 12.5]
    times: object = {
        "tuple": tuple(seconds),
        "float array": np.array(seconds),
        "int array": np.array([int(s * NS) for s in seconds]),
        "tensor": torch.tensor(seconds, dtype=torch.float64),
        "dates": [datetime(1970, 1, 1, tzinfo=UTC) + timedelta(seconds=s) for s in seconds],
    }[kind]
    sensor = Sensor(values=None, times=times)  # type: ignore[arg-type]
    assert segment_start(sensor) == 10 * NS
    assert segment_times(sensor, 3).tolist() == [0, NS // 4, 5 * NS // 2]


def test_times_count_from_the_start_where_there_is_one() -> None:
    sensor = Sensor(values=None, start=5.0, times=[0.5, 1.0])
    assert segment_start(sensor) == 5 * NS and segment_times(sensor, 2).tolist() == [NS // 2, NS]
    noon = datetime(2024, 1, 1, 12, tzinfo=UTC)
    sensor = Sensor(values=None, start=noon, times=[noon, noon + timedelta(seconds=1)])
    assert segment_times(sensor, 2).tolist() == [0, NS]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"times": [1.0, 2.0]}, "2 times for 3 readings"),
        ({"times": [1.0, 3.0, 2.0]}, r"times\[2\]=2.0 lies before times\[1\]=3.0"),
        ({"times": [1.0, 2, 3.0]}, "times mix ns .int. and seconds"),
        ({"times": [1.0, float("nan"), 3.0]}, "not finite"),
        ({"times": np.array([1.0, np.nan, 3.0])}, "not finite"),
        ({"times": [datetime(2024, 1, 1)] * 3}, "no time zone"),
        ({"times": [0.0, 1.0, 2.0], "rate_hz": 1.0}, "both times and rate_hz"),
        ({"times": [-1.0, 1.0, 2.0], "start": 5.0}, "before the start"),
        ({}, "3 readings have no clock"),
    ],
)
def test_times_that_do_not_fit_are_refused_with_the_segments_name(fields: dict, message: str) -> None:
    with pytest.raises(ClockError, match=f"sensor segment 'imu'.*{message}"):
        segment_times(Sensor(values=None, name="imu", **fields), 3)


def test_one_reading_needs_no_clock_and_equal_times_are_legal() -> None:
    assert segment_times(Sensor(values=None), 1).tolist() == [0]
    assert segment_times(Sensor(values=None, times=[3, 3, 4]), 3).tolist() == [0, 0, 1]
    assert segment_start(Text(text="a")) is None and segment_start(Sensor(values=None, times=[])) is None
