"""Writes new segments at the end of a document, token by token, exactly as the tokenizer would have written them whole.

In: plans of segments, then the drawn tokens one by one. Out: the model's next input rows, and the finished segments as parts of
the stream. The grammar says what may come next. Positions come from the same `StreamBuilder` as in training: a template of the
segment gives them in advance, and when it is complete the real one takes its place, so that what the cache has seen and what
`encode` gives are the same.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Generator
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

import numpy as np

from weft.inference.feed import Part, part_of, row_of
from weft.inference.templates import EMPTY, template
from weft.tokenizers.build import StreamBuilder
from weft.tokenizers.bundle import StreamTokenizer
from weft.tokenizers.forms import first_id
from weft.tokenizers.grammar import Grammar, Piece, Range, Want
from weft.tokenizers.interleave import Prepared
from weft.tokenizers.plan import PRESETS
from weft.tokenizers.segment import Segment, Text
from weft.tokenizers.stream import Stream, join


@dataclass(frozen=True, slots=True)
class Ask:
    """One position: `legal` are ids of one output slice, ascending. A single one is forced: there is nothing to choose."""

    legal: np.ndarray
    modality: str
    slice: int

    @property
    def forced(self) -> bool:
        return len(self.legal) == 1


Script = Generator[Ask, int, None]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """One segment to write, every size resolved."""

    want: Want
    kept: np.ndarray | None = None
    """int64 codes that are forced, by place in the body; -1 and beyond the end = drawn."""
    start: int | None = None
    """ns on the document's clock, None without a clock."""
    rate_hz: float | None = None
    """Frames, readings or steps a second."""
    fields: dict[str, Any] = field(default_factory=dict)
    """Fields of the produced segment that its tokens do not say (kind, channels, units, rate_hz, space)."""

    @property
    def modality(self) -> str:
        return self.want.modality


@dataclass(frozen=True)
class _Form:
    """The rows of a segment whose codes are not known yet: head, body, closing token."""

    stream: Stream
    head: int
    """Tokens before the body."""
    is_real: bool
    """It is already part of the document."""


def fork(builder: StreamBuilder) -> StreamBuilder:
    """An independent continuation of the same document."""
    new = copy.copy(builder)
    new.placer = replace(builder.placer, counts=dict(builder.placer.counts))
    return new


class Writer:
    """The end of one document that is being written."""

    def __init__(self, tokenizer: StreamTokenizer, builder: StreamBuilder, stop: tuple[str, ...] = ()) -> None:
        """`builder` has written the document so far; the writer goes on with it, so hand in a `fork` to keep yours.

        A text that holds one of the strings `stop` is closed.
        """
        self.tokenizer, self.builder, self.stop = tokenizer, builder, stop
        self.vocabulary, self.entries = builder.vocabulary, builder.registry
        self.pending: list[Part] = []
        """Tokens that the model has not read yet."""
        self.written: list[Stream] = []
        """Finished segments."""
        self.limited = False
        """Whether a limit has closed a body."""
        self.stopped = False
        """Whether a stop string has closed a text."""
        self.grammar: Grammar | None = None
        """State of the segment that is being written."""

    def write(self, plan: Plan) -> Script:
        """Opener, shape, body and closing token of one segment."""
        return self._write(plan, None)

    def write_any(self, choices: Callable[[], dict[str, Plan]], most: int) -> Script:
        """Segments of the model's own choice among `choices()`, asked anew for each, until it closes the document; at most
        `most` tokens. A clocked segment goes on where its plan says; its timestamp, if one is due, is its first token."""
        end = self.vocabulary.special["</doc>"]
        left = most
        while left > 0:
            plans = choices()
            firsts = {name: self._first(plan) for name, plan in plans.items()}
            closing = ((end, end + 1),) if self.written else ()
            token = yield Ask(_ids((*(r for ranges in firsts.values() for r in ranges), *closing)), "text", 0)
            if token == end:
                self.written.append(self.builder.close())
                self.pending.append(part_of(self.written[-1]))
                return
            name = next(n for n, ranges in firsts.items() if any(low <= token < high for low, high in ranges))
            want = plans[name].want
            room = left if want.max_tokens is None else min(left, want.max_tokens)
            yield from self._write(replace(plans[name], want=replace(want, max_tokens=max(room, want.min_tokens))), token)
            left -= len(self.written[-1])
        self.limited = True

    def _first(self, plan: Plan) -> list[Range]:
        """What a segment may begin with: a timestamp where one is due, else its opener, or text."""
        if plan.start is not None and self.builder.config.timestamps:
            shape = plan.want.shape or (1,) * len(self.entries[plan.modality].shape)
            form = self._preview(plan, shape, self._unit(shape, plan))
            if self._stamps(plan, form):
                token = int(form.stream.ids[0])
                return [(token, token + 1)]
        return self._grammar(plan.want).legal()

    def _stamps(self, plan: Plan, form: _Form) -> int:
        """Tokens of the timestamp before the opener."""
        entry = self.entries[plan.modality]
        return form.head - (1 + len(entry.shape) if entry.opener else 0)

    def _write(self, plan: Plan, drawn: int | None) -> Script:
        """`drawn` is the segment's first token, if it was drawn before the plan was known."""
        entry = self.entries[plan.modality]
        self.grammar = grammar = self._grammar(plan.want)
        shape = plan.want.shape if entry.shape else ()
        # The head does not depend on the shape: while that is unknown, the smallest one serves.
        form = self._form(plan, shape) if shape is not None else self._preview(plan, (1,) * len(entry.shape), 1)
        stamps = self._stamps(plan, form)
        for i in range(stamps):
            if drawn is None:
                yield Ask(form.stream.ids[i : i + 1], plan.modality, 0)
            drawn = None
            self.pending.append(row_of(form.stream, i, int(form.stream.ids[i])))
        written = stamps
        while not grammar.done:
            if written == form.head and shape is None and grammar.open is not None:
                shape = tuple(grammar.open.shape)
                form = self._form(plan, shape)
            if drawn is not None:
                token, drawn = drawn, None
            elif self._meets_stop(plan, grammar):
                token = yield Ask(np.array([self.vocabulary.special[entry.closer]], np.int64), plan.modality, 0)
                self.stopped = True
            elif (kept := self._kept(plan, written - form.head)) is not None:
                token = yield Ask(np.array([kept], np.int64), plan.modality, grammar.output_slice)
            else:
                token = yield Ask(_ids(tuple(grammar.legal())), plan.modality, grammar.output_slice)
            grammar.push(token)
            if not grammar.done:
                self.pending.append(row_of(form.stream, written, token))
                written += 1
        piece = grammar.pieces[0]
        self._finish(plan, piece, form)
        self.limited |= not self.stopped and self._is_full(plan, piece)

    def _form(self, plan: Plan, shape: tuple[int, ...]) -> _Form:
        """The segment at its longest. Where its length is certain it is written at once, and only its codes are missing."""
        entry, want = self.entries[plan.modality], plan.want
        unit = self._unit(shape, plan)
        assert want.max_tokens is not None
        length = int(np.prod(shape)) if entry.fixed else max(want.max_tokens // unit, 1) * unit
        if entry.fixed or want.min_tokens == length:
            real = self._add(self.builder, plan, shape, np.zeros(length, np.int64))
            return _Form(real, len(real) - length - 1, True)
        return self._preview(plan, shape, length)

    def _preview(self, plan: Plan, shape: tuple[int, ...], length: int) -> _Form:
        """A segment of `length` codes from a copy of the builder."""
        stream = self._add(fork(self.builder), plan, shape, np.zeros(length, np.int64))
        return _Form(stream, len(stream) - length - 1, False)

    def _finish(self, plan: Plan, piece: Piece, form: _Form) -> None:
        """The real segment; its closing token is the last row that the model still has to read."""
        real = form.stream
        if form.is_real:
            real.ids[form.head : form.head + len(piece.codes)] = piece.codes + self._zero(plan)
        else:
            real = self._add(self.builder, plan, piece.shape, piece.codes)
        self.written.append(real)
        self.grammar = None
        self.pending.append(row_of(real, len(real) - 1, int(real.ids[-1])))

    def _is_full(self, plan: Plan, piece: Piece) -> bool:
        """Whether a limit, and not the model or a stated length, has closed the piece."""
        most = plan.want.max_tokens
        if self.entries[plan.modality].fixed or most is None or plan.want.min_tokens == most:
            return False
        return len(piece.codes) + self._unit(piece.shape, plan) > most

    def _unit(self, shape: tuple[int, ...], plan: Plan) -> int:
        """The body's length is a multiple of it."""
        entry = self.entries[plan.modality]
        return shape[entry.shape.index(entry.unit)] if entry.unit and plan.want.span != "chunks" else 1

    def _add(self, builder: StreamBuilder, plan: Plan, shape: tuple[int, ...], codes: np.ndarray) -> Stream:
        entry = self.entries[plan.modality]
        owner = self.tokenizer.tokenizers.get(plan.modality)
        steps = 1 if plan.want.span == "chunks" else 0
        tokens = template(entry, owner, shape, len(codes), plan.rate_hz, together=bool(steps))
        segment = empty_segment(plan)
        order = list(self.entries).index(plan.modality)
        item = Prepared(segment, entry, order, replace(tokens, codes=codes), plan.start, len(builder.info))
        stream = builder.add([item], PRESETS["instruct"])
        assert stream is not None
        return stream

    def _meets_stop(self, plan: Plan, grammar: Grammar) -> bool:
        if not self.stop or plan.modality != "text" or grammar.open is None:
            return False
        codes = np.array(grammar.open.codes, np.int64)
        text = self.tokenizer.tokenizers["text"].decode(codes, (len(codes),))
        return isinstance(text, Text) and any(s in text.text for s in self.stop) and len(codes) >= plan.want.min_tokens

    def _kept(self, plan: Plan, place: int) -> int | None:
        if plan.kept is None or not 0 <= place < len(plan.kept) or plan.kept[place] < 0:
            return None
        return int(plan.kept[place]) + self._zero(plan)

    def _zero(self, plan: Plan) -> int:
        """Id of code 0."""
        return first_id(self.entries[plan.modality], self.vocabulary)

    def _grammar(self, want: Want) -> Grammar:
        return self.tokenizer.grammar(sequence=[want], holes=False, inside=True)


def empty_segment(plan: Plan) -> Segment:
    """The segment without its content: what `StreamBuilder` notes of it."""
    return replace(EMPTY[plan.modality], start=plan.start, role="target", **plan.fields)


@lru_cache(maxsize=256)
def _ids(ranges: tuple[Range, ...]) -> np.ndarray:
    """int64, ascending: the ids of some ranges."""
    ids = np.unique(np.concatenate([np.arange(first, end) for first, end in ranges]))
    ids.setflags(write=False)
    return ids


def rewrite(tokenizer: StreamTokenizer, builder: StreamBuilder, parts: tuple[Stream, ...]) -> Stream:
    """Finished segments with the codes they have, written again at the end of another document."""
    builder = fork(builder)
    out = []
    for part in parts:
        for info, codes in tokenizer.segments(part):
            entry = builder.registry[info.modality]
            rate, owner = info.fields.get("rate_hz"), tokenizer.tokenizers.get(info.modality)
            shape = info.grid[len(info.grid) - len(entry.shape) :] if entry.shape else ()
            together = info.modality == "action" and len(codes) != int(np.prod(info.grid))
            tokens = replace(template(entry, owner, shape, len(codes), rate, together=together), codes=codes)
            fields = {k: v for k, v in info.fields.items() if k in ("kind", "rate_hz", "channels", "units", "space")}
            segment = replace(EMPTY[info.modality], start=info.start, role="target", **fields)
            order = list(builder.registry).index(info.modality)
            stream = builder.add([Prepared(segment, entry, order, tokens, info.start, len(builder.info))], PRESETS["instruct"])
            assert stream is not None
            out.append(stream)
        if part.ids[-1] == builder.vocabulary.special["</doc>"]:
            out.append(builder.close())
    return join(out)
