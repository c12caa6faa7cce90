"""Streams side by side in rows of fixed length: what the model and the loss read.

In: `Stream` objects of any lengths. Out: `Batch` objects of B rows x L tokens, flattened to T = B * L. Whole documents, best
fit; a document longer than a row is cut at its segments' borders and counted. Axes: docs/axes.md.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor

from weft.tokenizers.cut import cut_stream
from weft.tokenizers.stream import NO_TIME, Stream, StreamError

PAD = 0
"""Id of `<pad>` in every vocabulary."""


@dataclass(frozen=True)
class Batch:
    """B rows of L tokens, flattened to T = B * L. Documents never cross a row; the model never sees rows.

    `target[i]` is the token that position i predicts: the next token of the same document.
    """

    ids: Tensor  # int64 [T]
    modality: Tensor  # int64 [T]
    channel: Tensor  # int64 [T]
    position: Tensor  # int32 [T 3]
    document: Tensor  # int32 [T], grows from 0 along the batch; padding is a document of its own per row
    landmark: Tensor  # bool [T]
    two_way: Tensor  # int32 [T], block number unique in the batch, or -1
    features: dict[str, Tensor]  # modality -> float32 [k F]; every modality with features has an entry, maybe k = 0
    feature_at: dict[str, Tensor]  # modality -> int64 [k], indices into T
    target: Tensor  # int64 [T], 0 where there is none
    target_modality: Tensor  # int64 [T]
    target_slice: Tensor  # int64 [T]
    weight: Tensor  # float32 [T], 0 where nothing is learnt
    embed_at: Tensor  # int64 [P], closing tokens of the documents that carry a pair key
    embed_pair: Tensor  # int64 [P], equal numbers are positives
    rows: int
    """B."""

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        """The same batch on a device."""

        def move(value: object) -> object:
            if isinstance(value, Tensor):
                return value.to(device, non_blocking=non_blocking)
            return {k: move(v) for k, v in value.items()} if isinstance(value, dict) else value

        return Batch(**{f.name: move(getattr(self, f.name)) for f in fields(self)})  # type: ignore[arg-type]


@dataclass(frozen=True)
class PackReport:
    """What packing did with the documents."""

    documents: int
    rows: int
    length: int
    tokens: int
    cut: int
    """Documents longer than a row."""
    parts: int
    """Parts that those became."""

    @property
    def waste(self) -> float:
        """Share of padding."""
        return 1 - self.tokens / max(self.rows * self.length, 1)

    def __str__(self) -> str:
        cut = f", {self.cut} cut into {self.parts} parts" if self.cut else ""
        size = f"{self.tokens} tokens in {self.rows} rows of {self.length}"
        return f"{self.documents} documents, {size}, {self.waste:.1%} padding{cut}"


def fit(lengths: Sequence[int], length: int) -> list[list[int]]:
    """Rows of indices, best fit in order of falling length. No length may exceed `length`.

    One integer has a bit for every free space that some row has, so the tightest row is its lowest bit above the need.
    """
    rows: list[list[int]] = []
    by_space: list[list[int]] = [[] for _ in range(length + 1)]
    spaces = 0
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        need = lengths[i]
        if need > length:
            raise StreamError(f"document {i} has {need} tokens, a row {length}; cut it first")
        above = spaces >> need
        if above:
            space = need + (above & -above).bit_length() - 1
            row = by_space[space].pop()
            if not by_space[space]:
                spaces ^= 1 << space
        else:
            space, row = length, len(rows)
            rows.append([])
        rows[row].append(i)
        by_space[space - need].append(row)
        spaces |= 1 << (space - need)
    return rows


def pack_rows(streams: Sequence[Stream], length: int) -> tuple[list[list[Stream]], PackReport]:
    """Streams in rows of at most `length` tokens, and what it cost. Longer documents are cut first."""
    if length < 2:
        raise StreamError(f"a row of {length} tokens holds nothing; give length >= 2")
    parts: list[Stream] = []
    cut = 0
    for stream in streams:
        if len(stream) > length:
            cut += 1
            parts += cut_stream(stream, length)
        elif len(stream):
            parts.append(stream)
    rows = [[parts[i] for i in row] for row in fit([len(part) for part in parts], length)]
    whole = len(streams) - cut
    report = PackReport(len(streams), len(rows), length, sum(map(len, parts)), cut, len(parts) - whole)
    return rows, report


def pack(streams: Sequence[Stream], length: int, rows: int | None = None) -> list[Batch]:
    """Batches of `rows` rows x `length` tokens (None: one batch with as many rows as it takes). Missing rows are padding."""
    packed, _ = pack_rows(streams, length)
    if not packed:
        return []
    step = rows or len(packed)
    groups = [packed[i : i + step] for i in range(0, len(packed), step)]
    if rows:
        groups[-1] += [[] for _ in range(rows - len(groups[-1]))]
    sizes = feature_sizes(streams)
    return [collate(group, length, sizes) for group in groups]


def feature_sizes(streams: Sequence[Stream]) -> dict[str, int]:
    """Modality -> F over all streams."""
    return {name: rows.shape[1] for stream in streams for name, rows in stream.features.items()}


def collate(rows: Sequence[Stream | Sequence[Stream]], length: int | None = None, sizes: dict[str, int] | None = None) -> Batch:
    """One batch with exactly these rows; a lone stream is a row. `length` None: the longest row."""
    groups = [[row] if isinstance(row, Stream) else list(row) for row in rows]
    used = [sum(len(stream) for stream in group) for group in groups]
    length = length or max([1, *used])
    for i, count in enumerate(used):
        if count > length:
            raise StreamError(f"row {i} holds {count} tokens, more than its length {length}; pack the documents first")
    flat = [stream for group in groups for stream in group]
    sizes = sizes if sizes is not None else feature_sizes(flat)
    total = len(groups) * length
    out = _Arrays.empty(total)
    features: dict[str, list[np.ndarray]] = {name: [] for name in sizes}
    feature_at: dict[str, list[np.ndarray]] = {name: [] for name in sizes}
    embed_at, embed_pair = [], []
    document, blocks = 0, 0
    for row, group in enumerate(groups):
        at = row * length
        for stream in group:
            end = at + len(stream)
            blocks = out.write(stream, at, document, blocks)
            for name, where in stream.feature_at.items():
                features[name].append(stream.features[name])
                feature_at[name].append(where + at)
            if stream.pair is not None:
                embed_at.append(at + last_landmark(stream))
                embed_pair.append(pair_number(stream.pair))
            at, document = end, document + 1
        if at < (row + 1) * length:
            out.document[at : (row + 1) * length] = document
            out.position[at : (row + 1) * length] = np.arange((row + 1) * length - at)[:, None]
            document += 1
    return Batch(
        **{f.name: torch.from_numpy(getattr(out, f.name)) for f in fields(out)},
        features={
            name: torch.from_numpy(np.concatenate([np.zeros((0, sizes[name]), np.float32), *rows]))
            for name, rows in features.items()
        },
        feature_at={name: torch.from_numpy(np.concatenate([np.zeros(0, np.int64), *at])) for name, at in feature_at.items()},
        embed_at=torch.tensor(embed_at, dtype=torch.int64),
        embed_pair=torch.tensor(embed_pair, dtype=torch.int64),
        rows=len(groups),
    )


@dataclass
class _Arrays:
    """The per-token fields of a batch while it is written."""

    ids: np.ndarray
    modality: np.ndarray
    channel: np.ndarray
    position: np.ndarray
    document: np.ndarray
    landmark: np.ndarray
    two_way: np.ndarray
    target: np.ndarray
    target_modality: np.ndarray
    target_slice: np.ndarray
    weight: np.ndarray

    @classmethod
    def empty(cls, total: int) -> _Arrays:
        """All padding."""

        def zeros() -> np.ndarray:
            return np.zeros(total, np.int64)

        return cls(
            ids=np.full(total, PAD, np.int64),
            modality=zeros(),
            channel=zeros(),
            position=np.zeros((total, 3), np.int32),
            document=np.zeros(total, np.int32),
            landmark=np.zeros(total, bool),
            two_way=np.full(total, -1, np.int32),
            target=zeros(),
            target_modality=zeros(),
            target_slice=zeros(),
            weight=np.zeros(total, np.float32),
        )

    def write(self, stream: Stream, at: int, document: int, blocks: int) -> int:
        """Write one stream at `at`; returns the next free two-way block number."""
        end = at + len(stream)
        self.ids[at:end] = stream.ids
        self.modality[at:end] = stream.modality
        self.channel[at:end] = stream.channel
        self.position[at:end] = stream.position
        self.document[at:end] = document
        self.landmark[at:end] = stream.landmark
        self.two_way[at:end] = np.where(stream.two_way >= 0, stream.two_way + blocks, -1)
        self.target[at : end - 1] = stream.ids[1:]
        self.target_modality[at : end - 1] = stream.modality[1:]
        self.target_slice[at : end - 1] = stream.output_slice[1:]
        self.weight[at : end - 1] = stream.weight[1:]
        return blocks + int(stream.two_way.max(initial=-1)) + 1


def last_landmark(stream: Stream) -> int:
    """Index of the last closing token: where a document's embedding is read."""
    return int(np.flatnonzero(stream.landmark)[-1])


def pair_number(key: str) -> int:
    """A pair key as the same int64 on every rank."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") >> 1


def unpack(batch: Batch) -> list[Stream]:
    """The documents of a batch, in order, as far as a batch knows them (no times, segments or infos)."""
    arrays = {
        f.name: getattr(batch, f.name).cpu().numpy()
        for f in fields(batch)
        if isinstance(getattr(batch, f.name), Tensor) and not f.name.startswith("embed")
    }
    document = arrays.pop("document")
    start = np.flatnonzero(np.r_[True, np.diff(document) != 0]) if len(document) else np.zeros(0, np.int64)
    end = np.r_[start[1:], len(document)]
    streams, blocks = [], 0
    for first, last in zip(start.tolist(), end.tolist()):
        if arrays["ids"][first] == PAD:
            continue
        stream = _unpack_one(batch, arrays, first, last, blocks)
        blocks += int(stream.two_way.max(initial=-1)) + 1
        streams.append(stream)
    return streams


def _unpack_one(batch: Batch, arrays: dict[str, np.ndarray], first: int, last: int, blocks: int) -> Stream:
    n = last - first
    features, feature_at = {}, {}
    for name, where in batch.feature_at.items():
        at = where.cpu().numpy()
        low, high = np.searchsorted(at, [first, last])
        feature_at[name] = at[low:high] - first
        features[name] = batch.features[name][int(low) : int(high)].cpu().numpy()
    two_way = arrays["two_way"][first:last]
    return Stream(
        ids=arrays["ids"][first:last],
        modality=arrays["modality"][first:last],
        position=arrays["position"][first:last],
        time=np.full(n, NO_TIME, np.int64),
        channel=arrays["channel"][first:last],
        segment=np.full(n, -1, np.int64),
        landmark=arrays["landmark"][first:last],
        two_way=np.where(two_way >= 0, two_way - blocks, -1).astype(np.int32),
        output_slice=np.r_[0, arrays["target_slice"][first : last - 1]],
        weight=np.r_[np.float32(0), arrays["weight"][first : last - 1]],
        features=features,
        feature_at=feature_at,
    )


__all__ = [
    "PAD",
    "Batch",
    "PackReport",
    "collate",
    "cut_stream",
    "feature_sizes",
    "fit",
    "last_landmark",
    "pack",
    "pack_rows",
    "pair_number",
    "unpack",
]
