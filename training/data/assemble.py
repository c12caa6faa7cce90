"""The streams of one draw: documents, roles, dropout, demonstrations; a bad sample is replaced by the next of the
draw's own row.

In: the number of a draw and the samples it names. Out: streams of at most `length` tokens. Every choice is a counter-
based draw keyed by the number of the global draw, so it does not depend on rank, worker or what was loaded before.
"""

from __future__ import annotations

import logging
from bisect import bisect_left
from collections.abc import Hashable, Sequence
from dataclasses import replace

from weft.tokenizers.bundle import StreamTokenizer
from weft.tokenizers.interleave import Prepared
from weft.tokenizers.pack import cut_stream
from weft.tokenizers.plan import LossPlan
from weft.tokenizers.stream import Stream
from weft.training.data.bounded import Bounded
from weft.training.data.config import LoaderConfig, SourceConfig
from weft.training.data.documents import BadSample, Documents, Ready, stream_of
from weft.training.data.prompts import demonstration, prepend
from weft.training.data.quarantine import Quarantine
from weft.training.data.sampling import becomes_target, choose_pair, dropped, prompt_draw, replacement
from weft.training.data.shards import ShardDataset
from weft.training.data.stored import open_stored
from weft.training.random import integer, uniform

log = logging.getLogger(__name__)
ATTEMPTS = 100
"""Replacements tried for one draw before the source is given up."""


class Assembler:
    """Turns draws into streams; counts what it cut and replaced."""

    def __init__(
        self,
        sources: Sequence[SourceConfig],
        documents: Documents,
        quarantine: Quarantine,
        tokenizer: StreamTokenizer,
        config: LoaderConfig,
        *,
        seed: int,
        plan: LossPlan | None,
    ) -> None:
        self.sources, self.documents, self.quarantine = tuple(sources), documents, quarantine
        self.tokenizer, self.config, self.seed, self.plan = tokenizer, config, seed, plan
        self.datasets = documents.datasets
        self.units = [group_units(d) for d in self.datasets]
        """Per source and unit: the sample numbers that are drawn together."""
        self._tasks = [_tasks(d) if s.control else {} for s, d in zip(sources, self.datasets)]
        self.count = {"cut": 0, "replaced": 0}
        self.stored = [
            None if config.dropout or s.control else open_stored(config.streams_folder, d, tokenizer, plan, config.length)
            for s, d in zip(sources, self.datasets)
        ]
        """Per source: streams made ahead, where neither dropout nor demonstrations are drawn."""
        self._built: Bounded[Hashable, Stream] = Bounded(config.stream_cache_bytes)

    def members(self, source: int, unit: int, draw: int) -> list[int]:
        """Samples of a unit: the document, or two of those that share a pair key."""
        group = self.units[source][unit]
        return group if len(group) == 1 else choose_pair(self.seed, draw, group)

    def to_read(self, draw: int, source: int, numbers: Sequence[int]) -> list[int]:
        """Those samples of a draw whose tokens `draw` will ask for: not what was made ahead, not what is known to be bad."""
        stored, name = self.stored[source], self.datasets[source].name
        if stored is not None and all(stored.has(number) for number in numbers):
            return []
        return [number for number in numbers if not self.quarantine.holds(name(number), draw)]

    def draw(self, draw: int, source: int, numbers: Sequence[int]) -> list[Stream]:
        """The streams of one draw. Raises `TooManyBadSamples` beyond the budget."""
        for attempt in range(ATTEMPTS):
            if (made := self._made(source, numbers)) is not None:
                return made
            try:
                ready = [self._get(draw, source, number) for number in numbers]
                return [s for member, doc in enumerate(ready) for s in self._stream(draw, source, numbers[member], member, doc)]
            except BadSample as error:
                log.debug("draw %d attempt %d: %s", draw, attempt, error)
                self.count["replaced"] += 1
                unit = replacement(self.seed, draw, attempt, len(self.units[source]))
                numbers = self.members(source, unit, draw)
        raise BadSample(
            f"source {self.sources[source].name!r}: {ATTEMPTS} replacements of draw {draw} were bad; check its shards"
        )

    def _made(self, source: int, numbers: Sequence[int]) -> list[Stream] | None:
        """The streams that were made ahead, if nothing is drawn for them."""
        stored = self.stored[source]
        if stored is None:
            return None
        found = [stored.get(number, self.datasets[source].locate(number)[1].pair) for number in numbers]
        return None if None in found else [stream for stream in found if stream is not None]

    def _get(self, draw: int, source: int, number: int) -> Ready:
        name = self.datasets[source].name(number)
        if self.quarantine.holds(name, draw):
            raise BadSample(f"{name} is in quarantine")
        try:
            return self.documents.get(source, number)
        except BadSample as error:
            self.quarantine.add(self.sources[source].name, name, draw, str(error))
            raise

    def _stream(self, draw: int, source: int, number: int, member: int, ready: Ready) -> list[Stream]:
        items = self._roles(ready.items, draw, member)
        gone = dropped(
            [i.entry.name for i in items],
            [i.segment.role == "observed" for i in items],
            self.config.dropout,
            self.seed,
            2 * draw + member,
        )
        items = [item for i, item in enumerate(items) if i not in gone]
        prompt = self._prompt(draw, source, number, ready) if self.sources[source].control else []
        known = None if prompt else (source, number, *((i.source, i.segment.role) for i in items))
        stream = None if known is None else self._built.get(known)
        if stream is None:
            stream = self._build(draw, source, number, ready, prepend(prompt, items, self.tokenizer.config.tick_ns))
            if known is not None:
                self._built.put(known, stream, stream_bytes(stream))
        if len(stream) <= self.config.length:
            return [stream]
        self.count["cut"] += 1
        return cut_stream(stream, self.config.length)

    def _build(self, draw: int, source: int, number: int, ready: Ready, items: Sequence[Prepared]) -> Stream:
        try:
            return stream_of(self.tokenizer, self.plan, ready, items)
        except ValueError as error:
            name = self.datasets[source].name(number)
            self.quarantine.add(self.sources[source].name, name, draw, str(error))
            raise BadSample(f"{name}: {error}") from error

    def _roles(self, items: Sequence[Prepared], draw: int, member: int) -> list[Prepared]:
        """Undecided segments become targets with the plan's probability; one without codes stays observed."""
        out = []
        for i, item in enumerate(items):
            role = item.segment.role
            if role == "either":
                coded = not len(item.tokens) or int(item.tokens.codes.min()) >= 0
                chance = self.plan.generate.get(item.entry.name, 0.0) if self.plan and coded else 0.0
                role = "target" if becomes_target(self.seed, draw, member, i, chance) else "observed"
                item = replace(item, segment=replace(item.segment, role=role))
            out.append(item)
        return out

    def _prompt(self, draw: int, source: int, number: int, ready: Ready) -> list[Prepared]:
        """A demonstration for this sequence, or nothing."""
        config = self.sources[source]
        where = prompt_draw(self.seed, draw, config.prompt_rate, config.prompt_end)
        task = self.datasets[source].locate(number)[1].task
        others = self._tasks[source].get(task, [])
        if where is None or len(others) < 2:
            return []
        place = bisect_left(others, number)
        other = integer(len(others) - 1, self.seed, "prompt episode", draw)
        shown = self._get(draw, source, others[other + (other >= place)])
        length = self.config.length
        budget = min(length // 2, max(length - ready.tokens - length // 16, length // 4))
        return demonstration(shown.items, budget, where, uniform(self.seed, "prompt place", draw))


def stream_bytes(stream: Stream) -> int:
    """Memory that a stream takes."""
    arrays = [v for v in vars(stream).values() if hasattr(v, "nbytes")]
    parts = (*stream.features.values(), *stream.feature_at.values())
    return 2048 + sum(a.nbytes for a in (*arrays, *parts))


def group_units(dataset: ShardDataset) -> list[list[int]]:
    """Sample numbers that are drawn together: documents with one pair key, else one document."""
    groups: dict[str, list[int]] = {}
    units: list[list[int]] = []
    for number, entry in enumerate(dataset.entries()):
        if entry.pair is None:
            units.append([number])
        elif entry.pair in groups:
            groups[entry.pair].append(number)
        else:
            groups[entry.pair] = [number]
            units.append(groups[entry.pair])
    return units


def _tasks(dataset: ShardDataset) -> dict[str, list[int]]:
    """Task -> sample numbers, ascending."""
    tasks: dict[str, list[int]] = {}
    for number, entry in enumerate(dataset.entries()):
        tasks.setdefault(entry.task, []).append(number)
    return tasks
