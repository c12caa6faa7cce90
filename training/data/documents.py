"""Samples of shards as tokenised documents, each medium decoded and tokenised once.

In: source and sample number. Out: `Ready`: the segments as the stream builder takes them (`Prepared`), without the
media's bytes. The parsed document stays in memory without its media (least recently used go first); its tokens lie in
the `TokenCache`. What is not there is read again from the shard, by offset, and tokenised in the decode pool.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import Any

from weft.tokenizers.bundle import StreamTokenizer
from weft.tokenizers.clock import segment_start
from weft.tokenizers.identity import media_key
from weft.tokenizers.interleave import Prepared
from weft.tokenizers.plan import LossPlan
from weft.tokenizers.segment import Document
from weft.tokenizers.stream import Stream, StreamError, join
from weft.training.data.bounded import Bounded
from weft.training.data.decode_pool import DecodePool, WorkerFailure, WorkerStartError
from weft.training.data.index import ShardError
from weft.training.data.records import restore, restore_segment
from weft.training.data.shards import Sample, ShardDataset
from weft.training.data.token_cache import TokenCache, tokens_from


class BadSample(ValueError):
    """A sample that cannot be used: corrupted, not decodable, or too slow to decode."""


@dataclass(frozen=True)
class Ready:
    """A document whose segments are tokenised."""

    id: str
    pair: str | None
    items: tuple[Prepared, ...]

    @property
    def tokens(self) -> int:
        """Body tokens of all segments."""
        return sum(len(item.tokens) for item in self.items)


@dataclass(frozen=True)
class _Skeleton:
    """A parsed document without media: what is kept per sample."""

    id: str
    pair: str | None
    items: tuple[Any, ...]
    """Per segment: (segment without its media, start in ns)."""
    keys: tuple[str, ...]


def stream_of(tokenizer: StreamTokenizer, plan: LossPlan | None, ready: Ready, items: Sequence[Prepared]) -> Stream:
    """A document's stream with these of its segments, roles decided. Raises ValueError where they cannot stand in one."""
    builder = tokenizer.builder()
    opened = builder.open()  # first: the builder hands out positions in the order in which it is asked
    body = builder.add(items, plan, None)
    stream = join([opened, *([body] if body is not None else []), builder.close()])
    return replace(stream, pair=ready.pair, id=ready.id)


class Documents:
    """The samples of several datasets as `Ready` documents."""

    def __init__(
        self,
        datasets: Sequence[ShardDataset],
        tokenizer: StreamTokenizer,
        pool: DecodePool,
        cache: TokenCache,
        max_bytes: int = 2**28,
    ) -> None:
        self.datasets, self.tokenizer, self.pool, self.cache = list(datasets), tokenizer, pool, cache
        self._kept: Bounded[tuple[int, int], _Skeleton] = Bounded(max_bytes)
        self._order = {name: i for i, name in enumerate(tokenizer.vocabulary.modalities)}
        self._waiting: dict[str, Future[Any]] = {}
        self._content = {m.name: m.content for m in tokenizer.registry if m.name in ("image", "audio", "video")}

    def fetch(self, wanted: Iterable[tuple[int, int]]) -> None:
        """Start tokenising what these samples lack, all of it at one time; `get` waits for what it needs."""
        if self.pool.workers:
            for source, number in wanted:
                try:
                    skeleton, sample, _ = self._skeleton(source, number)
                    self._submit(skeleton, sample or None, source, number)
                except (BadSample, ShardError):
                    pass  # `get` reports it

    def get(self, source: int, number: int) -> Ready:
        """One document. Raises `BadSample`; a modality without a tokenizer is the user's mistake and raises `StreamError`."""
        skeleton, sample, document = self._skeleton(source, number)
        items = []
        for at, ((segment, start), key) in enumerate(zip(skeleton.items, skeleton.keys)):
            tokens = self.cache.get(key)
            if tokens is None:
                sample = sample or self._read(source, number)
                tokens = self._tokenise(skeleton, sample, at, key, document)
            entry = self.tokenizer.entries[segment.modality]
            items.append(Prepared(segment, entry, self._order[segment.modality], tokens, start, at))
        return Ready(skeleton.id, skeleton.pair, tuple(items))

    def _skeleton(self, source: int, number: int) -> tuple[_Skeleton, Sample | None, Document | None]:
        """What is kept of a document, and the sample and the whole document if they had to be read."""
        found = self._kept.get((source, number))
        if found is not None:
            return found, None, None
        sample = self._read(source, number)
        document = self._parse(sample)
        items = []
        for segment in document.segments:
            if segment.modality not in self.tokenizer.tokenizers:
                have = ", ".join(self.tokenizer.tokenizers)
                raise StreamError(
                    f"{sample.where} has {segment.modality}, the tokenizer has {have}; fit one for it or prepare without"
                )
            content = self._content.get(segment.modality)
            bare: Any = replace(segment, **{content: None}) if content else segment  # type: ignore[arg-type]
            items.append((bare, segment_start(segment)))
        size = 1024 * len(items) + len(sample.members["json"])
        size += sum(len(d) for s, d in sample.members.items() if s.endswith(".npy"))
        found = _Skeleton(document.id, document.pair, tuple(items), tuple(media_key(s) for s in document.segments))
        self._kept.put((source, number), found, size)
        return found, sample, document

    def _read(self, source: int, number: int) -> Sample:
        try:
            return self.datasets[source].read(number)
        except ShardError as error:
            raise BadSample(str(error)) from error

    def _parse(self, sample: Sample) -> Document:
        try:
            return restore(sample.members, sample.where)
        except (ValueError, KeyError, TypeError) as error:
            raise BadSample(f"{sample.where}: {error}") from error

    def _submit(self, skeleton: _Skeleton, sample: Sample | None, source: int, number: int) -> None:
        for at, key in enumerate(skeleton.keys):
            if key not in self.cache and key not in self._waiting:
                sample = sample or self._read(source, number)
                self._waiting[key] = self._ask(sample, at)

    def _ask(self, sample: Sample, at: int) -> Future[Any]:
        spec_and_media = {s: d for s, d in sample.members.items() if s == "json" or s.startswith(f"{at}.")}
        header = {"members": list(spec_and_media), "where": sample.where, "segment": at}
        return self.pool.submit("encode", header, list(spec_and_media.values()))

    def _tokenise(self, skeleton: _Skeleton, sample: Sample, at: int, key: str, document: Document | None) -> Any:
        where = f"{sample.where} segment {at} ({skeleton.items[at][0].modality})"
        try:
            if self.pool.workers:
                future = self._waiting.pop(key, None) or self._ask(sample, at)
                header, blobs = future.result()
                from weft.training.data.wire import to_arrays

                tokens = tokens_from(to_arrays(header["arrays"], blobs), header)
            else:
                segment = document.segments[at] if document else restore_segment(sample.members, at)
                tokens = self.tokenizer.tokenizers[segment.modality].encode(segment)
        except WorkerFailure as error:
            raise BadSample(f"{where}: {error.kind}: {error}") from error
        except (StreamError, WorkerStartError):
            raise
        except (ValueError, TypeError, KeyError, OSError) as error:
            raise BadSample(f"{where}: {error}") from error
        self.cache[key] = tokens
        return tokens


__all__ = ["BadSample", "Documents", "Ready", "stream_of"]
