"""Prefill, decoding and streaming in one function: append tokens to documents whose past is cached.

In: new tokens of several documents side by side (a batch-like object), one `StreamCache` and one length per document. Out:
hidden states [T D], equal to what a forward over the whole documents gives at those places, to rounding.

A key is visible by the same lifetimes as in training (`born <= query < dies`, in indices of the document). Matrix products run
over all documents at once with rows filled up (`rows.py`), attention treats each document on its own (`together.py`): a
document's bits do not depend on what else is in the call.

Axes: `T tokens  D width  H heads  G kv heads  K head width`.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from itertools import accumulate, pairwise
from math import gcd
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from weft.kernels.fused import whole_turn
from weft.kernels.rotary import Rotary
from weft.model.block import Block, RMSNorm
from weft.model.cache import FOREVER, CacheError, KeyStore, StreamCache, landmark_deaths
from weft.model.config import ModelConfig
from weft.model.embedding import Embedding
from weft.model.media import Media
from weft.model.rows import GRAIN, pad_rows
from weft.model.together import Piece, Plan, Task, together

QUERIES = 256
"""Queries per mask: bounds its memory at QUERIES * keys."""
DOUBLES = 16  # elements of one step of the vector loop in float64 with AVX-512


Known = dict[Hashable, list[Piece]]
"""Pieces of documents that begin, by what they follow from: prompts of one shape are worked out once."""


class Trunk(Protocol):
    """What is asked of a model: `Transformer` is one."""

    config: ModelConfig
    embedding: Embedding
    norm: RMSNorm

    @property
    def layers(self) -> list[Block]: ...

    def rotary(self, position: Tensor) -> Any: ...


@torch.no_grad()
def extend(model: Trunk, new: Any, caches: Sequence[StreamCache], lengths: Sequence[int]) -> Tensor:
    """Append `lengths[s]` tokens to `caches[s]`; tokens of `new` lie side by side in that order.

    `new` has a batch's tensor names (`document` is not read). Positions are absolute in the document. A two-way block must lie
    within one call; block numbers of one document must differ between blocks, so that a split one is noticed.
    Raises `CacheError` where lengths do not fit or a block is split.
    """
    total = len(new.ids)
    if len(caches) != len(lengths) or sum(lengths) != total or any(n < 0 for n in lengths):
        raise CacheError(f"{len(caches)} caches with lengths {list(lengths)} do not fit {total} new tokens")
    if len({id(cache) for cache in caches}) != len(caches):
        raise CacheError("one cache appears twice in a call; clone() it first")
    if not total:
        return model.embedding(new)
    with torch.inference_mode():  # a tenth less per call of torch than no_grad
        x = _through(model, new, caches, lengths)
    return model.norm(x)[:total]  # outside of it: an ordinary tensor


def _through(model: Trunk, new: Any, caches: Sequence[StreamCache], lengths: Sequence[int]) -> Tensor:
    """All blocks over the new tokens; the caches take their keys. Rows filled up, without the last norm."""
    total, config = len(new.ids), model.config
    x = pad_rows(model.embedding(new))
    rotary = angles(model, new.position, len(x))
    landmark, two_way = new.landmark.tolist(), new.two_way.tolist()
    starts = list(accumulate(lengths, initial=0))
    spans = [(cache, slice(a, b)) for cache, (a, b) in zip(caches, pairwise(starts)) if b > a]
    known: Known = {}
    kinds = new.modality.tolist() if config.last_medium else []
    media = [cache.media and cache.media.after(cache.length, kinds[at], landmark[at]) for cache, at in spans]
    plans = [plan(cache, landmark[at], two_way[at], known, seen) for (cache, at), seen in zip(spans, media)]
    local = [Task(at.start, cache.local, own) for (cache, at), (own, _) in zip(spans, plans)]
    full = [Task(at.start, cache.full, own) for (cache, at), (_, own) in zip(spans, plans)]
    groups = [together(tasks) for tasks in (local, full)]
    mixed = None
    for layer, block in enumerate(model.layers):
        is_full = config.is_full(layer)
        q, kv = block.attention.project_rows(block.attention_norm(x), rotary)
        if mixed is None:  # rows that fill up stay zero
            mixed = torch.zeros_like(q, memory_format=torch.contiguous_format)
        place = caches[0].place[layer]
        for group in groups[is_full]:
            group.attend(place, q, kv, mixed)
        x = block.feed(x + block.attention.out(mixed.flatten(1).to(x.dtype)), total)
    for (cache, at), (in_local, in_full), seen in zip(spans, plans, media):
        cache.media = seen
        cache.local.commit(in_local.change)
        cache.full.commit(in_full.change)
        cache.open_block = two_way[at.stop - 1]
    return x


def angles(model: Trunk, position: Tensor, rows: int) -> Rotary:
    """cos and sin of positions [T 3] for `rows` rows; on a CPU in whole vectors of one thread's work, as `rows.py` says."""
    if position.device.type != "cpu":
        return model.rotary(pad_rows(position, rows))
    half = model.config.head_width // 2
    step = DOUBLES // gcd(DOUBLES, half)
    parts = pad_rows(pad_rows(position, rows), step).split(max(step, GRAIN // half // step * step))
    tables = [model.rotary(part) for part in parts]
    cos, sin = tables[0] if len(tables) == 1 else (torch.cat(part) for part in zip(*tables))
    return whole_turn(cos[:rows], sin[:rows])


def plan(cache: StreamCache, landmark: list[bool], two_way: list[int], known: Known, media: Media | None) -> tuple[Plan, Plan]:
    """Plans of the local and of the full layers for one document's new tokens; `media` are its media behind them."""
    if two_way[0] >= 0 and two_way[0] == cache.open_block:
        raise CacheError(f"two-way block {two_way[0]} was begun in an earlier call; hand in an observed image whole")
    full = _plan(cache.full, landmark, two_way, known, media)
    window = cache.local.window
    if window is None or cache.length + len(landmark) > window:
        return _plan(cache.local, landmark, two_way, known, media), full
    change = cache.local.change(len(landmark), [i for i, is_mark in enumerate(landmark) if is_mark])
    cache.local.reserve(change.used)
    return Plan(full.pieces, change), full  # nothing has left the window yet: both kinds see the same


def _plan(store: KeyStore, landmark: list[bool], two_way: list[int], known: Known, media: Media | None) -> Plan:
    count = len(landmark)
    marks = [i for i, is_mark in enumerate(landmark) if is_mark]
    change = store.change(count, marks)
    store.reserve(change.used)
    if count == 1 and not (media and media.has_passed):
        return Plan(None, change)
    if store.length:
        return Plan(_pieces(store, marks, np.array(two_way), media), change)
    key = (store.window, store.max_landmarks, tuple(marks), tuple(two_way), media)
    if key not in known:
        known[key] = _pieces(store, marks, np.array(two_way), media)
    return Plan(known[key], change)


def _pieces(store: KeyStore, marks: list[int], two_way: np.ndarray, media: Media | None) -> list[Piece]:
    """Cut the new tokens into runs of queries and find each run's keys by their lifetimes."""
    n, count, cached = store.length, len(two_way), store.used
    new_born, new_dies = _lifetimes(n, marks, two_way, store)
    born = np.concatenate([np.full(cached, -1), new_born])
    dies = np.concatenate([store.deaths([int(new_born[i]) for i in marks]), new_dies])
    if media is not None:
        dies = np.minimum(dies, media.deaths(np.concatenate([store.index(), np.arange(n, n + count)])))
    pieces = []
    for first in range(0, count, QUERIES):
        end = min(first + QUERIES, count)
        seen = np.nonzero((born < n + end) & (dies > n + first))[0]
        query = np.arange(n + first, n + end)[:, None]
        mask = (born[seen] <= query) & (query < dies[seen])
        keys: slice | Tensor = slice(int(seen[0]), int(seen[-1]) + 1)
        device = store.data.device
        if len(seen) != seen[-1] + 1 - seen[0]:
            keys = torch.from_numpy(seen).to(device)
        rows = None if mask.all() else torch.from_numpy(mask).to(device)
        pieces.append(Piece(first, end, keys, rows))
    return pieces


def _lifetimes(n: int, marks: list[int], two_way: np.ndarray, store: KeyStore) -> tuple[np.ndarray, np.ndarray]:
    """born and dies of the new tokens, in indices of the document (the rule of `StreamLayout.build`)."""
    count = len(two_way)
    at = np.arange(n, n + count)
    edge = np.flatnonzero(np.diff(two_way)) + 1
    run = np.searchsorted(edge, np.arange(count), side="right")
    begins, ends = np.concatenate([[0], edge]) + n, np.concatenate([edge, [count]]) + n
    inside = two_way >= 0
    born = np.where(inside, begins[run], at)
    if store.window is None:
        return born, np.full(count, FOREVER)
    dies = np.maximum(at + store.window, np.where(inside, ends[run], 0))
    deaths = landmark_deaths(len(store.landmarks), [int(born[i]) for i in marks], store.max_landmarks)
    dies[marks] = np.maximum(dies[marks], deaths[len(store.landmarks) :])
    return born, dies
