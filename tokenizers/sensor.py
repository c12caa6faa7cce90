"""Sensor readings <-> one bin token per channel and reading.

In: a `Sensor` segment [N channels] of a fitted kind. Out: `Tokens` in reading order, channel after channel: code = the bin of
the scaled value, feature [n 1] = the scaled value in [-1, 1] (0 where missing), grid (readings, channels), place[:, 0] =
channel, group = channels. A missing reading (NaN) has the code `size`, one past the last bin: the vocabulary's `<missing>`.
Values outside the fitted range, infinite ones too, saturate. Decoding gives the centre of the bin, NaN where missing.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from weft.tokenizers import files
from weft.tokenizers.base import Tokens
from weft.tokenizers.clock import label, segment_times
from weft.tokenizers.files import TokenizerError
from weft.tokenizers.numbers import as_table
from weft.tokenizers.scaling import Method, Scaling, bin_centres, fit_scaling, to_bins
from weft.tokenizers.segment import Segment, Sensor


@dataclass(frozen=True)
class SensorConfig:
    """One set of bins serves every kind and channel."""

    bins: int = 1024
    """Uniform bins of the scaled interval [-1, 1]."""

    def __post_init__(self) -> None:
        if not isinstance(self.bins, int) or not 2 <= self.bins <= 1 << 20:
            raise TokenizerError(f"sensor bins {self.bins} must be an integer from 2 to 2^20")


@dataclass(frozen=True)
class SensorKind:
    """What is known about one kind of sensor."""

    scalings: tuple[Scaling, ...]
    """One per channel."""
    channels: tuple[str, ...] | None = None
    units: tuple[str, ...] | None = None


class SensorTokenizer:
    """Readings to bins and back, with a scaling per kind and channel."""

    modality = "sensor"
    feature_size = 1

    def __init__(self, config: SensorConfig | None = None, kinds: dict[str, SensorKind] | None = None) -> None:
        self.config = config or SensorConfig()
        self.kinds = dict(kinds or {})
        self.size = self.config.bins

    @property
    def missing(self) -> int:
        """The code of a missing reading."""
        return self.size

    def fit(
        self,
        kind: str,
        arrays: Iterable[Any],
        channels: tuple[str, ...] | None = None,
        units: tuple[str, ...] | None = None,
        method: Method | tuple[Method, ...] = "quantile",
    ) -> SensorTokenizer:
        """Learn the scaling of `kind` from arrays [N] or [N channels]; replaces an earlier fit. Returns the tokenizer.

        `method` is one for all channels or one per channel: "quantile" (any distribution), "mu_law" (fine near zero), "linear".
        """
        tables = [as_table(a.values if isinstance(a, Sensor) else a, f"sensor kind {kind!r}") for a in arrays]
        if not tables:
            raise TokenizerError(f"sensor kind {kind!r} needs one or more arrays to be fitted on")
        if len(counts := sorted({t.shape[1] for t in tables})) > 1:
            found = " and ".join(map(str, counts))
            raise TokenizerError(f"sensor kind {kind!r} has tables of {found} channels; give unlike sensors different kinds")
        values = np.concatenate(tables)
        count = values.shape[1]
        methods = (method,) * count if isinstance(method, str) else tuple(method)
        for what, given in (("methods", methods), ("channels", channels), ("units", units)):
            if given is not None and len(given) != count:
                raise TokenizerError(f"sensor kind {kind!r} has {count} channels, but {len(given)} {what} were given")
        scalings = tuple(fit_scaling(values[:, c], m) for c, m in enumerate(methods))
        self.kinds[kind] = SensorKind(scalings, channels and tuple(channels), units and tuple(units))
        return self

    def _kind(self, name: str, where: str) -> SensorKind:
        if name not in self.kinds:
            known = ", ".join(sorted(self.kinds)) or "none yet"
            raise TokenizerError(f"{where}: kind {name!r} is not fitted (fitted: {known}); call fit({name!r}, arrays)")
        return self.kinds[name]

    def encode(self, segment: Segment) -> Tokens:
        """Tokens of a `Sensor` segment."""
        if not isinstance(segment, Sensor):
            raise TokenizerError(f"SensorTokenizer encodes Sensor, got {type(segment).__name__}")
        where = label(segment)
        kind = self._kind(segment.kind, where)
        values = as_table(segment.values, where)
        readings, channels = values.shape
        if channels != len(kind.scalings):
            raise TokenizerError(f"{where} has {channels} channels, kind {segment.kind!r} was fitted on {len(kind.scalings)}")
        for what in ("channels", "units"):
            given, fitted = getattr(segment, what), getattr(kind, what)
            if given is not None and fitted is not None and tuple(given) != fitted:
                raise TokenizerError(
                    f"{where} has {what} {tuple(given)}, kind {segment.kind!r} was fitted on {fitted}; convert it"
                )
        scaled = np.stack([s.scale(values[:, c]) for c, s in enumerate(kind.scalings)], axis=1).reshape(-1)
        gone = np.isnan(scaled)
        scaled = np.where(gone, 0.0, scaled)
        place = np.zeros((len(scaled), 2), np.int32)
        place.reshape(readings, channels, 2)[:, :, 0] = np.arange(channels)
        return Tokens(
            codes=np.where(gone, self.missing, to_bins(scaled, self.size)),
            grid=(readings, channels),
            time=np.repeat(segment_times(segment, readings), channels),
            features=scaled.astype(np.float32)[:, None],
            place=place,
            group=channels,
        )

    def decode(self, codes: np.ndarray, grid: tuple[int, ...], **shape: Any) -> Sensor:
        """Codes [readings * channels] to float64 readings [N channels], NaN where missing.

        `kind=` says whose scaling (needed unless exactly one is fitted); `rate_hz` and `times` are handed on to the segment.
        """
        name = shape.get("kind") or (next(iter(self.kinds)) if len(self.kinds) == 1 else "default")
        kind = self._kind(name, "sensor codes")
        if len(grid) != 2 or grid[1] != len(kind.scalings):
            raise TokenizerError(f"sensor grid {tuple(grid)} must be (readings, {len(kind.scalings)}) for kind {name!r}")
        table = files.checked_codes(codes, self.size, grid, "sensor", extra=1).reshape(grid[0], grid[1])
        scaled = np.where(table == self.missing, np.nan, bin_centres(table, self.size))
        values = np.stack([s.unscale(scaled[:, c]) for c, s in enumerate(kind.scalings)], axis=1)
        return Sensor(
            values=values,
            rate_hz=shape.get("rate_hz"),
            times=shape.get("times"),
            channels=kind.channels,
            units=kind.units,
            kind=name,
        )

    def _state(self) -> tuple[dict[str, Any], files.Arrays]:
        kinds, arrays = [], {}
        for i, (name, kind) in enumerate(sorted(self.kinds.items())):
            methods = [s.method for s in kind.scalings]
            kinds.append({"name": name, "methods": methods, "channels": kind.channels, "units": kind.units})
            arrays.update({f"kind{i}.channel{c}": np.stack([s.knots, s.levels]) for c, s in enumerate(kind.scalings)})
        return {"modality": self.modality, "config": asdict(self.config), "kinds": kinds}, arrays

    def save(self, folder: Path) -> None:
        """Write settings and the knots of every scaling."""
        files.write(folder, *self._state())

    @classmethod
    def load(cls, folder: Path) -> SensorTokenizer:
        """Read what `save` wrote."""
        settings, arrays = files.read(folder, "sensor")
        kinds = {}
        try:
            for i, kind in enumerate(settings["kinds"]):
                scalings = tuple(Scaling(m, *arrays[f"kind{i}.channel{c}"]) for c, m in enumerate(kind["methods"]))
                names = (tuple(kind[k]) if kind[k] is not None else None for k in ("channels", "units"))
                kinds[kind["name"]] = SensorKind(scalings, *names)
        except (KeyError, TypeError) as error:
            raise TokenizerError(f"{folder}: the sensor kinds are damaged ({error!r}); save the tokenizer again") from error
        return cls(files.config_from(SensorConfig, settings.get("config"), str(folder)), kinds)

    def digest(self) -> str:
        """SHA-256 over the config and every scaling."""
        settings, arrays = self._state()
        return files.digest(settings, arrays)
