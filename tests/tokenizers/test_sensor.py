"""Sensor tokenizer: half a bin at most, never out of the span, missing is a token, units are held."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from weft.tokenizers.base import Tokenizer
from weft.tokenizers.files import TokenizerError
from weft.tokenizers.scaling import Method, Scaling, bin_centres, fit_scaling, to_bins
from weft.tokenizers.segment import Sensor, Text
from weft.tokenizers.sensor import SensorConfig, SensorTokenizer

METHODS: tuple[Method, ...] = ("quantile", "mu_law", "linear")
FLOATS = st.floats(allow_nan=True, allow_infinity=True)
FINITE = st.floats(allow_nan=False, allow_infinity=False)


def tokenizer(method: Method = "linear", bins: int = 1024) -> SensorTokenizer:
    """One channel fitted on [-1, 1], and an "imu" of three very different ones."""
    random = np.random.default_rng(0)
    out = SensorTokenizer(SensorConfig(bins=bins)).fit("unit", [np.linspace(-1, 1, 4001)], method=method)
    imu = [random.standard_normal((97, 3)) * [1, 1000, 1e-6] + [0, 101325, 0] for _ in range(3)]
    return out.fit("imu", imu, channels=("gyro", "pressure", "field"), units=("rad/s", "Pa", "T"), method=method)


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(METHODS), st.integers(2, 3000), st.lists(st.floats(-1, 1), min_size=1, max_size=20))
def test_the_round_trip_error_is_at_most_half_a_bin(method: Method, bins: int, values: list[float]) -> None:
    scaling = fit_scaling(np.linspace(-1, 1, 501), method)
    scaled = scaling.scale(np.array(values))
    codes = to_bins(scaled, bins)
    assert codes.min() >= 0 and codes.max() < bins
    assert np.abs(scaling.scale(scaling.unscale(bin_centres(codes, bins))) - scaled).max() <= 1 / bins + 1e-9


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(METHODS), st.lists(FINITE, max_size=30), st.lists(FLOATS, min_size=1, max_size=30))
def test_any_fit_and_any_value_stay_in_the_span(method: Method, fitted_on: list[float], values: list[float]) -> None:
    sensor = SensorTokenizer(SensorConfig(bins=17)).fit("k", [np.array(fitted_on, np.float64)], method=method)
    tokens = sensor.encode(Sensor(np.array(values), rate_hz=3, kind="k"))
    missing = np.isnan(values)
    assert np.array_equal(tokens.codes == 17, missing)
    assert tokens.codes.min() >= 0 and tokens.codes.max() <= 17
    assert tokens.features is not None and np.isfinite(tokens.features).all() and np.abs(tokens.features).max() <= 1
    decoded = sensor.decode(tokens.codes, tokens.grid).values[:, 0]
    assert np.array_equal(np.isnan(decoded), missing)
    again = sensor.encode(Sensor(decoded, rate_hz=3, kind="k"))
    assert np.array_equal(again.codes, tokens.codes), "decoding gives the bin's centre, so encoding it again changes nothing"


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(METHODS), st.lists(FINITE.filter(lambda x: abs(x) < 1e100), min_size=2, max_size=40))
def test_scaling_never_turns_the_order_of_values_around(method: Method, values: list[float]) -> None:
    scaling = fit_scaling(np.array(values), method)
    scaled = scaling.scale(np.sort(values))
    assert (np.diff(scaled) >= -1e-12).all() and scaled[0] >= -1 and scaled[-1] <= 1


@pytest.mark.parametrize("method", METHODS)
def test_plus_and_minus_one_and_infinity_are_the_outer_bins(method: Method) -> None:
    values = [1.0, -1.0, np.inf, -np.inf, 7.0, -7.0, np.nan]
    codes = tokenizer(method).encode(Sensor(values, rate_hz=10, kind="unit")).codes
    assert codes.tolist() == [1023, 0, 1023, 0, 1023, 0, 1024]


@pytest.mark.parametrize("method", METHODS)
def test_every_bin_is_in_use(method: Method) -> None:
    """The classic mu-law of mu=100, M=256 reaches 464 of 1024 bins on [-1, 1]."""
    values = np.concatenate([np.linspace(-1, 1, 200_001), np.geomspace(1e-6, 1, 20_000), -np.geomspace(1e-6, 1, 20_000)])
    assert len(np.unique(tokenizer(method).encode(Sensor(values, rate_hz=1, kind="unit")).codes)) == 1024


def test_quantiles_spread_a_skewed_channel_over_the_bins() -> None:
    values = np.random.default_rng(0).lognormal(0, 2, 20_000)
    share = {}
    for method in METHODS:
        codes = (
            SensorTokenizer(SensorConfig(bins=64))
            .fit("k", [values], method=method)
            .encode(Sensor(values, rate_hz=1, kind="k"))
            .codes
        )
        share[method] = np.bincount(codes, minlength=64).max() / len(codes)
    assert share["quantile"] < 0.03 < share["linear"]


def test_tokens_run_reading_by_reading_and_channel_by_channel() -> None:
    values = np.random.default_rng(1).standard_normal((5, 3)) * [1, 1000, 1e-6] + [0, 101325, 0]
    values[2, 1] = np.nan
    tokens = tokenizer("quantile").encode(Sensor(values, rate_hz=100, kind="imu", channels=("gyro", "pressure", "field")))
    assert tokens.grid == (5, 3) and tokens.group == 3 and len(tokens) == 15
    assert tokens.place is not None and tokens.place.tolist() == [[c, 0] for _ in range(5) for c in range(3)]
    assert tokens.time.tolist() == [r * 10_000_000 for r in range(5) for _ in range(3)]
    assert tokens.features is not None and tokens.features.shape == (15, 1) and tokens.features[7] == 0
    assert tokens.codes[7] == tokenizer().missing
    decoded = tokenizer("quantile").decode(tokens.codes, tokens.grid, kind="imu", rate_hz=100)
    assert decoded.units == ("rad/s", "Pa", "T") and decoded.kind == "imu" and decoded.rate_hz == 100
    assert np.isnan(decoded.values[2, 1])
    assert np.nanmax(np.abs(decoded.values - values) / [1, 1000, 1e-6]) < 0.1


def test_lists_tensors_arrays_and_files_agree(tmp_path: Path) -> None:
    values = np.linspace(-1, 1, 7)
    np.save(tmp_path / "v.npy", values)
    codes = tokenizer().encode(Sensor(values, rate_hz=1, kind="unit")).codes
    for source in (values.tolist(), torch.from_numpy(values), values[:, None], tmp_path / "v.npy"):
        assert np.array_equal(tokenizer().encode(Sensor(source, rate_hz=1, kind="unit")).codes, codes)


@pytest.mark.parametrize(
    ("segment", "needle"),
    [
        (Sensor([0.0], kind="lidar"), r"kind 'lidar' is not fitted \(fitted: imu, unit\)"),
        (Sensor([0.0], kind="imu"), "has 1 channels, kind 'imu' was fitted on 3"),
        (Sensor([[0.0] * 3], kind="imu", units=("deg/s", "Pa", "T")), "convert it"),
        (Sensor([[0.0] * 3], kind="imu", channels=("pressure", "gyro", "field")), "was fitted on"),
        (Sensor([[1.0], [1.0, 2.0]], kind="unit"), "no table"),
        (Sensor(["a"], kind="unit"), "dtype"),
        (Sensor(np.zeros((1, 513)), kind="unit"), "513 channels"),
        (Sensor("/nowhere.npy", kind="unit"), "does not exist"),
        (Sensor([0.0, 1.0], kind="unit", name="s", times=[1.0, 0.5]), "'s'"),
        (Sensor([0.0], kind="unit", name="s", times=[datetime(2026, 1, 1)]), "'s'"),
    ],
)
def test_bad_readings_are_told_what_to_do(segment: Sensor, needle: str) -> None:
    with pytest.raises(ValueError, match=needle):
        tokenizer().encode(segment)


def test_pickled_arrays_are_never_loaded(tmp_path: Path) -> None:
    np.save(tmp_path / "v.npy", np.array([{"a": 1}]), allow_pickle=True)
    with pytest.raises(ValueError, match="without objects"):
        tokenizer().encode(Sensor(tmp_path / "v.npy", kind="unit"))


def test_aware_datetimes_are_times() -> None:
    times = [datetime(2026, 1, 1, tzinfo=UTC), datetime(2026, 1, 1, 0, 0, 2, tzinfo=UTC)]
    assert tokenizer().encode(Sensor([0.0, 1.0], kind="unit", times=times)).time.tolist() == [0, 2_000_000_000]


@pytest.mark.parametrize(
    ("arrays", "options", "needle"),
    [
        ([], {}, "one or more arrays"),
        ([np.zeros((2, 3)), np.zeros((2, 2))], {}, "2 and 3 channels; give unlike sensors different kinds"),
        ([np.zeros((2, 3))], {"channels": ("a",)}, "3 channels, but 1 channels"),
        ([np.zeros((2, 3))], {"method": ("linear",)}, "1 methods"),
        ([np.zeros((2, 3))], {"method": "log"}, "'quantile', 'mu_law' or 'linear'"),
    ],
)
def test_bad_fits_are_told_what_to_do(arrays: list[np.ndarray], options: dict[str, object], needle: str) -> None:
    with pytest.raises(TokenizerError, match=needle):
        SensorTokenizer().fit("k", arrays, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(("codes", "grid"), [([1025], (1, 1)), ([-1], (1, 1)), ([0, 0], (1, 2)), ([0, 0], (1, 1)), ([0], (1,))])
def test_impossible_codes_are_refused(codes: list[int], grid: tuple[int, ...]) -> None:
    with pytest.raises(TokenizerError):
        tokenizer().decode(np.array(codes), grid, kind="unit")


@pytest.mark.parametrize("knots", [[1.0], [1.0, 1.0], [0.0, np.nan], [2.0, 1.0]])
def test_a_map_that_cannot_be_inverted_is_refused(knots: list[float]) -> None:
    with pytest.raises(TokenizerError, match="knots"):
        Scaling("linear", np.array(knots), np.linspace(-1, 1, len(knots)))


def test_save_and_load(tmp_path: Path) -> None:
    one = tokenizer("quantile")
    one.save(tmp_path)
    loaded = SensorTokenizer.load(tmp_path)
    assert isinstance(loaded, Tokenizer) and loaded.digest() == one.digest() != tokenizer("linear").digest()
    segment = Sensor(np.random.default_rng(0).standard_normal((5, 3)), rate_hz=3, kind="imu")
    tokens = one.encode(segment)
    assert np.array_equal(loaded.encode(segment).codes, tokens.codes)
    assert np.array_equal(
        loaded.decode(tokens.codes, tokens.grid, kind="imu").values, one.decode(tokens.codes, tokens.grid, kind="imu").values
    )
    (tmp_path / "tokenizer.safetensors").unlink()
    with pytest.raises(TokenizerError, match="damaged"):
        SensorTokenizer.load(tmp_path)


def test_other_segments_and_bad_configs_are_refused() -> None:
    with pytest.raises(TokenizerError, match="got Text"):
        tokenizer().encode(Text("x"))
    for bins in (0, 1, 2**21, 1.5):
        with pytest.raises(TokenizerError, match="bins"):
            SensorConfig(bins=bins)  # type: ignore[arg-type]
