"""Actions <-> tokens: discrete ids, one bin per dimension, or compressed chunks.

In: an `Action` segment [N dims] with its space. Out: `Tokens` with local codes

    [0, discrete)  discrete ids    [discrete, discrete + bins)  bins    [discrete + bins, size)  chunk pieces

A continuous value is scaled from the space's [low, high] to [-1, 1] (values outside saturate, NaN and infinite ones are
refused) and falls into a uniform bin; decoding gives the bin's centre, so an action is always inside its bounds. Feature
[n 1]: the scaled value, 0 for discrete ids and chunk pieces. grid (steps, dims), place[:, 0] = dimension, group = dims; a
chunked segment keeps grid (steps, dims) but has as many codes as it needs, and they stay together.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from weft.tokenizers import files
from weft.tokenizers.base import Tokens
from weft.tokenizers.chunks import ChunkCodec, fit_chunks
from weft.tokenizers.clock import label, segment_times
from weft.tokenizers.files import TokenizerError
from weft.tokenizers.numbers import as_table
from weft.tokenizers.scaling import bin_centres, to_bins
from weft.tokenizers.segment import Action, ActionSpace, Segment


@dataclass(frozen=True)
class ActionConfig:
    """Which actions there are."""

    discrete: int = 0
    """Discrete ids: at least the largest `n` of any space in use."""
    bins: int = 256
    """Uniform bins of a continuous dimension between its bounds; 0 = no continuous actions."""
    continuous: Literal["bins", "chunks"] = "bins"
    """How continuous segments are written: a token per number, or compressed chunks (see `fit`)."""

    def __post_init__(self) -> None:
        if not 0 <= self.discrete <= 1 << 20 or not 0 <= self.bins <= 1 << 20 or self.bins == 1:
            raise TokenizerError(f"action discrete={self.discrete} and bins={self.bins} must be from 0 to 2^20, bins not 1")
        if self.continuous not in ("bins", "chunks"):
            raise TokenizerError(f"action continuous={self.continuous!r} must be 'bins' or 'chunks'")


class ActionTokenizer:
    """Actions to codes and back, always inside the space's bounds."""

    modality = "action"
    feature_size = 1

    def __init__(self, config: ActionConfig | None = None, chunks: ChunkCodec | None = None) -> None:
        self.config, self.chunks = config or ActionConfig(), chunks
        if self.config.continuous == "chunks" and chunks is None:
            raise TokenizerError("continuous='chunks' needs a fitted chunk codec; call ActionTokenizer.fit(segments)")

    @property
    def size(self) -> int:
        """Codes in all."""
        return self.size_discrete + self.size_bins + self.size_chunks

    @property
    def size_discrete(self) -> int:
        """Discrete ids."""
        return self.config.discrete

    @property
    def size_bins(self) -> int:
        """Bins."""
        return self.config.bins

    @property
    def size_chunks(self) -> int:
        """Chunk pieces."""
        return self.chunks.size if self.chunks else 0

    @classmethod
    def fit(
        cls,
        segments: Iterable[Action],
        config: ActionConfig | None = None,
        *,
        steps: int = 16,
        scale: float = 10.0,
        size: int = 1024,
    ) -> ActionTokenizer:
        """A tokenizer that writes continuous segments as chunks of `steps` actions with at most `size` pieces."""
        tables = [_scaled(s, label(s)) for s in segments if s.space.n is None]
        if not tables:
            raise TokenizerError("ActionTokenizer.fit got no continuous Action segment; chunks are learnt from them")
        return cls(replace(config or ActionConfig(), continuous="chunks"), fit_chunks(tables, steps, scale, size))

    def encode(self, segment: Segment) -> Tokens:
        """Tokens of an `Action` segment."""
        if not isinstance(segment, Action):
            raise TokenizerError(f"ActionTokenizer encodes Action, got {type(segment).__name__}")
        where = label(segment)
        if segment.space.n is not None:
            codes = self._discrete(segment, where)
            return self._tokens(segment, codes, np.zeros((len(codes), 1), np.float32), 1)
        scaled = _scaled(segment, where)
        if self.config.continuous == "chunks":
            return self._chunked(segment, scaled)
        if not self.config.bins:
            raise TokenizerError(f"{where} is continuous, but this action tokenizer has no bins; set ActionConfig.bins")
        codes = to_bins(scaled, self.config.bins).reshape(-1) + self.config.discrete
        return self._tokens(segment, codes, scaled.astype(np.float32).reshape(-1, 1), segment.space.dims)

    def _discrete(self, segment: Action, where: str) -> np.ndarray:
        table = as_table(segment.values, where)
        count = segment.space.n or 0
        if count > self.config.discrete:
            raise TokenizerError(
                f"{where} has {count} choices, the tokenizer {self.config.discrete}; raise ActionConfig.discrete"
            )
        if table.shape[1] != 1 or not np.isfinite(table).all() or (table != np.floor(table)).any():
            raise TokenizerError(f"{where} is discrete and needs integers [N], got shape {table.shape}")
        if table.size and not (table.min() >= 0 and table.max() < count):
            raise TokenizerError(f"{where} has actions {table.min():.0f}..{table.max():.0f}, its space allows 0..{count - 1}")
        return table[:, 0].astype(np.int64)

    def _tokens(self, segment: Action, codes: np.ndarray, features: np.ndarray, dims: int) -> Tokens:
        steps = len(codes) // dims
        place = np.zeros((len(codes), 2), np.int32)
        place.reshape(steps, dims, 2)[:, :, 0] = np.arange(dims)
        time = np.repeat(segment_times(segment, steps), dims)
        return Tokens(codes=codes, grid=(steps, dims), time=time, features=features, place=place, group=dims)

    def _chunked(self, segment: Action, scaled: np.ndarray) -> Tokens:
        assert self.chunks is not None
        chunks = self.chunks.encode(scaled)
        begins = segment_times(segment, len(scaled))[:: self.chunks.steps]
        codes = np.array([c for chunk in chunks for c in chunk], np.int64) + self.config.discrete + self.config.bins
        return Tokens(
            codes=codes,
            grid=scaled.shape,
            time=np.repeat(begins, [len(c) for c in chunks]),
            features=np.zeros((len(codes), 1), np.float32),
            place=np.zeros((len(codes), 2), np.int32),
            group=max(len(codes), 1),
        )

    def decode(self, codes: np.ndarray, grid: tuple[int, ...], **shape: Any) -> Action:
        """Codes to actions: int64 [N] for a discrete space, float64 [N dims] inside the bounds for a continuous one.

        `space=` is the ActionSpace; without it discrete ids belong to one of `discrete` choices and the rest to [-1, 1].
        For chunks `grid[1]` is the number of dimensions and `steps=` crops what filled the last chunk. `rate_hz` and `times`
        are handed on. Codes of two kinds, or beyond the space, raise.
        """
        if len(grid) != 2 or grid[1] < 1:
            raise TokenizerError(f"an action grid is (steps, dims), got {tuple(grid)}")
        codes = files.checked_codes(codes, self.size, (len(np.asarray(codes).reshape(-1)),), "action")
        edges = (0, self.size_discrete, self.size_discrete + self.size_bins, self.size)
        which = np.searchsorted(edges, codes, side="right") - 1
        space: ActionSpace | None = shape.get("space")
        if len(which) and which.min() != which.max():
            raise TokenizerError("one action segment mixes discrete ids, bins or chunk pieces; cut it at its borders")
        dims = int(grid[1])
        clock: dict[str, Any] = {"rate_hz": shape.get("rate_hz"), "times": shape.get("times")}
        if (which[0] == 0) if len(which) else (space is not None and space.n is not None):
            return Action(values=self._choices(codes, grid, space), space=space or ActionSpace(n=self.size_discrete), **clock)
        space = space or ActionSpace(low=(-1.0,) * dims, high=(1.0,) * dims)
        if space.n is not None or space.dims != dims:
            raise TokenizerError(f"action codes are continuous with {dims} dimensions, the space is {space}")
        if len(which) and which[0] == 2:
            assert self.chunks is not None
            scaled = self.chunks.decode((codes - edges[2]).tolist(), dims)[: shape.get("steps")]
        else:
            codes = files.checked_codes(codes, self.size, grid, "action")
            scaled = bin_centres(codes - edges[1], self.config.bins).reshape(-1, dims)
        low, high = _bounds(space, "action codes")
        return Action(values=np.clip((scaled + 1) / 2 * (high - low) + low, low, high), space=space, **clock)

    def _choices(self, codes: np.ndarray, grid: tuple[int, ...], space: ActionSpace | None) -> np.ndarray:
        codes = files.checked_codes(codes, self.size_discrete, grid, "action")
        count = self.size_discrete if space is None else space.n
        if count is None or grid[1] != 1:
            raise TokenizerError(f"action codes are discrete, the space is {space} and the grid {tuple(grid)}")
        if len(codes) and codes.max() >= count:
            raise TokenizerError(f"action {codes.max()} is outside a space of {count} choices; restrict what may be sampled")
        return codes

    def _state(self) -> dict[str, Any]:
        return {"modality": self.modality, "config": asdict(self.config), "chunks": self.chunks and asdict(self.chunks)}

    def save(self, folder: Path) -> None:
        """Write settings and, if fitted, the merges."""
        files.write(folder, self._state())

    @classmethod
    def load(cls, folder: Path) -> ActionTokenizer:
        """Read what `save` wrote."""
        settings, _ = files.read(folder, "action")
        chunks = settings.get("chunks")
        if chunks is not None:
            try:
                chunks = dict(chunks, merges=[(int(a), int(b)) for a, b in chunks["merges"]])
            except (KeyError, TypeError, ValueError) as error:
                raise TokenizerError(f"{folder}: the chunk merges are damaged ({error!r}); save the tokenizer again") from error
            chunks = files.config_from(ChunkCodec, chunks, str(folder))
        return cls(files.config_from(ActionConfig, settings.get("config"), str(folder)), chunks)

    def digest(self) -> str:
        """SHA-256 over the config and the merges."""
        return files.digest(self._state())


def _bounds(space: ActionSpace, where: str) -> tuple[np.ndarray, np.ndarray]:
    low, high = np.array(space.low, np.float64), np.array(space.high, np.float64)
    if not (np.isfinite(low).all() and np.isfinite(high).all()):
        raise TokenizerError(f"{where}: bounds low={space.low} high={space.high} must be finite; give the range that is used")
    return low, high


def _scaled(segment: Action, where: str) -> np.ndarray:
    """float64 [N dims] in [-1, 1]."""
    low, high = _bounds(segment.space, where)
    table = as_table(segment.values, where)
    if table.shape[1] != segment.space.dims:
        raise TokenizerError(f"{where} has {table.shape[1]} numbers per action, its space has {segment.space.dims}")
    if not np.isfinite(table).all():
        raise TokenizerError(f"{where} has actions that are NaN or infinite; drop those steps")
    return np.clip((table - low) / (high - low) * 2 - 1, -1, 1)
