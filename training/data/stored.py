"""Streams made ahead of training and read in place: a small document costs more to tokenise than to learn from.

In: a source's shards, a tokenizer, a loss plan, the longest document. Out: one safetensors file per source, named by the
digest of all four, with the arrays of its streams end to end; every rank maps the same file. Left out, and made when they
are drawn, are documents of which something is still to be drawn (a role), that must be cut, or that cannot be read.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.torch import load_file

from weft.tokenizers.bundle import StreamTokenizer
from weft.tokenizers.plan import LossPlan
from weft.tokenizers.stream import ARRAYS, Stream, StreamError
from weft.training.data.config import LoaderConfig, SourceConfig
from weft.training.data.decode_pool import DecodePool
from weft.training.data.documents import BadSample, Documents, stream_of
from weft.training.data.shards import ShardDataset
from weft.training.data.token_cache import TokenCache

log = logging.getLogger(__name__)
LAYOUT = 1
"""Raise it when the arrays change."""


def stored_path(
    folder: str | Path, dataset: ShardDataset, tokenizer: StreamTokenizer, plan: LossPlan | None, length: int
) -> Path:
    """Where the streams of one source lie under this tokenizer, plan and longest document."""
    facts = {
        "layout": LAYOUT,
        "shards": dataset.info.digest,
        "split": dataset.split,
        "tokenizer": tokenizer.digest(),
        "plan": asdict(plan) if plan else None,
        "length": length,
    }
    return Path(folder) / f"{hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]}.safetensors"


def store_streams(
    folder: str | Path,
    dataset: ShardDataset,
    tokenizer: StreamTokenizer,
    plan: LossPlan | None,
    length: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Path:
    """Make the streams of a source, unless they are there. The file appears whole, by one rename."""
    from safetensors.numpy import save_file

    path = stored_path(folder, dataset, tokenizer, plan, length)
    if path.exists():
        return path
    documents = Documents([dataset], tokenizer, DecodePool(0), TokenCache())
    parts: dict[str, list[np.ndarray]] = {name: [] for name in ARRAYS}
    sizes = tokenizer.feature_sizes()
    rows: dict[str, list[np.ndarray]] = {m: [] for m in sizes}
    places: dict[str, list[np.ndarray]] = {m: [] for m in sizes}
    start = np.zeros(len(dataset) + 1, np.int64)
    first = {m: np.zeros(len(dataset) + 1, np.int64) for m in sizes}
    for number in range(len(dataset)):
        stream = _settled(documents, number, plan, length)
        start[number + 1] = start[number] + (len(stream) if stream else 0)
        for name in ARRAYS if stream else ():
            parts[name].append(getattr(stream, name))
        for m in sizes:
            count = len(stream.feature_at[m]) if stream else 0
            first[m][number + 1] = first[m][number] + count
            if stream and count:
                rows[m].append(stream.features[m])
                places[m].append(stream.feature_at[m])
        if number % 256 == 0:
            progress(number, len(dataset))
    empty = tokenizer.builder().open().take(np.zeros(0, np.int64))  # every type and width, also of a source without streams
    arrays = {name: np.concatenate([getattr(empty, name), *parts[name]]) for name in ARRAYS} | {"start": start}
    for m in sizes:
        arrays[f"rows.{m}"] = np.concatenate([empty.features[m], *rows[m]])
        arrays[f"at.{m}"] = np.concatenate([empty.feature_at[m], *places[m]])
        arrays[f"first.{m}"] = first[m]
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f"{path.name}.{os.getpid()}.part")
    save_file(arrays, draft)
    os.replace(draft, path)
    return path


def store_source(source: SourceConfig, config: LoaderConfig, plan: LossPlan | None, tokenizer_folder: str | Path) -> Path:
    """`store_streams` of a configured source, everything read from disk: for a process of its own."""
    if config.streams_folder is None:
        raise ValueError("data.streams_folder is null; name the folder that the streams go to")
    dataset = ShardDataset(
        source.path,
        source.split,
        budget=config.bad_budget,
        cache_dir=config.shard_cache_folder,
        cache_bytes=config.shard_cache_bytes,
    )
    return store_streams(config.streams_folder, dataset, StreamTokenizer.load(tokenizer_folder), plan, config.length)


def _settled(documents: Documents, number: int, plan: LossPlan | None, length: int) -> Stream | None:
    """The stream of a document about which nothing is drawn later."""
    try:
        ready = documents.get(0, number)
    except BadSample:
        return None  # the loader meets it again, counts it and replaces it
    if any(item.segment.role == "either" for item in ready.items):
        return None
    try:
        stream = stream_of(documents.tokenizer, plan, ready, ready.items)
    except StreamError:
        raise
    except ValueError:
        return None
    return stream if len(stream) <= length else None


class StoredStreams:
    """number -> Stream, without infos, id and pair key; the arrays are views of the file."""

    def __init__(self, path: Path) -> None:
        self._arrays = {name: tensor.numpy() for name, tensor in load_file(path).items()}
        self._start = self._arrays["start"].tolist()
        modalities = [name[6:] for name in self._arrays if name.startswith("first.")]
        self._first = {m: self._arrays[f"first.{m}"].tolist() for m in modalities}

    def has(self, number: int) -> bool:
        """Whether the stream of a sample is here."""
        return self._start[number] != self._start[number + 1]

    def get(self, number: int, pair: str | None) -> Stream | None:
        """The stream of a sample, None if it has to be made."""
        at, end = self._start[number], self._start[number + 1]
        if at == end:
            return None
        features, feature_at = {}, {}
        for m, first in self._first.items():
            low, high = first[number], first[number + 1]
            features[m], feature_at[m] = self._arrays[f"rows.{m}"][low:high], self._arrays[f"at.{m}"][low:high]
        tokens: dict[str, Any] = {name: self._arrays[name][at:end] for name in ARRAYS}
        return Stream(**tokens, features=features, feature_at=feature_at, pair=pair)


def open_stored(
    folder: str | None, dataset: ShardDataset, tokenizer: StreamTokenizer, plan: LossPlan | None, length: int
) -> StoredStreams | None:
    """The stored streams of a source, if there are any for exactly this tokenizer, plan and length."""
    if folder is None:
        return None
    path = stored_path(folder, dataset, tokenizer, plan, length)
    if not path.exists():
        log.info(
            "%s holds no streams of %s; they are made as they are drawn (weft tokenize makes them ahead)", folder, dataset.where
        )
        return None
    return StoredStreams(path)


__all__ = ["StoredStreams", "open_stored", "store_source", "store_streams", "stored_path"]
