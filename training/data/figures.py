"""What is in a folder of shards, in figures.

In: a folder or URL of shards, and (for figures in tokens) a tokenizer. Out: a `DataReport`. Counts, seconds and bytes are
exact, from the indexes. Lengths and token shares are measured on a sample of documents, drawn without replacement by a
fixed seed.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from weft.tokenizers.bundle import StreamTokenizer
from weft.tokenizers.pack import pack_rows
from weft.tokenizers.segment import Document
from weft.tokenizers.stream import Stream
from weft.training.data.index import SPLITS, DatasetInfo, ShardError
from weft.training.data.records import restore
from weft.training.data.shards import ShardDataset
from weft.training.data.storage import Storage, open_storage
from weft.training.random import permutation

Table = dict[str, dict[str, dict[str, float]]]


@dataclass(frozen=True)
class TokenReport:
    """Measured on `documents` documents of one split."""

    documents: int
    unusable: int
    """Documents of the sample that could not be read or tokenised."""
    lengths: tuple[int, ...]
    """Tokens of each document, ascending."""
    share: dict[str, float]
    """Modality -> share of all tokens, openers and closing tokens included."""
    mean_by_source: dict[str, float]
    """Source -> tokens per document."""
    row_length: int
    row_waste: float
    """Padding where documents are packed into rows of `row_length`."""
    cut: int
    """Documents longer than `row_length`."""


@dataclass(frozen=True)
class DataReport:
    """Everything the page shows, apart from the examples."""

    where: str
    digest: str
    bytes: int
    shards: dict[str, int]
    """Per split."""
    samples: dict[str, dict[str, int]]
    """Split -> source -> documents."""
    content: Table
    """Source -> modality -> {"segments", "bytes", "seconds", "cells"}, over all splits."""
    refused: dict[str, int]
    damaged: list[str]
    first_refused: dict[str, str] = field(default_factory=dict)
    """Reason -> what `refused.jsonl` says of the first such document."""
    tokens: TokenReport | None = None
    examples: list[tuple[str, Document]] = field(default_factory=list)

    def modalities(self) -> dict[str, dict[str, float]]:
        """`content` summed over sources."""
        total: dict[str, dict[str, float]] = {}
        for source in self.content.values():
            for modality, counts in source.items():
                mine = total.setdefault(modality, dict.fromkeys(counts, 0))
                for name, value in counts.items():
                    mine[name] = mine.get(name, 0) + value
        return dict(sorted(total.items()))


def describe(
    folder: str | Path,
    *,
    tokenizer: StreamTokenizer | None = None,
    length: int = 1024,
    sample: int = 512,
    examples: int = 12,
) -> DataReport:
    """The figures of a folder of shards. Damage is reported, not raised."""
    storage = open_storage(folder)
    try:
        info = DatasetInfo.from_bytes(storage.whole("dataset.json"), f"{folder}/dataset.json")
    except ShardError as error:
        raise ShardError(f"{folder} holds no finished dataset ({error}); run weft prepare, or check the path") from error
    names = [s for s in SPLITS if any(x["split"] == s for x in info.shards)]
    splits = {name: ShardDataset(folder, name, budget=1.0) for name in names}
    chosen = _chosen(splits, sample)
    return DataReport(
        where=str(folder),
        digest=info.digest,
        bytes=sum(int(s["bytes"]) for s in info.shards),
        shards=dict(Counter(str(s["split"]) for s in info.shards)),
        samples={name: dict(sorted(Counter(e.source for e in d.entries()).items())) for name, d in splits.items()},
        content=_content(splits),
        refused=info.refused,
        damaged=[m for d in splits.values() for m in d.damaged],
        first_refused=_first_refused(storage) if info.refused else {},
        tokens=_measure(chosen, tokenizer, length) if tokenizer else None,
        examples=_examples(chosen, examples),
    )


def _first_refused(storage: Storage) -> dict[str, str]:
    """Of each reason the first case; nothing where the list was not copied along with the shards."""
    try:
        rows = [json.loads(line) for line in storage.whole("refused.jsonl").splitlines()]
        return {str(row["reason"]): str(row["detail"]) for row in reversed(rows)}
    except (ShardError, ValueError, KeyError, TypeError):
        return {}


def _content(splits: dict[str, ShardDataset]) -> Table:
    content: dict[str, dict[str, Counter[str]]] = defaultdict(lambda: defaultdict(Counter))
    for dataset in splits.values():
        for entry in dataset.entries():
            for modality, counts in entry.counts.items():
                content[entry.source][modality].update(counts)  # type: ignore[arg-type]
    return {s: {m: dict(c) for m, c in sorted(by.items())} for s, by in sorted(content.items())}


def _chosen(splits: dict[str, ShardDataset], sample: int) -> list[tuple[ShardDataset, int]]:
    """Sample numbers of the first split, drawn by a fixed seed."""
    if not splits:
        return []
    dataset = next(iter(splits.values()))
    return [(dataset, int(n)) for n in permutation(len(dataset), 0, "report")[:sample]]


def _measure(chosen: list[tuple[ShardDataset, int]], tokenizer: StreamTokenizer, length: int) -> TokenReport:
    streams: list[Stream] = []
    share: Counter[str] = Counter()
    by_source: dict[str, list[int]] = defaultdict(list)
    unusable = 0
    cache: dict[str, Any] = {}
    for dataset, number in chosen:
        try:
            sample = dataset.read(number)
            stream = tokenizer.encode(restore(sample.members, sample.where), cache=cache)
        except (ValueError, ShardError):
            unusable += 1
            continue
        streams.append(stream)
        by_source[dataset.locate(number)[1].source].append(len(stream))
        for index, count in zip(*np.unique(stream.modality, return_counts=True)):
            share[tokenizer.modalities[int(index)]] += int(count)
    _, packed = pack_rows(streams, length)
    return TokenReport(
        documents=len(streams),
        unusable=unusable,
        lengths=tuple(sorted(len(s) for s in streams)),
        share={m: n / max(share.total(), 1) for m, n in sorted(share.items())},
        mean_by_source={s: float(np.mean(n)) for s, n in sorted(by_source.items())},
        row_length=length,
        row_waste=packed.waste if streams else 0.0,
        cut=packed.cut,
    )


def _examples(chosen: list[tuple[ShardDataset, int]], count: int) -> list[tuple[str, Document]]:
    """Some documents, one source after the other."""
    rows: dict[str, list[tuple[ShardDataset, int]]] = defaultdict(list)
    for dataset, number in chosen:
        rows[dataset.locate(number)[1].source].append((dataset, number))
    found: list[tuple[str, Document]] = []
    for place in range(count):
        for row in rows.values():
            if place < len(row) and len(found) < count:
                dataset, number = row[place]
                try:
                    sample = dataset.read(number)
                    found.append((sample.where, restore(sample.members, sample.where)))
                except (ValueError, ShardError):
                    continue
    return found
