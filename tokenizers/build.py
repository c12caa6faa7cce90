"""Tokenised segments in, the arrays of a stream out.

`StreamBuilder` keeps what one call leaves for the next (positions, numbering), so that a session that pushes segments one by
one writes what a whole document would.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from weft.tokenizers.check import check, draw_targets, first_id
from weft.tokenizers.clock import segment_times
from weft.tokenizers.interleave import Block, Prepared, interleave
from weft.tokenizers.layout import Layout, grouped
from weft.tokenizers.plan import LossPlan
from weft.tokenizers.positions import Placer, patch_channel, place_blocks, places_of
from weft.tokenizers.registry import Modality, by_name
from weft.tokenizers.resample import resampled
from weft.tokenizers.stream import NO_TIME, SegmentInfo, Stream, StreamConfig, StreamError
from weft.tokenizers.vocabulary import Vocabulary

_COMMON = ("start", "role", "name")
TIME_TOKENS = 5
_CENTISECOND = 10_000_000


class StreamBuilder:
    """Writes one document, in one go or part by part."""

    def __init__(
        self, vocabulary: Vocabulary, registry: Sequence[Modality], config: StreamConfig, feature_sizes: dict[str, int]
    ):
        self.vocabulary, self.config, self.feature_sizes = vocabulary, config, feature_sizes
        self.registry = by_name(tuple(registry))
        self.number_of = {name: i for i, name in enumerate(vocabulary.modalities)}
        self.placer = Placer(config.tick_ns)
        self.info: tuple[SegmentInfo, ...] = ()
        self.blocks = 0
        """Two-way blocks written."""
        self.clock_start: int | None = None
        self._stamped = -1
        self._text_weight = 0.0

    # -- the document's own tokens

    def open(self) -> Stream:
        """`<doc>`."""
        return self._own("<doc>", 0.0, landmark=True)

    def close(self) -> Stream:
        """`</doc>`, learnt where the last segment is."""
        return self._own("</doc>", self._text_weight, landmark=False)

    def _own(self, token: str, weight: float, landmark: bool) -> Stream:
        return self.single(self.vocabulary.special[token], 0, self.placer.ordinal(1), slice=0, landmark=landmark, weight=weight)

    def single(self, token: int, modality: int, position: np.ndarray, *, slice: int, **fields: Any) -> Stream:
        """One token as a stream."""
        values = {"time": NO_TIME, "channel": 0, "segment": -1, "landmark": False, "weight": 0.0} | fields
        return Stream(
            ids=np.array([token], np.int64),
            modality=np.array([modality], np.int64),
            position=position.astype(np.int32),
            time=np.array([values["time"]], np.int64),
            channel=np.array([values["channel"]], np.int64),
            segment=np.array([values["segment"]], np.int64),
            landmark=np.array([values["landmark"]]),
            two_way=np.full(1, -1, np.int32),
            output_slice=np.array([slice], np.int64),
            weight=np.array([values["weight"]], np.float32),
            features={m: np.zeros((0, size), np.float32) for m, size in self.feature_sizes.items()},
            feature_at={m: np.zeros(0, np.int64) for m in self.feature_sizes},
            info=self.info,
        )

    # -- segments

    def add(
        self,
        items: Sequence[Prepared],
        plan: LossPlan | None = None,
        rng: np.random.Generator | None = None,
    ) -> Stream | None:
        """The tokens of further segments; None if there are none. Raises StreamError naming the segment."""
        if not items:
            return None
        for item in items:
            check(item, self.vocabulary)
        order, blocks = self._order(items)
        media = items = [items[i] for i in order]
        targets = draw_targets(items, plan, rng)
        if self.config.resample:
            items = [item if target else self._resampled(item) for item, target in zip(items, targets)]
            order, blocks = self._order(items)
            items, media, targets = [items[i] for i in order], [media[i] for i in order], [targets[i] for i in order]
        weights = [plan.weight(item.entry.name, target) if plan else 0.0 for item, target in zip(items, targets)]
        for item, target, weight in zip(items, targets, weights):
            if not target and weight and item.entry.opener:
                raise StreamError(
                    f"the plan gives observed {item.entry.name} a loss weight of {weight}, but it shows its features; "
                    "move the weight to plan.target"
                )
        layout = self._pieces(items, blocks)
        stream = self._write(items, media, targets, weights, layout, blocks)
        self._text_weight = plan.weight("text", True) if plan and targets[int(layout.segment[-1])] else 0.0
        return stream

    def _order(self, items: Sequence[Prepared]) -> tuple[list[int], list[Block]]:
        """The items by first appearance, and the blocks in which they stand, numbered so."""
        limits = [self._limit(item) for item in items]
        blocks = interleave(items, self.config.chunk_ns, limits, joined=not self.config.timestamps)
        order = list(dict.fromkeys(int(i) for block in blocks for i in block.segment))
        number = np.empty(len(items), np.int64)
        number[order] = np.arange(len(order))
        return order, [replace(block, segment=number[block.segment]) for block in blocks]

    def _resampled(self, item: Prepared) -> Prepared:
        """An observed segment as the model reads it."""
        shape = self.config.resample.get(item.entry.name)
        if shape is None:
            return item
        item = resampled(item, shape)
        check(item, self.vocabulary)
        return item

    def _limit(self, item: Prepared) -> int:
        """Most groups in one piece: as many as the first number of a fixed shape can state."""
        if not item.entry.fixed or item.entry.whole:
            return 1 << 40
        rest = int(np.prod(item.tokens.grid[1:]))
        return max((self.vocabulary.numbers - 1) * rest // item.tokens.group, 1)

    def _pieces(self, items: Sequence[Prepared], blocks: Sequence[Block]) -> Layout:
        segment = np.concatenate([block.segment for block in blocks])
        number = np.repeat(np.arange(len(blocks)), [len(block.segment) for block in blocks])
        group = np.array([item.tokens.group for item in items], np.int64)[segment]
        first = np.concatenate([block.first for block in blocks]) * group
        end = np.concatenate([block.end for block in blocks]) * group
        stamp = np.zeros(len(segment), bool)
        if self.config.timestamps:
            stamp = self._stamps(items, segment, first)
        opener = np.array([1 + len(item.entry.shape) if item.entry.opener else 0 for item in items], np.int64)[segment]
        return Layout.of(segment, first, end, number, stamp, opener + TIME_TOKENS * stamp)

    def _stamps(self, items: Sequence[Prepared], segment: np.ndarray, first: np.ndarray) -> np.ndarray:
        """Which pieces get a timestamp: clocked ones whose centisecond was not the last one written."""
        starts = [
            item.start + (int(item.tokens.time[0]) if len(item.tokens) else 0) for item in items if item.start is not None
        ]
        if self.clock_start is None and starts:
            self.clock_start = min(starts)
        stamp = np.zeros(len(segment), bool)
        for p, (i, at) in enumerate(zip(segment, first)):
            if items[i].start is None:
                continue
            now = self._centiseconds(self._time_of(items[i], int(at)))
            stamp[p] = now != self._stamped
            self._stamped = now
        return stamp

    def _time_of(self, item: Prepared, token: int) -> int:
        start = item.start or 0
        return start + (int(item.tokens.time[min(token, len(item.tokens) - 1)]) if len(item.tokens) else 0)

    def _centiseconds(self, time: int) -> int:
        assert self.clock_start is not None
        count = (time - self.clock_start) // _CENTISECOND
        if not 0 <= count < 100**4:
            raise StreamError(
                f"a timestamp of {count / 100:.0f} s does not fit four digits of base 100; set stream.timestamps=false"
            )
        return count

    def _write(
        self,
        items: Sequence[Prepared],
        media: Sequence[Prepared],
        targets: Sequence[bool],
        weights: Sequence[float],
        layout: Layout,
        blocks: Sequence[Block],
    ) -> Stream:
        vocabulary, segment = self.vocabulary, layout.segment
        entries = [item.entry for item in items]

        def per_segment(values: Sequence[Any], dtype: Any = np.int64) -> np.ndarray:
            return np.array(values, dtype)[segment]

        head, piece, inside = layout.head, layout.piece, layout.inside
        total = len(piece)
        body_at = np.flatnonzero((inside >= head[piece]) & (inside < (head + layout.count)[piece]))
        body_piece = piece[body_at]
        tail_at = layout.start + head + layout.count

        # All segments' tokens side by side; `take` says which of them each body position shows.
        offset = np.cumsum([0] + [len(item.tokens) for item in items])
        take = (layout.first + offset[segment] - head)[body_piece] + inside[body_at]
        codes = np.concatenate([item.tokens.codes for item in items]).astype(np.int64)
        places = np.concatenate([places_of(item) for item in items])
        times = np.concatenate([item.tokens.time + (item.start or 0) for item in items])
        clocked = per_segment([item.start is not None for item in items], bool)

        ids = np.empty(total, np.int64)
        code_zero = per_segment([first_id(e, vocabulary) for e in entries])
        hole = per_segment([vocabulary.special.get(e.hole, -1) for e in entries])
        ids[body_at] = np.where(codes[take] >= 0, codes[take] + code_zero[body_piece], hole[body_piece])
        ids[tail_at] = per_segment([vocabulary.special[e.closer] for e in entries])
        self._heads(ids, items, layout)

        time = np.full(total, NO_TIME, np.int64)
        first_time = np.array([self._time_of(items[i], int(at)) for i, at in zip(segment, layout.first)], np.int64)
        last_time = np.array([self._time_of(items[i], max(int(at) - 1, 0)) for i, at in zip(segment, layout.end)], np.int64)
        on_clock = clocked[piece]
        time[on_clock] = first_time[piece[on_clock]]
        body_clock = on_clock[body_at]
        time[body_at[body_clock]] = times[take[body_clock]]
        time[tail_at[clocked]] = last_time[clocked]

        channel = np.zeros(total, np.int64)
        channelled = per_segment([e.place == "channel" for e in entries], bool)[body_piece]
        channel[body_at[channelled]] = places[take[channelled], 0]
        gridded = per_segment([e.place == "grid" for e in entries], bool)[body_piece]
        channel[body_at[gridded]] = patch_channel(places[take[gridded]])

        target = per_segment(targets, bool)
        weight = per_segment(weights, np.float32)
        fixed = per_segment([e.fixed for e in entries], bool)
        weight_at = weight[piece]
        weight_at[tail_at[fixed]] = 0.0

        output_slice = np.zeros(total, np.int64)
        slice_of = per_segment([vocabulary.slice_of[e.name] for e in entries])
        output_slice[body_at] = slice_of[body_piece]
        output_slice[tail_at] = slice_of

        two_way = np.full(total, -1, np.int32)
        self._two_way(two_way, items, layout, ~target, body_at, body_piece)

        landmark = np.zeros(total, bool)
        landmark[tail_at] = True
        known = len(self.info)
        self.info += tuple(map(_info, items, media, targets))
        features, feature_at = self._features(items, targets, body_at, body_piece, take, offset, segment)
        return Stream(
            ids=ids,
            modality=per_segment([self.number_of[e.name] for e in entries])[piece],
            position=place_blocks(self.placer, items, layout, blocks).astype(np.int32),
            time=time,
            channel=channel,
            segment=segment[piece] + known,
            landmark=landmark,
            two_way=two_way,
            output_slice=output_slice,
            weight=weight_at.astype(np.float32),
            features=features,
            feature_at=feature_at,
            info=self.info,
        )

    def _heads(
        self,
        ids: np.ndarray,
        items: Sequence[Prepared],
        layout: Layout,
    ) -> None:
        """Write timestamps, opening tokens and shapes."""
        vocabulary = self.vocabulary
        number = vocabulary.spans["numbers"][0]
        for p in np.flatnonzero(layout.stamp):
            left = self._centiseconds(self._time_of(items[layout.segment[p]], int(layout.first[p])))
            ids[layout.start[p]] = vocabulary.special["<time>"]
            for digit in range(4, 0, -1):
                left, low = divmod(left, 100)
                ids[layout.start[p] + digit] = vocabulary.number(low)
        begin = layout.start + TIME_TOKENS * layout.stamp
        for i, mine in grouped(layout.segment):
            entry, grid = items[i].entry, items[i].tokens.grid
            if entry.opener is None:
                continue
            ids[begin[mine]] = vocabulary.special[entry.opener]
            shape = grid[len(grid) - len(entry.shape) :]
            for j, value in enumerate(shape):
                ids[begin[mine] + 1 + j] = number + value
            if entry.fixed:
                ids[begin[mine] + 1] = number + layout.count[mine] // int(np.prod(shape[1:]))

    def _two_way(
        self,
        two_way: np.ndarray,
        items: Sequence[Prepared],
        layout: Layout,
        observed: np.ndarray,
        body_at: np.ndarray,
        body_piece: np.ndarray,
    ) -> None:
        """Number the two-way blocks of observed images and frames."""
        size = np.array([_block_size(item) for item in items], np.int64)[layout.segment]
        size = np.where(observed, size, 0)
        per_piece = np.where(size > 0, layout.count // np.maximum(size, 1), 0)
        if not per_piece.any():
            return
        before = self.blocks + np.cumsum(per_piece) - per_piece
        mine = size[body_piece] > 0
        at, p = body_at[mine], body_piece[mine]
        two_way[at] = before[p] + (layout.inside[at] - layout.head[p]) // size[p]
        self.blocks += int(per_piece.sum())

    def _features(
        self,
        items: Sequence[Prepared],
        targets: Sequence[bool],
        body_at: np.ndarray,
        body_piece: np.ndarray,
        take: np.ndarray,
        offset: np.ndarray,
        segment: np.ndarray,
    ) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        features: dict[str, np.ndarray] = {}
        feature_at: dict[str, np.ndarray] = {}
        for name, size in self.feature_sizes.items():
            held = [item.tokens.features if item.entry.name == name and not aim else None for item, aim in zip(items, targets)]
            rows = [part for part in held if part is not None]
            if not rows:
                features[name], feature_at[name] = np.zeros((0, size), np.float32), np.zeros(0, np.int64)
                continue
            lengths = np.array([0 if part is None else len(part) for part in held], np.int64)
            row_offset = np.cumsum(lengths) - lengths
            shown = (lengths > 0)[segment[body_piece]]
            of = segment[body_piece[shown]]
            feature_at[name] = body_at[shown]
            features[name] = np.concatenate(rows)[take[shown] - offset[of] + row_offset[of]].astype(np.float32, copy=False)
            if features[name].shape[1:] != (size,):
                raise StreamError(f"{name} features have width {features[name].shape[1:]}, the tokenizer says {size}")
        return features, feature_at


def _block_size(item: Prepared) -> int:
    """Tokens of one two-way block, 0 for modalities without."""
    shape = dict(zip(item.entry.shape, item.tokens.grid))
    return int(np.prod([shape[name] for name in item.entry.block])) if item.entry.block else 0


def _info(item: Prepared, medium: Prepared, target: bool) -> SegmentInfo:
    """What is known of an item, and of the medium that it was before it was resampled."""
    fields = {k: v for k, v in vars(item.segment).items() if k not in (*_COMMON, item.entry.content)}
    if fields.get("times") is not None:
        fields["times"] = tuple(segment_times(item.segment, len(fields["times"])).tolist())
    return SegmentInfo(
        modality=item.entry.name,
        grid=tuple(int(v) for v in item.tokens.grid),
        group=item.tokens.group,
        start=item.start,
        target=target,
        source=item.source,
        name=item.segment.name,
        times=item.tokens.time[:: item.tokens.group],
        fields=fields,
        medium=None if medium is item else _info(medium, medium, target),
    )
