"""All tokenizers under one vocabulary: documents in, streams out, and media back.

A saved bundle is a folder: `vocabulary.json`, `stream.json`, one sub-folder per tokenizer, `digest.json`. Loading verifies the
digest, so weights never meet ids that mean something else.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, MutableMapping, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from weft.tokenizers.base import Tokenizer, Tokens
from weft.tokenizers.build import StreamBuilder
from weft.tokenizers.clock import label, rate_times, segment_start
from weft.tokenizers.grammar import Grammar, Piece, parse
from weft.tokenizers.identity import media_key
from weft.tokenizers.interleave import Prepared
from weft.tokenizers.plan import LossPlan
from weft.tokenizers.registry import REGISTRY, Modality, by_name
from weft.tokenizers.resample import check_resample
from weft.tokenizers.segment import Document, Segment
from weft.tokenizers.stream import SegmentInfo, Stream, StreamConfig, StreamError, join
from weft.tokenizers.vocabulary import MODALITIES, Vocabulary


class TokenizerMismatch(ValueError):
    """The vocabulary or a tokenizer is not the one that was saved or expected."""


class StreamTokenizer:
    """Documents <-> streams. Its digest names everything that changes ids, positions or decoded media."""

    def __init__(
        self,
        vocabulary: Vocabulary,
        tokenizers: Mapping[str, Tokenizer],
        config: StreamConfig | None = None,
        registry: Sequence[Modality] = REGISTRY,
    ) -> None:
        self.vocabulary = vocabulary
        self.config = config or StreamConfig()
        self.registry = tuple(registry)
        self.entries = by_name(self.registry)
        unknown = sorted(set(tokenizers) - set(self.entries))
        if unknown:
            raise StreamError(f"no registry entry for {unknown}; add one or drop the tokenizer")
        self.tokenizers = {name: tokenizers[name] for name in self.entries if name in tokenizers}
        needed = lay_out(self.tokenizers, vocabulary.numbers, self.registry)
        if needed != vocabulary:
            raise TokenizerMismatch(
                f"the tokenizers need vocabulary {needed.to_dict()} (digest {needed.digest()[:16]}), "
                f"got {vocabulary.to_dict()} (digest {vocabulary.digest()[:16]}); use StreamTokenizer.build"
            )
        check_resample(self.config.resample, self.tokenizers, self.entries)
        self._order = {name: i for i, name in enumerate(vocabulary.modalities)}
        self._forbidden: tuple[int, ...] | None = None

    @classmethod
    def build(
        cls,
        tokenizers: Mapping[str, Tokenizer] | Iterable[Tokenizer],
        config: StreamConfig | None = None,
        *,
        numbers: int = 128,
        registry: Sequence[Modality] = REGISTRY,
    ) -> StreamTokenizer:
        """Lay out the vocabulary that these tokenizers need."""
        if not isinstance(tokenizers, Mapping):
            tokenizers = {tokenizer.modality: tokenizer for tokenizer in tokenizers}
        return cls(lay_out(tokenizers, numbers, registry), tokenizers, config, registry)

    @property
    def modalities(self) -> tuple[str, ...]:
        """Names by modality index."""
        return self.vocabulary.modalities

    def feature_sizes(self) -> dict[str, int]:
        """Modality -> F of every tokenizer with features: values of a position, all its rows where media are resampled."""
        rows = {name: shape.rows for name, shape in self.config.resample.items()}
        return {name: t.feature_size * rows.get(name, 1) for name, t in self.tokenizers.items() if t.feature_size}

    def resample(self) -> dict[str, dict[str, int]]:
        """Modality -> {tokens, latents}: the resamplers that a model of these streams has (`ModelConfig.resample`)."""
        return {name: asdict(shape) for name, shape in self.config.resample.items()}

    # -- documents to streams

    def encode(
        self,
        document: Document | Segment | Sequence[Segment],
        plan: LossPlan | None = None,
        rng: np.random.Generator | None = None,
        close: bool = True,
        cache: MutableMapping[str, Tokens] | None = None,
    ) -> Stream:
        """One document as a stream.

        Without a plan everything is observed and nothing is learnt (a prompt). `close` appends `</doc>`. `cache`
        maps `media_key` to `Tokens`: media that come again are tokenised once.
        Raises StreamError, ClockError or the tokenizer's own error, naming the segment.
        """
        document = as_document(document)
        builder = self.builder()
        parts = [builder.open(), builder.add(self.prepare(document.segments, cache), plan, rng)]
        if close:
            parts.append(builder.close())
        return replace(join([part for part in parts if part is not None]), pair=document.pair, id=document.id)

    def builder(self) -> StreamBuilder:
        """Writes one document part by part (sessions): `open`, `add(tok.prepare(segments))`, `close`."""
        return StreamBuilder(self.vocabulary, self.registry, self.config, self.feature_sizes())

    def prepare(self, segments: Sequence[Segment], cache: MutableMapping[str, Tokens] | None = None) -> list[Prepared]:
        """Tokenise segments and read their clocks."""
        return [self._prepare(segment, i, cache) for i, segment in enumerate(segments)]

    def _prepare(self, segment: Segment, source: int, cache: MutableMapping[str, Tokens] | None) -> Prepared:
        entry = self.entries.get(segment.modality)
        if entry is None or segment.modality not in self.tokenizers:
            have = ", ".join(self.tokenizers) or "none"
            raise StreamError(
                f"{label(segment)}: this model has no {segment.modality} tokenizer (it has {have}); drop the segment"
            )
        tokenizer = self.tokenizers[segment.modality]
        if cache is None:
            tokens = tokenizer.encode(segment)
        else:
            key = media_key(segment)
            found = cache.get(key)
            tokens = tokenizer.encode(segment) if found is None else found
            if found is None:
                cache[key] = tokens
        return Prepared(segment, entry, self._order[segment.modality], tokens, segment_start(segment), source)

    # -- streams to documents

    def grammar(self, **constraints: Any) -> Grammar:
        """A `Grammar` of this vocabulary; see its `sequence`, `allowed`, `holes` and `inside`."""
        return Grammar(self.vocabulary, self.registry, forbidden=self.forbidden(), **constraints)

    def forbidden(self) -> tuple[int, ...]:
        """Ids of text pieces that stand for nothing (unknown and control pieces)."""
        if self._forbidden is None:
            text = self.tokenizers.get("text")
            decode = getattr(text, "decode_text", None)
            first = self.vocabulary.spans["text"][0]
            size = 0 if text is None or decode is None else text.size
            self._forbidden = tuple(first + i for i in range(size) if not decode([i]))  # type: ignore[misc]
        return self._forbidden

    def decode(self, stream: Stream | Iterable[int], **fields: Mapping[str, Any]) -> list[Segment]:
        """The segments of a stream, pieces of one segment put together, with their times.

        Plain ids know neither clocks nor spaces: `fields` gives what a modality needs, for example
        `action={"space": space}, sensor={"rate_hz": 10.0, "kind": "imu"}`. Raises StreamError where a segment has no codes.
        """
        if isinstance(stream, Stream) and stream.info:
            return [self.decode_segment(codes, info, **fields.get(info.modality, {})) for info, codes in self.segments(stream)]
        ids = stream.ids if isinstance(stream, Stream) else stream
        pieces = parse(ids, self.vocabulary, self.registry)
        return [self.decode_piece(piece, **fields.get(piece.modality, {})) for piece in pieces]

    def segments(self, stream: Stream) -> list[tuple[SegmentInfo, np.ndarray]]:
        """What is known of each segment and its codes [n], in the order of `Stream.info`; cut by the grammar."""
        codes: dict[int, list[np.ndarray]] = {}
        for piece in parse(stream.ids, self.vocabulary, self.registry, partial=True):
            codes.setdefault(int(stream.segment[piece.start]), []).append(piece.codes)
        return [(stream.info[i], np.concatenate(codes[i])) for i in sorted(codes)]

    def decode_piece(self, piece: Piece, **fields: Any) -> Segment:
        """One parsed piece as media."""
        return self.decode_segment(piece.codes, self.piece_info(piece), **fields)

    def piece_info(self, piece: Piece) -> SegmentInfo:
        """What a piece alone says of its segment."""
        entry = self.entries[piece.modality]
        n = len(piece.codes)
        if entry.fixed:
            grid, group = piece.shape, int(np.prod(piece.shape[1:] if len(piece.shape) > 2 else piece.shape))
        elif entry.unit and piece.span != "chunks":
            group = piece.shape[entry.shape.index(entry.unit)]
            grid = (n // group, group)
        elif entry.unit:
            grid, group = (0, piece.shape[entry.shape.index(entry.unit)]), max(n, 1)
        else:
            grid, group = (n,), 1
        start = None if piece.stamp is None else piece.stamp * 10_000_000
        return SegmentInfo(piece.modality, grid, group, start, target=True, source=-1)

    def decode_segment(self, codes: np.ndarray, info: SegmentInfo, **fields_: Any) -> Segment:
        """Codes [n] of a whole segment as media, with its start, name, rate and shape."""
        tokenizer = self.tokenizers.get(info.modality)
        if tokenizer is None:
            raise StreamError(
                f"there is no {info.modality} tokenizer to decode with; this model has {', '.join(self.tokenizers)}"
            )
        if info.medium is not None:
            raise StreamError(
                f"the {info.modality} segment{_named(info)} was read through a resampler, which keeps no codes; "
                "decode segments that are generated"
            )
        if len(codes) and codes.min() < 0:
            raise StreamError(
                f"the {info.modality} segment{_named(info)} has features but no codes; fit the tokenizer to decode it"
            )
        shape = {k: v for k, v in info.fields.items() if v is not None and k != "times"} | fields_
        if info.modality == "action" and info.grid[0]:
            shape["steps"] = info.grid[0]
        segment = tokenizer.decode(codes, info.grid, **shape)
        known = {f.name for f in fields(segment)}
        own = {k: v for k, v in shape.items() if k in ("channels", "units", "kind", "space") and k in known}
        if "times" in known and info.source >= 0:
            own |= _clock(info, len(getattr(segment, self.entries[info.modality].content)))
        return replace(segment, start=info.start, name=info.name, role="observed", **own)

    # -- identity

    def digest(self) -> str:
        """SHA-256 over vocabulary, stream config, registry and every tokenizer."""
        return _sha(self._digests())

    def _digests(self) -> dict[str, str]:
        used = [asdict(entry) for entry in self.registry if entry.name in self.vocabulary.modalities]
        return {
            "vocabulary": self.vocabulary.digest(),
            "stream": _sha(self.config.to_dict()),
            "registry": _sha(used),
            **{name: tokenizer.digest() for name, tokenizer in self.tokenizers.items()},
        }

    def save(self, folder: str | Path) -> None:
        """Write the bundle: JSON and safetensors only."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        for name, tokenizer in self.tokenizers.items():
            tokenizer.save(folder / name)
        _write(folder / "vocabulary.json", self.vocabulary.to_dict())
        _write(folder / "stream.json", self.config.to_dict())
        _write(folder / "digest.json", {"digest": self.digest(), "parts": self._digests()})

    @classmethod
    def load(cls, folder: str | Path, registry: Sequence[Modality] = REGISTRY, expect: str | None = None) -> StreamTokenizer:
        """Read what `save` wrote. `expect` is the digest that weights were trained with.

        Classes come from `registry` alone, never from the folder. Raises TokenizerMismatch naming both digests.
        """
        folder = Path(folder)
        stated = _read(folder / "digest.json")
        parts = stated.get("parts")
        if not isinstance(parts, dict) or not isinstance(stated.get("digest"), str):
            raise TokenizerMismatch(f"{folder / 'digest.json'} needs the keys digest and parts; save the tokenizer again")
        entries = by_name(tuple(registry))
        tokenizers = {}
        for name in parts:
            if name in ("vocabulary", "stream", "registry"):
                continue
            if name not in entries:
                raise TokenizerMismatch(f"{folder} holds a {name} tokenizer; hand in a registry that has an entry for it")
            tokenizers[name] = entries[name].load_class("tokenizer").load(folder / name)
        vocabulary = Vocabulary.from_dict(_read(folder / "vocabulary.json"))
        _compare(folder, "vocabulary", parts.get("vocabulary"), vocabulary.digest())
        bundle = cls(vocabulary, tokenizers, StreamConfig.from_dict(_read(folder / "stream.json")), registry)
        for name, found in bundle._digests().items():
            _compare(folder, name, parts.get(name), found)
        _compare(folder, "bundle", stated["digest"], bundle.digest())
        if expect is not None and expect != bundle.digest():
            raise TokenizerMismatch(
                f"{folder}: the weights were trained with tokenizer digest {expect}, this one has {bundle.digest()}; "
                "load the tokenizer that was saved with them"
            )
        return bundle


def lay_out(tokenizers: Mapping[str, Tokenizer], numbers: int, registry: Sequence[Modality] = REGISTRY) -> Vocabulary:
    """The vocabulary with exactly the spans that these tokenizers need."""
    sizes: dict[str, int] = {}
    extra = []
    for entry in registry:
        tokenizer = tokenizers.get(entry.name)
        if tokenizer is None:
            continue
        if entry.name not in MODALITIES:
            extra.append((entry.name, tokenizer.size))
        elif len(entry.spans) > 1:
            split = {span: getattr(tokenizer, f"size_{span}", 0) for span in entry.spans}
            if sum(split.values()) != tokenizer.size:
                raise StreamError(f"the {entry.name} tokenizer has {tokenizer.size} codes, but its spans hold {split}")
            sizes.update(split)
        else:
            span = entry.spans[0]
            before = sizes.get(span, 0)
            if before and tokenizer.size and before != tokenizer.size:
                raise StreamError(
                    f"{entry.name} has {tokenizer.size} codes, but shares its span with a tokenizer of {before}; "
                    "give both one codec"
                )
            sizes[span] = max(before, tokenizer.size)
    return Vocabulary(**{"text": 0} | sizes, numbers=numbers, extra=tuple(extra))


def as_document(document: Document | Segment | Sequence[Segment]) -> Document:
    """A document from whatever names its segments."""
    if isinstance(document, Document):
        return document
    segments = (document,) if isinstance(document, Segment) else tuple(document)
    wrong = [type(segment).__name__ for segment in segments if not isinstance(segment, Segment)]
    if wrong:
        raise StreamError(f"a document needs segments, got {wrong[0]}; wrap it, for example Text(text=...)")
    return Document(segments=segments)


def _clock(info: SegmentInfo, count: int) -> dict[str, Any]:
    """`times` or `rate_hz` of a decoded segment of `count` readings or frames."""
    given, groups = info.fields.get("times"), info.times
    if given is not None and len(given) == count:
        return {"times": given, "rate_hz": None}
    rate_hz = info.fields.get("rate_hz")
    if rate_hz is not None and (info.modality != "video" or _steady(groups, count, rate_hz)):
        return {"rate_hz": rate_hz, "times": None}
    if not len(groups):
        return {"times": None, "rate_hz": None}
    each = -(-count // len(groups))
    # Frames that share a token lie evenly between its time and the next one's.
    at = np.arange(count) / each
    step = int(groups[-1] - groups[-2]) if len(groups) > 1 else round(each * 1e9 / (rate_hz or 1e9))
    known = np.r_[groups, groups[-1] + step].astype(np.float64)
    times = np.interp(at, np.arange(len(known)), known).round().astype(np.int64)
    return {"times": tuple(times.tolist()), "rate_hz": None}


def _steady(groups: np.ndarray, count: int, rate_hz: float) -> bool:
    """Whether a video kept all of its frames: its groups lie where the rate says."""
    each = -(-count // max(len(groups), 1))
    return bool(np.abs(groups - rate_times(rate_hz, len(groups) * each, "video")[::each]).max(initial=0) < 1_000_000)


def _named(info: SegmentInfo) -> str:
    return f" {info.name!r}" if info.name else ""


def _sha(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _compare(folder: Path, name: str, stated: Any, found: str) -> None:
    if stated != found:
        raise TokenizerMismatch(
            f"{folder}: {name} was saved with digest {stated}, its files now have {found}; restore the files or save it again"
        )


def _write(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def _read(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{path} is missing; {path.parent} is no saved tokenizer, write one with tok.save(folder)"
        ) from error
    except ValueError as error:
        raise TokenizerMismatch(f"{path} is not readable JSON ({error}); restore the file") from error
    if not isinstance(value, dict):
        raise TokenizerMismatch(f"{path} holds {type(value).__name__}, a JSON object is needed; restore the file")
    return value
