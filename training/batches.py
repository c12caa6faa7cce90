"""Where a step's micro-batches come from: a pure function of the step, with one interface and an in-memory form.

`Batches.batches(step, rank, world)` gives this rank's micro-batches of a step. The step's contents depend on the seed and
the step alone; ranks and micro-steps only divide them. So nothing has to be saved but the step, and a run may change its
number of ranks.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol, runtime_checkable

import numpy as np

from weft.tokenizers.pack import Batch, collate, feature_sizes
from weft.tokenizers.stream import Stream
from weft.training.data.loader import Loader
from weft.training.data.sampling import assign, bin_of
from weft.training.random import permutation

LOST = ("cut", "dropped", "replaced")
"""What a step may lose: documents longer than a row that were cut, documents left out because their micro-batch was full,
draws whose sample was bad."""
COUNTS_KEPT = 8


class Batches(Protocol):
    """Gives every rank its part of every step."""

    def batches(self, step: int, rank: int, world: int) -> list[Batch]:
        """Micro-batches of one rank; the same number on every rank."""
        ...

    def has(self, step: int) -> bool:
        """Whether there is data for this step; the same answer on every rank."""
        ...

    def identity(self) -> dict[str, Any]:
        """What must be equal for a resumed run to see the same batches, as plain JSON data."""
        ...

    def close(self) -> None:
        """Stop workers."""
        ...


@runtime_checkable
class Counted(Protocol):
    """Batches that know what they lost."""

    def counts(self, step: int) -> dict[str, int]:
        """Per word of `LOST`, what this rank's part of a step lost; after `batches(step)`."""
        ...


class LoaderBatches:
    """Shards on disk, through the loader."""

    def __init__(self, loader: Loader) -> None:
        self.loader = loader
        self._counts: dict[int, dict[str, int]] = {}

    def batches(self, step: int, rank: int, world: int) -> list[Batch]:
        """This rank's micro-batches; the loader was opened for this rank."""
        if (rank, world) != (self.loader.rank, self.loader.world):
            raise ValueError(
                f"the loader was opened for rank {self.loader.rank} of {self.loader.world}, asked for {rank} of {world}"
            )
        made = self.loader.step(step)
        self._counts[step] = {name: getattr(made, name) for name in LOST}
        while len(self._counts) > COUNTS_KEPT:
            del self._counts[next(iter(self._counts))]
        return made.batches

    def counts(self, step: int) -> dict[str, int]:
        """What this rank's part of the step lost; known for the last few steps that were made."""
        return self._counts[step]

    def has(self, step: int) -> bool:
        """Whether the sources still have all draws of this step."""
        return self.loader.has(step)

    def identity(self) -> dict[str, Any]:
        """The loader's."""
        return self.loader.identity()

    def close(self) -> None:
        """End the decoding processes."""
        self.loader.close()


class StreamBatches:
    """Streams in memory, in shuffled passes: what a notebook or a quickstart trains on.

    Each step takes `per_step` streams (None: as many as fill `batch_tokens` on average), divided over the micro-batches.
    """

    def __init__(
        self, streams: Sequence[Stream], batch_tokens: int, micro_batches: int = 1, per_step: int | None = None, seed: int = 0,
        round_to: int = 64,
    ) -> None:  # fmt: skip
        if not streams:
            raise ValueError("training needs at least one stream")
        mean = sum(len(s) for s in streams) / len(streams)
        self.streams, self.micro, self.seed, self.round_to = streams, micro_batches, seed, round_to
        self.per_step = per_step or max(micro_batches, int(batch_tokens / mean))
        self.sizes = feature_sizes(streams)

    def stream(self, draw: int) -> Stream:
        """Draw number `draw`: its place in this pass's own order."""
        run, place = divmod(draw, len(self.streams))
        return self.streams[int(self._order(run)[place])]

    @functools.lru_cache(maxsize=4)  # noqa: B019 - a source lives as long as its run
    def _order(self, run: int) -> np.ndarray:
        return permutation(len(self.streams), self.seed, "pass", run)

    def batches(self, step: int, rank: int, world: int) -> list[Batch]:
        """This rank's micro-batches: one row each, as long as its streams, rounded up."""
        picked = [self.stream(draw) for draw in range(step * self.per_step, (step + 1) * self.per_step)]
        bins = assign([len(s) for s in picked], self.micro)
        share = self.micro // world
        mine = [[picked[i] for i in bins[bin_of(rank, k, share)]] for k in range(share)]
        return [collate([row], -(-sum(map(len, row)) // self.round_to) * self.round_to, self.sizes) for row in mine]

    def has(self, step: int) -> bool:
        """There is no end."""
        return True

    def identity(self) -> dict[str, Any]:
        """Numbers and a digest of the ids."""
        digest = hashlib.sha256(b"".join(s.ids.tobytes() for s in self.streams)).hexdigest()
        return {"streams": digest, "seed": self.seed, "per_step": self.per_step, "micro_batches": self.micro}

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

    def has(self, step: int) -> bool:
        """There is no end."""
        return True

    def identity(self) -> dict[str, Any]:
        """Numbers and a digest of the ids."""
        digest = hashlib.sha256(b"".join(b.ids.numpy().tobytes() for b in self.items)).hexdigest()
        return {"batches": digest, "micro_batches": self.micro}

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
        self.waiting = {step + 1: self._begin(step + 1)} if self.source.has(step + 1) else {}
        return ready.result()

    def counts(self, step: int) -> dict[str, int] | None:
        """What the step lost on this rank; None where the source does not say."""
        return self.source.counts(step) if isinstance(self.source, Counted) else None

    def _begin(self, step: int) -> Future[list[Batch]]:
        assert self.pool is not None
        return self.pool.submit(self.source.batches, step, self.rank, self.world)

    def close(self) -> None:
        """Stop the thread and the source's workers."""
        if self.pool is not None:
            self.pool.shutdown(wait=True, cancel_futures=True)
        self.source.close()
