"""Tokenised segments in, the arrays of a stream out.

`StreamBuilder` keeps what one call leaves for the next (positions, numbering), so that a session that pushes segments one by
one writes what a whole document would.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from weft.tokenizers.check import check, draw_targets
from weft.tokenizers.clock import segment_times
from weft.tokenizers.forms import forms_of
from weft.tokenizers.interleave import UNLIMITED, Block, Prepared, interleave
from weft.tokenizers.layout import Layout
from weft.tokenizers.plan import LossPlan
from weft.tokenizers.positions import Placer, channels_of, place_blocks
from weft.tokenizers.registry import Modality, by_name
from weft.tokenizers.resample import resampled
from weft.tokenizers.stream import NO_TIME, SegmentInfo, Stream, StreamConfig, StreamError
from weft.tokenizers.vocabulary import Vocabulary

_COMMON = ("start", "role", "name")
TIME_TOKENS = 5
_CENTISECOND = 10_000_000
_NOTHING = np.array([-1], np.int64)
"""Codes of a segment without tokens."""


class StreamBuilder:
    """Writes one document, in one go or part by part."""

    def __init__(
        self, vocabulary: Vocabulary, registry: Sequence[Modality], config: StreamConfig, feature_sizes: dict[str, int]
    ):
        self.vocabulary, self.config, self.feature_sizes = vocabulary, config, feature_sizes
        self.registry = by_name(tuple(registry))
        self.forms = forms_of(vocabulary, tuple(registry))
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
        order = list(dict.fromkeys(i for block in blocks for i in block.segment.tolist()))
        if order == list(range(len(items))):
            return order, blocks
        number = np.empty(len(items), np.int64)
        number[order] = np.arange(len(order))
        return order, [block._replace(segment=number[block.segment]) for block in blocks]

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
            return UNLIMITED
        rest = math.prod(item.tokens.grid[1:])
        return max((self.vocabulary.numbers - 1) * rest // item.tokens.group, 1)

    def _modalities(self, items: Sequence[Prepared]) -> np.ndarray:
        return np.array([self.number_of[item.entry.name] for item in items], np.int64)

    def _pieces(self, items: Sequence[Prepared], blocks: Sequence[Block]) -> Layout:
        segment = np.concatenate([block.segment for block in blocks])
        group = np.array([item.tokens.group for item in items], np.int64)[segment]
        first = np.concatenate([block.first for block in blocks]) * group
        end = np.concatenate([block.end for block in blocks]) * group
        stamp = np.zeros(len(segment), bool)
        if self.config.timestamps:
            stamp = self._stamps(items, segment, first)
        head = self.forms.opening[self._modalities(items)][segment] + TIME_TOKENS * stamp
        return Layout.of(segment, first, end, stamp, head, np.array([len(item.tokens) for item in items], np.int64))

    def _stamps(self, items: Sequence[Prepared], segment: np.ndarray, first: np.ndarray) -> np.ndarray:
        """Which pieces get a timestamp: clocked ones whose centisecond was not the last one written."""
        starts = [int(item.clock[0]) for item in items if item.start is not None]
        if self.clock_start is None and starts:
            self.clock_start = min(starts)
        stamp = np.zeros(len(segment), bool)
        for p, (i, at) in enumerate(zip(segment, first)):
            if items[i].start is None:
                continue
            now = self._centiseconds(int(items[i].clock[at]))
            stamp[p] = now != self._stamped
            self._stamped = now
        return stamp

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
        forms, segment, piece, shown = self.forms, layout.segment, layout.piece, layout.shown
        of_piece = self._modalities(items)[segment]
        modality = of_piece[piece]

        codes = np.concatenate([item.tokens.codes if len(item.tokens) else _NOTHING for item in items])[shown]
        ids = np.where(codes >= 0, codes + forms.zero[modality], forms.hole[modality])
        ids[layout.tail] = forms.closer[of_piece]
        self._heads(ids, items, layout, of_piece)

        clocked = np.array([item.start is not None for item in items], bool)[segment][piece]
        clock = np.concatenate([item.clock for item in items])[shown]
        channel = np.concatenate([channels_of(item) for item in items])[shown]

        weight = np.array(weights, np.float32)[segment][piece]
        weight[layout.tail[forms.fixed[of_piece]]] = 0.0
        landmark = np.zeros(len(piece), bool)
        landmark[layout.tail] = True

        known = len(self.info)
        self.info += tuple(map(_info, items, media, targets))
        features, feature_at = self._features(items, targets, layout)
        return Stream(
            ids=ids,
            modality=modality,
            position=place_blocks(self.placer, items, layout, blocks).astype(np.int32),
            time=np.where(clocked, clock, NO_TIME),
            channel=np.where(layout.body, channel, 0),
            segment=segment[piece] + known,
            landmark=landmark,
            two_way=self._two_way(items, targets, layout),
            output_slice=np.where(layout.place < 0, 0, forms.slice[modality]),
            weight=weight,
            features=features,
            feature_at=feature_at,
            info=self.info,
        )

    def _heads(self, ids: np.ndarray, items: Sequence[Prepared], layout: Layout, of_piece: np.ndarray) -> None:
        """Write timestamps, opening tokens and shapes."""
        vocabulary, forms, segment = self.vocabulary, self.forms, layout.segment
        for p in layout.stamp.nonzero()[0]:
            left = self._centiseconds(int(items[segment[p]].clock[layout.first[p]]))
            ids[layout.start[p]] = vocabulary.special["<time>"]
            for digit in range(4, 0, -1):
                left, low = divmod(left, 100)
                ids[layout.start[p] + digit] = vocabulary.number(low)
        openings = [self._opening(item) for item in items]
        width = max(map(len, openings))
        table = np.array([row + [0] * (width - len(row)) for row in openings], np.int64)
        nth = layout.inside - (TIME_TOKENS * layout.stamp)[layout.piece]
        at = ((nth >= 0) & (layout.place < 0)).nonzero()[0]
        ids[at] = table[segment[layout.piece[at]], nth[at]]
        # Of a segment in several pieces each states its own share.
        p = forms.fixed[of_piece].nonzero()[0]
        if len(p):
            rest = np.array([math.prod(item.tokens.grid[1:]) for item in items], np.int64)[segment[p]]
            first = layout.start[p] + layout.head[p] - forms.opening[of_piece[p]] + 1
            ids[first] = vocabulary.spans["numbers"][0] + layout.count[p] // rest

    def _opening(self, item: Prepared) -> list[int]:
        """Ids of the opening token and the shape of a segment."""
        entry, grid = item.entry, item.tokens.grid
        if entry.opener is None:
            return []
        number = self.vocabulary.spans["numbers"][0]
        return [self.vocabulary.special[entry.opener], *(number + value for value in grid[len(grid) - len(entry.shape) :])]

    def _two_way(self, items: Sequence[Prepared], targets: Sequence[bool], layout: Layout) -> np.ndarray:
        """int32 [tokens]: the numbers of the two-way blocks of observed images and frames, -1 elsewhere."""
        two_way = np.full(len(layout.piece), -1, np.int32)
        sizes = [0 if target else _block_size(item) for item, target in zip(items, targets)]
        if not any(sizes):
            return two_way
        size = np.array(sizes, np.int64)[layout.segment]
        blocks = np.where(size > 0, layout.count // np.maximum(size, 1), 0)
        before = self.blocks + np.cumsum(blocks) - blocks
        at = (layout.body & (size > 0)[layout.piece]).nonzero()[0]
        p = layout.piece[at]
        two_way[at] = before[p] + layout.place[at] // size[p]
        self.blocks += int(blocks.sum())
        return two_way

    def _features(
        self, items: Sequence[Prepared], targets: Sequence[bool], layout: Layout
    ) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        """Rows and places of the features of observed segments."""
        features: dict[str, np.ndarray] = {}
        feature_at: dict[str, np.ndarray] = {}
        of = layout.segment[layout.piece]
        for name, size in self.feature_sizes.items():
            held = [item.tokens.features if item.entry.name == name and not aim else None for item, aim in zip(items, targets)]
            rows = [part for part in held if part is not None]
            if not rows:
                features[name], feature_at[name] = np.zeros((0, size), np.float32), np.zeros(0, np.int64)
                continue
            lengths = np.array([0 if part is None else len(part) for part in held], np.int64)
            moved = lengths.cumsum() - lengths - layout.offset
            at = (layout.body & (lengths > 0)[of]).nonzero()[0]
            feature_at[name] = at
            features[name] = np.concatenate(rows)[layout.shown[at] + moved[of[at]]].astype(np.float32, copy=False)
            if features[name].shape[1:] != (size,):
                raise StreamError(f"{name} features have width {features[name].shape[1:]}, the tokenizer says {size}")
        return features, feature_at


def _block_size(item: Prepared) -> int:
    """Tokens of one two-way block, 0 for modalities without."""
    if not item.entry.block:
        return 0
    shape = dict(zip(item.entry.shape, item.tokens.grid))
    return math.prod(shape[name] for name in item.entry.block)


def _info(item: Prepared, medium: Prepared, target: bool) -> SegmentInfo:
    """What is known of an item, and of the medium that it was before it was resampled."""
    known = (*_COMMON, item.entry.content)
    fields = {k: v for k, v in vars(item.segment).items() if k not in known}
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
