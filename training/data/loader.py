"""Batches of a step: draws -> documents -> dropout, roles, demonstrations -> streams -> one packed row per micro-batch.

In: sources, a tokenizer, sizes, and (seed, step, rank, world). Out: `StepData`: this rank's micro-batches of that step.

Step s makes `draws_per_step` draws (fixed for the run, so that a step holds `batch_tokens` on average), and
`sampling.assign` divides them over the micro-batches of all ranks. Nothing here depends on what was loaded before:
there is no state but the step. A micro-batch is as long as its documents, rounded up to `round_to`; the model has no
row axis, so nothing else is padded.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import queue
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from weft.tokenizers.bundle import StreamTokenizer
from weft.tokenizers.pack import Batch, collate
from weft.tokenizers.plan import LossPlan
from weft.tokenizers.stream import Stream, StreamError
from weft.training.data.assemble import Assembler
from weft.training.data.config import LoaderConfig, SourceConfig
from weft.training.data.decode_pool import DecodePool
from weft.training.data.documents import Documents
from weft.training.data.mixture import Mixture, Share
from weft.training.data.quarantine import Quarantine
from weft.training.data.sampling import assign, bin_of, step_draws
from weft.training.data.shards import ShardDataset
from weft.training.data.token_cache import TokenCache

MEASURED = 128
"""Draws whose mean length fixes `draws_per_step`."""


@dataclass(frozen=True)
class StepData:
    """One rank's part of one step."""

    step: int
    batches: list[Batch]
    """`micro_batches / world` of them."""
    documents: int
    tokens: int
    padding: int
    cut: int
    """Documents longer than `length`."""
    dropped: int
    """Documents left out because their micro-batch was full."""
    replaced: int
    """Draws whose sample was bad."""
    seconds: float


class Loader:
    """`step(s)` makes a step's batches; `steps(first, end)` does so ahead of time in a thread."""

    def __init__(
        self,
        sources: Sequence[SourceConfig],
        tokenizer: StreamTokenizer,
        config: LoaderConfig,
        *,
        seed: int,
        plan: LossPlan | None = None,
        rank: int = 0,
        world: int = 1,
        quarantine: str | Path | None = None,
        tokenizer_folder: str | Path | None = None,
    ) -> None:
        if not 0 <= rank < world or config.micro_batches % world:
            raise ValueError(
                f"micro_batches={config.micro_batches} must be a multiple of the {world} ranks; this is rank {rank}"
            )
        if config.decode_workers and tokenizer_folder is None:
            raise ValueError("decode workers load the tokenizer from a folder; give tokenizer_folder or decode_workers=0")
        self.sources, self.tokenizer, self.config, self.plan = tuple(sources), tokenizer, config, plan
        self.seed, self.rank, self.world = seed, rank, world
        self.datasets = [self._open(s) for s in sources]
        self._check_modalities()
        self.pool = DecodePool(
            config.decode_workers,
            timeout_s=config.decode_timeout_s,
            tokenizer=str(tokenizer_folder) if tokenizer_folder else None,
        )
        self.cache = TokenCache(config.token_cache_bytes, config.token_cache_folder, tokenizer.digest())
        self.documents = Documents(self.datasets, tokenizer, self.pool, self.cache, config.document_cache_bytes)
        sizes = {s.name: len(d) for s, d in zip(sources, self.datasets)}
        self.quarantine = Quarantine(sizes, config.bad_budget, quarantine, rank)
        self.assembler = Assembler(sources, self.documents, self.quarantine, tokenizer, config, seed=seed, plan=plan)
        shares = [Share(s.name, len(u), s.weight, s.repeats, s.cap) for s, u in zip(sources, self.assembler.units)]
        self.mixture = Mixture(shares, seed=seed, temperature=config.temperature)
        self._lock = threading.Lock()
        self.draws_per_step = config.draws_per_step or self._measure()
        mean = config.batch_tokens / config.micro_batches
        self.max_tokens = config.max_tokens or max(config.length, int(2 * mean))

    # -- steps

    def step(self, step: int) -> StepData:
        """The micro-batches of one step for this rank: the same whenever and wherever it is asked. Raises `DataExhausted`."""
        with self._lock:
            began = time.monotonic()
            before = dict(self.assembler.count)
            chosen = [self._choose(draw) for draw in step_draws(step, self.draws_per_step)]
            costs = [sum(self.datasets[k].locate(n)[1].cost() for n in numbers) for _, k, numbers in chosen]
            bins = assign(costs, self.config.micro_batches)
            share = self.config.micro_batches // self.world
            mine = [[chosen[i] for i in bins[bin_of(self.rank, m, share)]] for m in range(share)]
            self._fetch(draw for items in mine for draw in items)
            rows = [self._fit([s for draw in items for s in self.assembler.draw(*draw)]) for items in mine]
            batches = [self._pack(row) for row, _ in rows]
            tokens = sum(len(s) for row, _ in rows for s in row)
            return StepData(
                step=step,
                batches=batches,
                documents=sum(len(row) for row, _ in rows),
                tokens=tokens,
                padding=sum(len(batch.ids) for batch in batches) - tokens,
                **{name: count - before[name] for name, count in self.assembler.count.items()},
                dropped=sum(dropped for _, dropped in rows),
                seconds=time.monotonic() - began,
            )

    def steps(self, first: int = 0, end: int | None = None) -> Iterator[StepData]:
        """Steps first, first + 1, ... up to `end` or the end of the data; close the iterator to stop the thread."""
        if not self.config.prefetch:
            while (end is None or first < end) and self.has(first):
                yield self.step(first)
                first += 1
            return
        made: queue.Queue[StepData | BaseException | None] = queue.Queue(self.config.prefetch)
        stop = threading.Event()
        thread = threading.Thread(target=self._produce, args=(first, end, made, stop), name="loader", daemon=True)
        thread.start()
        try:
            while (item := made.get()) is not None:
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            stop.set()
            while thread.is_alive():
                with contextlib.suppress(queue.Empty):
                    made.get(timeout=0.05)

    def _produce(self, step: int, end: int | None, made: queue.Queue[Any], stop: threading.Event) -> None:
        try:
            while not stop.is_set() and (end is None or step < end) and self.has(step):
                made.put(self.step(step))
                step += 1
            made.put(None)
        except BaseException as error:
            made.put(error)

    def has(self, step: int) -> bool:
        """Whether the sources still have all draws of this step."""
        return self.mixture.draws is None or (step + 1) * self.draws_per_step <= self.mixture.draws

    def identity(self) -> dict[str, Any]:
        """What must be equal for a resume to see the same batches; the number of ranks and workers is not in it."""
        order = {k: v for k, v in asdict(self.config).items() if k in _ORDER}
        sources = [asdict(s) | {"path": "", "digest": d.info.digest} for s, d in zip(self.sources, self.datasets)]
        facts = {"seed": self.seed, "sources": sources, "config": order, "draws_per_step": self.draws_per_step}
        facts |= {"tokenizer": self.tokenizer.digest(), "plan": asdict(self.plan) if self.plan else None}
        return {**facts, "digest": hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()}

    def close(self) -> None:
        """End the decoding processes."""
        self.pool.close()

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- one step

    def _choose(self, draw: int) -> tuple[int, int, list[int]]:
        """(draw, source, sample numbers) of a draw."""
        source, position = self.mixture.at(draw)
        return draw, source, self.assembler.members(source, self.mixture.unit(source, position), draw)

    def _fetch(self, draws: Iterable[tuple[int, int, list[int]]]) -> None:
        """Have the decoding processes begin with what these draws need."""
        self.documents.fetch((draw[1], number) for draw in draws for number in self.assembler.to_read(*draw))

    def _fit(self, streams: Sequence[Stream]) -> tuple[list[Stream], int]:
        """What fits `max_tokens`, and how many documents do not."""
        kept: list[Stream] = []
        used = 0
        for stream in streams:
            if not kept or used + len(stream) <= self.max_tokens:
                kept.append(stream)
                used += len(stream)
        return kept, len(streams) - len(kept)

    def _pack(self, streams: Sequence[Stream]) -> Batch:
        """One row, as long as its documents, rounded up."""
        used = max(1, sum(map(len, streams)))
        return collate([list(streams)], -(-used // self.config.round_to) * self.config.round_to, self.tokenizer.feature_sizes())

    def _measure(self) -> int:
        """Draws per step from the mean number of tokens of the first draws: integers, so every rank finds the same."""
        count = MEASURED if self.mixture.draws is None else min(MEASURED, self.mixture.draws)
        chosen = [self._choose(draw) for draw in range(count)]
        self._fetch(chosen)
        total = sum(len(s) for draw in chosen for s in self.assembler.draw(*draw))
        return max(self.config.micro_batches, self.config.batch_tokens * count // max(total, 1))

    def _open(self, source: SourceConfig) -> ShardDataset:
        config = self.config
        return ShardDataset(
            source.path,
            source.split,
            budget=config.bad_budget,
            cache_dir=config.shard_cache_folder,
            cache_bytes=config.shard_cache_bytes,
        )

    def _check_modalities(self) -> None:
        """A modality without a tokenizer is said before the first step."""
        known = list(self.tokenizer.tokenizers)
        if unknown := sorted(set(self.config.dropout) - set(known)):
            raise StreamError(f"dropout names {unknown[0]!r}; modalities of the tokenizer are {', '.join(known)}")
        for source, dataset in zip(self.sources, self.datasets):
            found = {m for s in dataset.shards for m in s.summary()["segments"]}
            if missing := sorted(found - set(self.tokenizer.tokenizers)):
                have = ", ".join(self.tokenizer.tokenizers)
                raise StreamError(
                    f"source {source.name!r} holds {', '.join(missing)}, the tokenizer has {have}; "
                    "fit a tokenizer for it, or prepare the data without"
                )


_ORDER = (
    "batch_tokens",
    "length",
    "micro_batches",
    "max_tokens",
    "round_to",
    "temperature",
    "dropout",
)
