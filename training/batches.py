"""Where a step's micro-batches come from: a pure function of the step, with one interface and an in-memory form.

`Batches.batches(step, rank, world)` gives this rank's micro-batches of a step. The step's contents depend on the seed and
the step alone; ranks and micro-steps only divide them. So nothing has to be saved but the step, and a run may change its
number of ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

from weft.tokenizers.pack import Batch, pack
from weft.tokenizers.stream import Stream
from weft.training.data.sampling import assign, bin_of
from weft.training.random import permutation


class Batches(Protocol):
    """Gives every rank its part of every step."""

    def batches(self, step: int, rank: int, world: int) -> list[Batch]:
        """Micro-batches of one rank; the same number on every rank."""
        ...

    def close(self) -> None:
        """Stop workers."""
        ...


class StreamBatches:
    """Streams in memory, in shuffled passes: what a notebook or a quickstart trains on.

    Each step takes `per_step` streams; they are divided over the micro-batches by length and packed.
    """

    def __init__(
        self,
        streams: Sequence[Stream],
        length: int,
        rows: int,
        micro_batches: int = 1,
        per_step: int | None = None,
        seed: int = 0,
    ) -> None:
        if not streams:
            raise ValueError("a source needs at least one stream")
        longest = max(len(s) for s in streams)
        if longest > length:
            raise ValueError(f"the longest stream has {longest} tokens, a row holds {length}; raise data.length")
        mean = sum(len(s) for s in streams) / len(streams)
        self.streams, self.length, self.rows, self.micro, self.seed = streams, length, rows, micro_batches, seed
        self.per_step = per_step or max(micro_batches, int(0.85 * rows * length * micro_batches / mean))

    def stream(self, draw: int) -> Stream:
        """Draw number `draw`: position in this pass's own order."""
        run, place = divmod(draw, len(self.streams))
        return self.streams[int(permutation(len(self.streams), self.seed, "pass", run)[place])]

    def batches(self, step: int, rank: int, world: int) -> list[Batch]:
        """This rank's micro-batches. A stream that finds no room in its micro-batch is left to the next pass."""
        picked = [self.stream(draw) for draw in range(step * self.per_step, (step + 1) * self.per_step)]
        bins = assign([len(s) for s in picked], self.micro)
        accumulate = self.micro // world
        return [
            pack([picked[i] for i in bins[bin_of(rank, k, accumulate)]], self.length, self.rows)[0] for k in range(accumulate)
        ]

    def close(self) -> None:
        """Nothing to stop."""


class ListBatches:
    """Ready micro-batches, repeated: step s takes micro-batches [s * k, (s + 1) * k) of the list, round and round."""

    def __init__(self, batches: Sequence[Batch], micro_batches: int = 1) -> None:
        self.items, self.micro = list(batches), micro_batches

    def batches(self, step: int, rank: int, world: int) -> list[Batch]:
        """This rank's micro-batches."""
        share = self.micro // world
        first = step * self.micro + rank * share
        return [self.items[(first + k) % len(self.items)] for k in range(share)]

    def close(self) -> None:
        """Nothing to stop."""


class Ahead:
    """Prepares the next step in a thread while the current one runs. Order is not affected: a step is a pure function."""

    def __init__(self, source: Batches, rank: int, world: int, prefetch: bool) -> None:
        self.source, self.rank, self.world = source, rank, world
        self.pool = ThreadPoolExecutor(1, thread_name_prefix="weft-data") if prefetch else None
        self.waiting: dict[int, Future[list[Batch]]] = {}

    def batches(self, step: int) -> list[Batch]:
        """This step's micro-batches; the next step's are begun."""
        if self.pool is None:
            return self.source.batches(step, self.rank, self.world)
        ready = self.waiting.pop(step, None) or self._begin(step)
        self.waiting = {step + 1: self._begin(step + 1)}
        return ready.result()

    def _begin(self, step: int) -> Future[list[Batch]]:
        assert self.pool is not None
        return self.pool.submit(self.source.batches, step, self.rank, self.world)

    def close(self) -> None:
        """Stop the thread and the source's workers."""
        if self.pool is not None:
            self.pool.shutdown(wait=True, cancel_futures=True)
        self.source.close()
