"""What a stream costs: interleaving, packing and parsing against length, and how much of a row is padding.

    python -m weft.benchmarks.speed.stream [--quick] [--json FILE]

Ours against the plain way with the same result: readings ordered one by one from a heap; rows filled in the order of arrival.
The exponent in a row's note is the slope of log(time) over log(tokens): 1 is linear. All times are CPU time,
the least of some rounds, because a busy machine would bend the slope.
"""

from __future__ import annotations

import heapq
import time
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np

from weft.benchmarks.speed.report import Row, compare, finish, speed_parser, start
from weft.tokenizers.base import Tokens
from weft.tokenizers.build import StreamBuilder
from weft.tokenizers.grammar import parse
from weft.tokenizers.interleave import Prepared, interleave
from weft.tokenizers.pack import collate, fit
from weft.tokenizers.registry import REGISTRY, by_name
from weft.tokenizers.segment import Action, ActionSpace, Sensor
from weft.tokenizers.stream import Stream, StreamConfig, join
from weft.tokenizers.vocabulary import Vocabulary

VOCABULARY = Vocabulary(text=1000, sensor=1024, discrete=16)
FEATURES = {"sensor": 1, "action": 1}
RATES_HZ = (100.0, 31.0, 3.0)
"""Three sensors of 6, 3 and 1 channels, and an action at the rate of the second."""


def recording(seconds: float, seed: int) -> list[Prepared]:
    """Tokenised segments of a recording; about 700 tokens of content per second."""
    random = np.random.default_rng(seed)
    found = [_prepared("sensor", (6, 3, 1)[i], rate, seconds, random) for i, rate in enumerate(RATES_HZ)]
    return [*found, _prepared("action", 1, RATES_HZ[1], seconds, random)]


def _prepared(modality: str, channels: int, rate_hz: float, seconds: float, random: np.random.Generator) -> Prepared:
    entry = by_name()[modality]
    steps = max(1, int(seconds * rate_hz))
    n = steps * channels
    times = np.repeat((np.arange(steps) * (1e9 / rate_hz)).astype(np.int64), channels)
    place = np.zeros((n, 2), np.int32)
    place[:, 0] = np.tile(np.arange(channels), steps)
    tokens = Tokens(
        codes=random.integers(0, 1024 if modality == "sensor" else 16, n),
        grid=(steps, channels),
        time=times,
        features=random.random((n, 1), np.float32),
        place=place,
        group=channels,
    )
    if modality == "sensor":
        return Prepared(Sensor(values=None, start=0, name=f"{rate_hz}"), entry, 4, tokens, 0, 0)
    return Prepared(Action(values=None, space=ActionSpace(n=16), start=0), entry, 5, tokens, 0, 3)


def write(items: Sequence[Prepared], chunk_s: float) -> Stream:
    """The whole document."""
    builder = StreamBuilder(VOCABULARY, REGISTRY, StreamConfig(chunk_s=chunk_s), FEATURES)
    body = builder.add(items)
    assert body is not None
    return join([builder.open(), body, builder.close()])


def write_span(documents: dict[int, list[Prepared]], chunk_s: float, span: int) -> Stream:
    """The recording of `span` seconds."""
    return write(documents[span], chunk_s)


def heap_merge(items: Sequence[Prepared]) -> list[tuple[int, int, int]]:
    """Readings in time order from a heap, the way that needs no array library: (time, order, reading)."""
    streams = [[(at, i, reading) for reading, at in enumerate(item.group_times().tolist())] for i, item in enumerate(items)]
    return list(heapq.merge(*streams))


def cpu_seconds(call: Callable[[], object], rounds: int) -> float:
    """Least CPU time of some calls."""
    found = []
    for _ in range(rounds):
        before = time.process_time()
        call()
        found.append(time.process_time() - before)
    return min(found)


def exponent(tokens: Sequence[int], seconds: Sequence[float]) -> float:
    """Slope of log time over log tokens."""
    return float(np.polyfit(np.log(tokens), np.log(seconds), 1)[0])


def arrival(lengths: Sequence[int], length: int) -> list[list[int]]:
    """Rows filled in the order of arrival: the next document goes on the open row or opens a new one."""
    rows: list[list[int]] = []
    room = 0
    for i, need in enumerate(lengths):
        if need > room:
            rows.append([])
            room = length
        rows[-1].append(i)
        room -= need
    return rows


def waste(rows: Sequence[Sequence[int]], lengths: Sequence[int], length: int) -> float:
    return 1 - sum(lengths) / (len(rows) * length)


def against_length(
    name: str, sizes: Sequence[int], call: Callable[[int], Callable[[], object]], counts: Sequence[int], rounds: int
) -> Row:
    """One row: microseconds per token at the largest size, and the exponent."""
    seconds = [cpu_seconds(call(size), rounds) for size in sizes]
    slope = exponent(counts, seconds)
    each = ", ".join(f"{n}: {s / n * 1e6:.2f}" for n, s in zip(counts, seconds))
    note = f"us per token at {each} tokens; exponent {slope:.2f}"
    return Row(name, seconds[-1] / counts[-1] * 1e6, None, "us/token", None, note=note, extra={"exponent": slope})


def main() -> None:
    """Measure and print."""
    args = speed_parser("stream", __doc__.splitlines()[0]).parse_args()
    start(args)
    rounds = 3 if args.quick else 9
    spans = [2, 8, 32] if args.quick else [2, 8, 32, 128]
    documents = {span: recording(float(span), args.seed) for span in spans}
    rows: list[Row] = []
    for chunk_s in (0.0, 2.0):
        counts = [len(write(documents[span], chunk_s)) for span in spans]
        call = partial(partial, write_span, documents, chunk_s)
        rows.append(against_length(f"write, chunks of {chunk_s} s", spans, call, counts, rounds))
    longest = documents[spans[-1]]
    limits = [1 << 40] * len(longest)
    ours, heap = cpu_seconds(lambda: interleave(longest, 0, limits), rounds), cpu_seconds(lambda: heap_merge(longest), rounds)
    rows.append(compare(f"order of the readings of {spans[-1]} s", ours, heap, note="against heapq.merge"))
    streams = {span: write(documents[span], 2.0) for span in spans}
    counts = [len(streams[span]) for span in spans]
    rows.append(
        against_length("grammar", spans, lambda span: lambda: parse(streams[span].ids, VOCABULARY), counts, min(rounds, 3))
    )
    rows += packing(args.seed, rounds, args.quick)
    finish(rows, args)


def packing(seed: int, rounds: int, quick: bool) -> list[Row]:
    """Best fit against the order of arrival, on documents of very unlike lengths."""
    random = np.random.default_rng(seed)
    length, numbers = 4096, [1000, 4000, 16000] if quick else [1000, 4000, 16000, 64000]
    lengths = {n: np.clip(random.lognormal(5.5, 1.1, n).astype(int), 3, length).tolist() for n in numbers}
    row = against_length("best fit (per document)", numbers, lambda n: lambda: fit(lengths[n], length), numbers, rounds)
    mixed = lengths[numbers[1]]
    ours, theirs = fit(mixed, length), arrival(mixed, length)
    found = compare(
        f"padding of {numbers[1]} documents in rows of {length}",
        100 * waste(ours, mixed, length),
        100 * waste(theirs, mixed, length),
        unit="%",
        note=f"{len(ours)} rows against {len(theirs)} in the order of arrival; lengths {min(mixed)} to {max(mixed)}",
    )
    stream = write(recording(1.0, seed), 2.0)
    groups = [[stream] * (length // len(stream))] * 8
    seconds = cpu_seconds(lambda: collate(groups, length), rounds)
    tokens = 8 * length
    rate = Row(
        "collate 8 rows", seconds / tokens * 1e6, None, "us/token", None, note=f"{tokens / seconds / 1e6:.1f} M tokens/s"
    )
    return [row, found, rate]


if __name__ == "__main__":
    main()
