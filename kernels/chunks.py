"""Which queries to run together against which keys: the plan of the `sdpa` backend.

In: a layout and the sizes of one call. Out: `ChunkPlan`, a list of pieces. Queries are cut into chunks that never cross a
document unless documents are tiny; a chunk reads its main key range and the landmarks before it. Many small chunks of about the
same size are padded into ONE batched piece; a large chunk is a piece of its own that reads slices instead of copies.
The chunk size is the one that a cost model (fitted to `benchmarks/speed/attention.py` on CPU) finds cheapest.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from weft.kernels.layout import StreamLayout

CHUNKS = (16, 32, 64, 128, 256)
MERGE = 16  # whole documents are put together up to so many tokens
BATCHED_AREA = 64 * 512  # chunks with more query-key pairs than this are run alone
PIECE_KEYS = 4096  # keys that one piece gathers: larger buffers cost page faults (8k tokens: 241 ms in one piece, 155 in many)
# The cost model: ns on one core, forward and backward. Fitted by hand to the CPU time of 105 plans of 7 layouts on an AMD EPYC:
# the plan it picked was never more than 8 % slower than the best of the 15 tried.
PAIR_NS = 0.12  # one query-key pair, per channel
ROW_OVERHEAD = 24.0  # a product of r rows costs as much as one of r + 24
GATHER_NS = 2.0  # one channel of one gathered query or key
PIECE_NS = 250_000.0  # the calls of one piece


@dataclass(frozen=True, eq=False)
class Single:
    """One chunk of c queries against w keys, read in place where nothing has to be gathered."""

    queries: slice
    keys: slice | Tensor  # positions, int64 [w]
    mask: Tensor | None  # bool [c w]; None: everything is visible

    @property
    def area(self) -> int:
        """Query-key pairs computed, visible or not."""
        keys = self.keys.stop - self.keys.start if isinstance(self.keys, slice) else len(self.keys)
        return (self.queries.stop - self.queries.start) * keys

    def bias(self, dtype: torch.dtype) -> Tensor | None:
        """Additive mask [1 1 c w], made anew each time: kept for all chunks it would outgrow the activations."""
        return None if self.mask is None else additive(self.mask, dtype)[None, None]


@dataclass(frozen=True, eq=False)
class Batched:
    """n chunks of c queries against w keys each, padded to equal size.

    Indices count rows of K channels in a [T H K] or [T G K] tensor, so that one gather also brings the heads in front of the
    chunk's tokens. A padded query repeats another one and is written to row T * H, which nobody reads.
    """

    shape: tuple[int, int, int]  # n c w
    take_q: Tensor  # int64 [n*H*c]
    put_q: Tensor  # int64 [n*R*c*G], the order in which the kernel stores its result
    take_k: Tensor  # int64 [n*G*w]
    keys: Tensor  # positions, int64 [n*w]
    mask: Tensor | None  # bool [n c w]; None: everything is visible
    padded: Tensor | None  # bool [n 1 R*c]; None: no padded query
    repeat: int  # R
    biases: dict[torch.dtype, Tensor] = field(default_factory=dict, repr=False)

    @property
    def area(self) -> int:
        """Query-key pairs computed, visible or not."""
        chunks, width, depth = self.shape
        return chunks * width * depth

    def bias(self, dtype: torch.dtype) -> Tensor | None:
        """Additive mask [n 1 R*c w], made once (batched pieces are small)."""
        if self.mask is not None and dtype not in self.biases:
            self.biases[dtype] = additive(self.mask, dtype).repeat(1, self.repeat, 1)[:, None]
        return self.biases.get(dtype)


@dataclass(frozen=True, eq=False)
class ChunkPlan:
    """Pieces that cover every query once."""

    chunk: int
    pieces: list[Single | Batched]

    @property
    def area(self) -> int:
        """Query-key pairs computed, visible or not."""
        return sum(piece.area for piece in self.pieces)


def additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where visible, -inf elsewhere."""
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, float("-inf"))


def chunk_plan(layout: StreamLayout, heads: int, kv_heads: int, width: int) -> ChunkPlan:
    """The cheapest plan for these sizes; made once per layout and size, then shared by every layer."""
    key = ("chunks", heads, kv_heads, width)
    if key not in layout.plans:
        layout.plans[key] = _best(_Numbers(layout), heads, kv_heads, width)
    return layout.plans[key]


class _Numbers:
    """The layout's numbers as numpy arrays."""

    def __init__(self, layout: StreamLayout) -> None:
        names = ("born", "dies", "document_start", "first_key", "end_key", "landmark_at", "first_landmark", "end_landmark")
        self.born, self.dies, start, self.first_key, self.end_key, self.landmark_at, self.first_landmark, self.end_landmark = (
            getattr(layout, name).cpu().numpy() for name in names
        )
        self.total = len(layout)
        self.borders = np.append(np.flatnonzero(start == np.arange(self.total)), self.total)
        self.device = layout.device


@dataclass(frozen=True)
class _Chunks:
    """Chunks [first, end) with their key range [low, high) and landmark range [left, right)."""

    first: np.ndarray
    end: np.ndarray
    low: np.ndarray
    high: np.ndarray
    left: np.ndarray
    right: np.ndarray

    @property
    def width(self) -> np.ndarray:
        return self.end - self.first

    @property
    def depth(self) -> np.ndarray:
        return self.high - self.low + self.right - self.left


def _best(numbers: _Numbers, heads: int, kv_heads: int, width: int) -> ChunkPlan:
    best = None
    for size in CHUNKS:
        chunks = _cut(numbers, size)
        for pad in (16, 32):
            groups = _groups(chunks, pad)
            cost = _cost(groups, heads, kv_heads, width)
            if best is None or cost < best[0]:
                best = (cost, size, chunks, groups)
    assert best is not None
    _, size, chunks, groups = best
    return ChunkPlan(size, [_piece(numbers, chunks, group, c, w, heads, kv_heads) for group, c, w in groups])


def _cut(numbers: _Numbers, size: int) -> _Chunks:
    """Each document into equal chunks of at most `size`; runs of tiny documents into one."""
    borders = numbers.borders[_merge(numbers.borders, min(MERGE, size))]
    length = np.diff(borders)
    parts = _up(length, size) // size
    each = _up(_up(length, parts) // parts, 8)
    parts = _up(length, each) // each
    number = np.arange(parts.sum()) - np.repeat(np.cumsum(parts) - parts, parts)
    first = np.repeat(borders[:-1], parts) + number * np.repeat(each, parts)
    end = np.minimum(first + np.repeat(each, parts), np.repeat(borders[1:], parts))
    n = numbers
    return _Chunks(first, end, n.first_key[first], n.end_key[end - 1], n.first_landmark[first], n.end_landmark[first])


def _up(x: np.ndarray, step: np.ndarray | int) -> np.ndarray:
    """Rounded up to a multiple of `step`."""
    return (x + step - 1) // step * step


def _merge(borders: np.ndarray, most: int) -> list[int]:
    """Indices of the borders that stay when neighbours that fit into `most` tokens together are joined."""
    if len(borders) < 3 or int((borders[2:] - borders[:-2]).min()) > most:
        return list(range(len(borders)))
    kept, values = [0], borders.tolist()
    for i in range(1, len(values) - 1):
        if values[i + 1] - values[kept[-1]] > most:
            kept.append(i)
    return [*kept, len(values) - 1] if len(values) > 1 else kept


def _groups(chunks: _Chunks, pad: int) -> list[tuple[np.ndarray, int, int]]:
    """(chunk numbers, padded queries, padded keys): batched chunks share a size class, large ones stay alone."""
    width, depth = chunks.width, chunks.depth
    small = width * depth <= BATCHED_AREA
    padded_width, padded_depth = _up(width, 16), _up(depth, pad)
    label = np.where(small, padded_width * (1 << 40) + padded_depth, -1 - np.arange(len(width)))
    order = np.argsort(label, kind="stable")
    cuts = np.flatnonzero(np.diff(label[order])) + 1
    groups = np.split(order, cuts) if len(order) else []
    parts = [part for group in groups for part in np.array_split(group, -(-len(group) * int(depth[group].max()) // PIECE_KEYS))]
    return [(part, int(width[part].max()), int(depth[part].max())) for part in parts if len(part)]


def _cost(groups: list[tuple[np.ndarray, int, int]], heads: int, kv_heads: int, size: int) -> float:
    """Estimated ns of forward and backward."""
    total = len(groups) * PIECE_NS
    for group, width, depth in groups:
        chunks = len(group)
        rows = width if chunks == 1 else width * heads // kv_heads
        split = 256 if rows >= 768 else 64 if rows >= 192 else 32  # rows of one product inside torch's flash kernel
        total += chunks * width * depth * heads * size * PAIR_NS * (1 + ROW_OVERHEAD / min(rows, split))
        if chunks > 1:
            total += chunks * (width * heads + depth * kv_heads) * size * GATHER_NS
    return total


def _piece(
    numbers: _Numbers, chunks: _Chunks, group: np.ndarray, width: int, depth: int, heads: int, kv_heads: int
) -> Single | Batched:
    first, end, low, high = (x[group, None] for x in (chunks.first, chunks.end, chunks.low, chunks.high))
    left, right = chunks.left[group, None], chunks.right[group, None]
    query = first + np.arange(width)
    padded = query >= end
    query = np.minimum(query, end - 1)
    column, marks = np.arange(depth), right - left
    landmark = numbers.landmark_at[np.minimum(left + np.minimum(column, marks), numbers.total - 1)]
    key = np.where(column < marks, landmark, low + column - marks)
    valid = key < high
    key = np.minimum(key, numbers.total - 1)
    mask = (numbers.born[key][:, None] <= query[:, :, None]) & (query[:, :, None] < numbers.dies[key][:, None]) & valid[:, None]

    def tensor(x: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(x)).to(numbers.device)

    kept = None if mask.all() else tensor(mask)
    if len(group) == 1:
        keys = tensor(key[0].astype(np.int64)) if marks.any() else slice(int(low[0, 0]), int(high[0, 0]))
        return Single(slice(int(first[0, 0]), int(end[0, 0])), keys, None if kept is None else kept[0])
    repeat = heads // kv_heads
    head = np.arange(heads)[:, None]
    take_q = query[:, None].astype(np.int64) * heads + head
    put_q = np.where(padded[:, None], numbers.total * heads, take_q)
    put_q = put_q.reshape(len(group), kv_heads, repeat * width).transpose(0, 2, 1)
    key = key.astype(np.int64)
    take_k = key[:, None] * kv_heads + head[:kv_heads]
    rows = tensor(np.tile(padded, repeat)[:, None]) if padded.any() else None
    q_from, q_to, k_from, at = (tensor(x).view(-1) for x in (take_q, put_q, take_k, key))
    return Batched((len(group), width, depth), q_from, q_to, k_from, at, kept, rows, repeat)
