"""Action chunks <-> few codes: DCT in time, quantise, low frequencies first, byte-pair merges (FAST, arXiv 2501.09747).

A chunk is `steps` actions of D dimensions in [-1, 1]. Its orthonormal DCT-II per dimension times `scale` is rounded to
integers, written frequency by frequency (all dimensions of frequency 0 first), and merged pair by pair. Pieces know how many
integers they stand for, so chunks follow each other without a separator; what a cut-off chunk lacks counts as zero.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise

import numpy as np

from weft.tokenizers.files import TokenizerError


@dataclass(frozen=True)
class ChunkCodec:
    """The quantised cosine transform and its merges."""

    steps: int = 16
    """Actions of one chunk; a shorter one is filled with its last action."""
    scale: float = 10.0
    """Coefficients are multiplied by this and rounded: larger is finer and longer. FAST uses 10."""
    merges: tuple[tuple[int, int], ...] = field(default=())
    """Pairs of pieces in the order in which they were merged; merge i makes piece `alphabet + i`."""

    def __post_init__(self) -> None:
        if not isinstance(self.steps, int) or not 2 <= self.steps <= 1024:
            raise TokenizerError(f"chunk steps {self.steps} must be an integer from 2 to 1024")
        if not 0 < self.scale <= 1000:
            raise TokenizerError(f"chunk scale {self.scale} must be above 0 and at most 1000")
        for i, (left, right) in enumerate(self.merges):
            if not (0 <= left < self.alphabet + i and 0 <= right < self.alphabet + i):
                raise TokenizerError(f"chunk merge {i} = ({left}, {right}) names a piece that does not exist yet; fit again")

    @property
    def limit(self) -> int:
        """Largest integer: a signal in [-1, 1] has no orthonormal coefficient beyond sqrt(steps)."""
        return math.ceil(self.scale * math.sqrt(self.steps))

    @property
    def alphabet(self) -> int:
        """Pieces before any merge: the integers -limit .. limit."""
        return 2 * self.limit + 1

    @property
    def size(self) -> int:
        """Codes."""
        return self.alphabet + len(self.merges)

    @cached_property
    def _expand(self) -> list[tuple[int, ...]]:
        pieces: list[tuple[int, ...]] = [(i,) for i in range(self.alphabet)]
        for left, right in self.merges:
            pieces.append(pieces[left] + pieces[right])
        return pieces

    @cached_property
    def _rank(self) -> dict[tuple[int, int], int]:
        return {pair: i for i, pair in enumerate(self.merges)}

    def symbols(self, scaled: np.ndarray) -> list[np.ndarray]:
        """float [N D] in [-1, 1] -> one int64 [steps * D] in [0, alphabet) per chunk."""
        from scipy.fft import dct

        if not len(scaled):
            return []
        short = -len(scaled) % self.steps
        full = np.concatenate([scaled, np.repeat(scaled[-1:], short, axis=0)]).reshape(-1, self.steps, scaled.shape[1])
        coefficient = np.rint(dct(full, axis=1, norm="ortho") * self.scale).astype(np.int64)
        flat = (np.clip(coefficient, -self.limit, self.limit) + self.limit).reshape(len(full), -1)
        return list(flat)

    def encode(self, scaled: np.ndarray) -> list[list[int]]:
        """float [N D] in [-1, 1] -> codes of each chunk."""
        return [self._merge(chunk.tolist()) for chunk in self.symbols(scaled)]

    def _merge(self, pieces: list[int]) -> list[int]:
        """Apply the merges in the order in which they were learnt."""
        while len(pieces) > 1:
            pair = min(pairwise(pieces), key=lambda p: self._rank.get(p, len(self._rank)))
            if pair not in self._rank:
                break
            pieces = _replace(pieces, pair, self.alphabet + self._rank[pair])
        return pieces

    def decode(self, codes: Sequence[int], dims: int) -> np.ndarray:
        """Codes -> float64 [chunks * steps, dims] in [-1, 1]."""
        from scipy.fft import idct

        flat = [symbol for code in codes for symbol in self._expand[code]]
        chunk = self.steps * dims
        flat += [self.limit] * (-len(flat) % chunk)  # symbol `limit` is the integer zero
        coefficient = (np.array(flat, np.float64) - self.limit).reshape(-1, self.steps, dims) / self.scale
        return np.clip(idct(coefficient, axis=1, norm="ortho"), -1, 1).reshape(-1, dims)


def _replace(pieces: list[int], pair: tuple[int, int], new: int) -> list[int]:
    """Every occurrence of `pair`, from left to right, becomes `new`."""
    out, i, last = [], 0, len(pieces) - 1
    while i <= last:
        if i < last and pieces[i] == pair[0] and pieces[i + 1] == pair[1]:
            out.append(new)
            i += 2
        else:
            out.append(pieces[i])
            i += 1
    return out


def fit_chunks(scaled: Sequence[np.ndarray], steps: int, scale: float, size: int) -> ChunkCodec:
    """Learn merges from trajectories float [N D] in [-1, 1] until there are `size` codes or no pair occurs twice."""
    plain = ChunkCodec(steps, scale)
    if size < plain.alphabet:
        raise TokenizerError(f"chunk size {size} is below the alphabet of {plain.alphabet} integers; raise it or lower scale")
    # One flat array with -1 after each chunk: pairs across a border are never counted.
    parts = [np.append(s, -1) for table in scaled for s in plain.symbols(table)]
    text = np.concatenate(parts) if parts else np.zeros(0, np.int64)
    merges: list[tuple[int, int]] = []
    while plain.alphabet + len(merges) < size:
        pair = _commonest(text)
        if pair is None:
            break
        text = _merge_all(text, pair, plain.alphabet + len(merges))
        merges.append(pair)
    return ChunkCodec(steps, scale, tuple(merges))


def _commonest(text: np.ndarray) -> tuple[int, int] | None:
    """The pair that occurs most often, at least twice; the smallest of equals."""
    left, right = text[:-1], text[1:]
    inside = (left >= 0) & (right >= 0)
    pairs, counts = np.unique(left[inside] << 32 | right[inside], return_counts=True)
    if not len(counts) or counts.max() < 2:
        return None
    best = int(pairs[counts.argmax()])
    return best >> 32, best & 0xFFFFFFFF


def _merge_all(text: np.ndarray, pair: tuple[int, int], new: int) -> np.ndarray:
    """`_replace` on an array: in a run of equal pieces every second pair is taken, from the left."""
    hit = np.flatnonzero((text[:-1] == pair[0]) & (text[1:] == pair[1]))
    if pair[0] == pair[1] and len(hit):
        start = np.maximum.accumulate(np.where(np.diff(hit, prepend=hit[0] - 2) > 1, np.arange(len(hit)), 0))
        hit = hit[(np.arange(len(hit)) - start) % 2 == 0]
    out = text.copy()
    out[hit] = new
    return np.delete(out, hit + 1)
