"""Which token may come next: a state machine over the vocabulary, read from the registry.

In: ids one by one (`push`). Out: the legal ids of the next token (`legal`, `mask`), the output slice in which it lies, and the
finished pieces. It accepts every stream that is written here and refuses, with position and reason, every stream that could
not be decoded. Wants narrow it for generation: which modality next, its shape, its length, its legal codes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from weft.tokenizers.registry import REGISTRY, Modality, by_name
from weft.tokenizers.stream import StreamError
from weft.tokenizers.vocabulary import Vocabulary
from weft.tokenizers.wants import Piece, Range, Want

STAMP_DIGITS = 4
STAMP_BASE = 100


@dataclass
class _Open:
    """The piece that is being read."""

    entry: Modality
    start: int
    want: Want | None
    shape: list[int] = field(default_factory=list)
    codes: list[int] = field(default_factory=list)
    span: str | None = None
    stamp: int | None = None


class Grammar:
    """Reads a stream token by token. `push` raises StreamError and leaves the state as it was."""

    def __init__(
        self,
        vocabulary: Vocabulary,
        registry: Sequence[Modality] = REGISTRY,
        *,
        sequence: Sequence[Want] | None = None,
        allowed: Iterable[Want] | None = None,
        holes: bool = True,
        inside: bool = False,
        stamps: bool = True,
        forbidden: Iterable[int] = (),
    ) -> None:
        """`sequence`: exactly these pieces, then done. `allowed`: any of these, until `</doc>`. Neither: anything.

        `holes=False` forbids content without a code (generation). `inside` starts after `<doc>`. `stamps=False` forbids
        timestamps. `forbidden` are ids that no text may use (pieces that stand for nothing).
        """
        self.vocabulary = vocabulary
        self.registry = {name: e for name, e in by_name(tuple(registry)).items() if name in vocabulary.modalities}
        self.sequence = None if sequence is None else list(sequence)
        self.allowed = None if allowed is None else {want.modality: want for want in allowed}
        self.holes, self.stamps = holes, stamps and vocabulary.numbers >= STAMP_BASE
        self.at = 0
        """Tokens read."""
        self.pieces: list[Piece] = []
        self.phase: Literal["start", "between", "stamp", "shape", "body", "end"] = "between" if inside else "start"
        self.open: _Open | None = None
        self._stamp: list[int] | None = None
        self._stamp_start = 0
        self._openers = {vocabulary.special[e.opener]: e for e in self.registry.values() if e.opener}
        self._text = _without(vocabulary.spans["text"], forbidden)
        self._forbidden = frozenset(forbidden)
        for want in (*(self.sequence or ()), *(self.allowed or {}).values()):
            self._check_want(want)

    def _check_want(self, want: Want) -> None:
        entry = self.registry.get(want.modality)
        if entry is None:
            raise StreamError(f"no modality {want.modality!r}; known are {', '.join(self.registry)}")
        if want.span is not None and want.span not in entry.spans:
            raise StreamError(f"{want.modality} has no span {want.span!r}; it has {', '.join(entry.spans)}")
        size = sum(end - first for first, end in self._code_ranges(entry, want, None))
        if size == 0 or (want.codes is not None and want.codes > size):
            raise StreamError(
                f"{want.modality} cannot be generated: {want.codes or 'any'} codes wanted, its span has {size}; "
                "fit its tokenizer and build the vocabulary from it"
            )
        if want.shape is not None:
            if len(want.shape) != len(entry.shape) or any(not 1 <= n < self.vocabulary.numbers for n in want.shape):
                raise StreamError(
                    f"{want.modality} shape {want.shape} must be {len(entry.shape)} numbers ({', '.join(entry.shape)}) "
                    f"from 1 to {self.vocabulary.numbers - 1}"
                )
            unit = want.shape[entry.shape.index(entry.unit)] if entry.unit else 1
            if want.max_tokens is not None and not entry.fixed and want.max_tokens // unit * unit < want.min_tokens:
                raise StreamError(
                    f"{want.modality}: no multiple of {unit} lies in {want.min_tokens}..{want.max_tokens}; raise max_tokens"
                )

    # -- what may come next

    @property
    def done(self) -> bool:
        """Nothing more is to come: the document is closed, or the wanted sequence is there."""
        return self.phase == "end" or (self.phase == "between" and self._stamp is None and self.sequence == [])

    @property
    def between(self) -> bool:
        """No piece is open."""
        return self.phase in ("start", "end") or (self.phase == "between" and self._stamp is None)

    @property
    def output_slice(self) -> int:
        """Index of the output slice of the next token."""
        if self.phase == "body" and self.open is not None:
            return self.vocabulary.slice_of[self.open.entry.name]
        return 0

    @property
    def modality(self) -> str:
        """Modality of the open piece; `text` between pieces."""
        return self.open.entry.name if self.open else "text"

    def legal(self) -> list[Range]:
        """(first, end) ranges of the ids that may come next, ascending; empty when done."""
        if self.done:
            return []
        if self.phase == "start":
            return [_one(self.vocabulary.special["<doc>"])]
        if self.phase == "stamp":
            return [self._numbers(0, min(STAMP_BASE, self.vocabulary.numbers) - 1)]
        if self.phase == "between":
            return _merged(self._legal_between())
        assert self.open is not None
        if self.phase == "shape":
            return [self._numbers(*self._legal_number(self.open))]
        return _merged(self._legal_body(self.open))

    def mask(self) -> np.ndarray:
        """bool [size of the output slice]: which of its ids may come next."""
        first, end = self.vocabulary.slices[self.output_slice]
        mask = np.zeros(end - first, bool)
        for low, high in self.legal():
            mask[low - first : high - first] = True
        return mask

    def _wants(self) -> dict[str, Want | None]:
        """Modalities that may begin now."""
        if self.sequence is not None:
            return {self.sequence[0].modality: self.sequence[0]} if self.sequence else {}
        if self.allowed is not None:
            return dict(self.allowed)
        return dict.fromkeys(self.registry)

    def _legal_between(self) -> list[Range]:
        special = self.vocabulary.special
        ranges: list[Range] = []
        for name, want in self._wants().items():
            entry = self.registry[name]
            if entry.opener:
                ranges.append(_one(special[entry.opener]))
                continue
            ranges += self._text
            if want is None or want.min_tokens == 0:
                ranges.append(_one(special[entry.closer]))
        if self._stamp is None and self.sequence is None:
            ranges.append(_one(special["</doc>"]))
            if self.stamps:
                ranges.append(_one(special["<time>"]))
        return ranges

    def _numbers(self, low: int, high: int) -> Range:
        first = self.vocabulary.spans["numbers"][0]
        return first + low, first + high + 1

    def _legal_number(self, open: _Open) -> Range:
        """(low, high) of the next shape number."""
        place, want = len(open.shape), open.want
        if want is not None and want.shape is not None:
            return want.shape[place], want.shape[place]
        high = self.vocabulary.numbers - 1
        if want is not None and want.max_tokens is not None:
            used = math.prod(open.shape) if open.entry.fixed else 1
            high = max(min(high, want.max_tokens // used), 1)
        return 1, high

    def _legal_body(self, open: _Open) -> list[Range]:
        entry, want, n = open.entry, open.want, len(open.codes)
        closer = _one(self.vocabulary.special[entry.closer])
        if entry.fixed:
            return [closer] if n == math.prod(open.shape) else self._content(open)
        unit = self._unit(open)
        least = want.min_tokens if want else (0 if entry.opener is None else 1)
        most = want.max_tokens if want else None
        ranges = [] if most is not None and n >= most // unit * unit else self._content(open)
        if n % unit == 0 and n >= least:
            ranges = [*ranges, closer]
        return ranges

    def _unit(self, open: _Open) -> int:
        """Body lengths are multiples of it; compressed chunks have a length of their own."""
        if open.entry.unit is None or open.span == "chunks":
            return 1
        return open.shape[open.entry.shape.index(open.entry.unit)]

    def _content(self, open: _Open) -> list[Range]:
        entry = open.entry
        if entry.opener is None:
            return list(self._text)
        ranges = self._code_ranges(entry, open.want, open.span)
        if entry.missing and (open.want is None or open.want.missing):
            ranges.append(_one(self.vocabulary.spans[entry.spans[0]][1]))
        if self.holes and open.want is None:
            ranges.append(_one(self.vocabulary.special[entry.hole]))
        return ranges

    def _code_ranges(self, entry: Modality, want: Want | None, span: str | None) -> list[Range]:
        wanted = span or (want.span if want else None)
        ranges = [self.vocabulary.spans[name] for name in entry.spans if wanted in (None, name)]
        if want is not None and want.codes is not None:
            ranges = [(first, min(end, first + want.codes)) for first, end in ranges]
        return [(first, end) for first, end in ranges if end > first]

    # -- reading

    def push(self, token: int) -> None:
        """Read one id."""
        token = int(token)
        if not any(first <= token < end for first, end in self.legal()):
            raise StreamError(f"token {self.at} ({self._name(token)}) {self._reason(token)}")
        self._advance(token)
        self.at += 1

    def _name(self, token: int) -> str:
        try:
            return self.vocabulary.describe(token)
        except ValueError:
            return f"id {token}"

    def _reason(self, token: int) -> str:
        if not 0 <= token < len(self.vocabulary):
            return f"is outside the vocabulary of {len(self.vocabulary)} ids"
        if self.phase == "end":
            return "comes after </doc>"
        if self.done:
            return "comes after everything that was wanted"
        if token in self._forbidden:
            return "stands for no text"
        ranges = self.legal()
        words = [self._name(a) if b - a == 1 else f"{self._name(a)} .. {self._name(b - 1)}" for a, b in ranges[:6]]
        where = f"inside {self.open.entry.name} at body token {len(self.open.codes)}" if self.open else "between pieces"
        return f"is not legal {where}; expected {' | '.join(words) or 'nothing'}"

    def _advance(self, token: int) -> None:
        special = self.vocabulary.special
        if self.phase == "start":
            self.phase = "between"
        elif self.phase == "stamp":
            assert self._stamp is not None
            self._stamp.append(token - self.vocabulary.spans["numbers"][0])
            if len(self._stamp) == STAMP_DIGITS:
                self.phase = "between"
        elif self.phase == "between":
            if token == special["</doc>"]:
                self.phase = "end"
            elif token == special["<time>"]:
                self.phase, self._stamp, self._stamp_start = "stamp", [], self.at
            else:
                self._begin(token)
        elif self.phase == "shape":
            assert self.open is not None
            self.open.shape.append(token - self.vocabulary.spans["numbers"][0])
            if len(self.open.shape) == len(self.open.entry.shape):
                self.phase = "body"
        else:
            self._body(token)

    def _begin(self, token: int) -> None:
        entry = self._openers.get(token) or self.registry["text"]
        stamp = None
        if self._stamp is not None:
            stamp = int(sum(n * STAMP_BASE**i for i, n in enumerate(reversed(self._stamp))))
        start = self.at if self._stamp is None else self._stamp_start
        self.open = _Open(entry, start, self._wants()[entry.name], stamp=stamp)
        self._stamp = None
        self.phase = "shape" if entry.shape else "body"
        if entry.opener is None:
            self._body(token)

    def _body(self, token: int) -> None:
        assert self.open is not None
        open, entry = self.open, self.open.entry
        if token == self.vocabulary.special[entry.closer]:
            self.pieces.append(self._piece(open, self.at + 1, complete=True))
            self.open, self.phase = None, "between"
            if self.sequence:
                self.sequence.pop(0)
            return
        if token == self.vocabulary.special.get(entry.hole):
            open.codes.append(-1)
            return
        open.codes.append(token - self.vocabulary.spans[entry.spans[0]][0])
        if open.span is None:
            open.span = next((s for s in entry.spans if _inside(token, self.vocabulary.spans[s])), entry.spans[0])

    def _piece(self, open: _Open, end: int, complete: bool) -> Piece:
        last = end - complete
        return Piece(
            modality=open.entry.name,
            start=open.start,
            end=end,
            body=(last - len(open.codes), last),
            shape=tuple(open.shape),
            codes=np.array(open.codes, np.int64),
            span=open.span,
            stamp=open.stamp,
            complete=complete,
        )

    def unfinished(self) -> Piece | None:
        """The open piece as far as it is there."""
        return self._piece(self.open, self.at, complete=False) if self.open else None


def parse(
    ids: Iterable[int],
    vocabulary: Vocabulary,
    registry: Sequence[Modality] = REGISTRY,
    *,
    inside: bool | None = None,
    partial: bool = False,
) -> list[Piece]:
    """The pieces of a stream. `inside` None: a leading `<doc>` may be absent. `partial` allows an open piece at the end.

    Raises StreamError with position and reason where the ids could not be decoded.
    """
    ids = np.asarray(list(ids) if not isinstance(ids, np.ndarray) else ids, np.int64)
    if inside is None:
        inside = len(ids) == 0 or ids[0] != vocabulary.special["<doc>"]
    grammar = Grammar(vocabulary, registry, inside=inside)
    for token in ids.tolist():
        grammar.push(token)
    if not grammar.between and not partial:
        raise StreamError(f"the stream ends at token {grammar.at} inside {grammar.modality}; it is cut off")
    rest = grammar.unfinished()
    return [*grammar.pieces, rest] if rest else grammar.pieces


def _one(token: int) -> Range:
    return token, token + 1


def _inside(token: int, span: Range) -> bool:
    return span[0] <= token < span[1]


def _without(span: Range, forbidden: Iterable[int]) -> list[Range]:
    """The span in ranges that leave out some ids."""
    ranges, first = [], span[0]
    for token in sorted(set(forbidden)):
        if _inside(token, span):
            if token > first:
                ranges.append((first, token))
            first = token + 1
    return [*ranges, (first, span[1])] if first < span[1] else ranges


def _merged(ranges: list[Range]) -> list[Range]:
    """Ascending, neighbours joined, empty ones dropped."""
    out: list[Range] = []
    for first, end in sorted(r for r in ranges if r[1] > r[0]):
        if out and first <= out[-1][1]:
            out[-1] = (out[-1][0], max(end, out[-1][1]))
        else:
            out.append((first, end))
    return out


__all__ = ["Grammar", "Piece", "Range", "Want", "parse"]
