"""Prefill, decoding and streaming in one function: append tokens to documents whose past is cached.

In: new tokens of several documents side by side (a batch-like object), one `StreamCache` and one length per document. Out:
hidden states [T D], equal to what a forward over the whole documents gives at those places, to rounding.

A key is visible by the same lifetimes as in training (`born <= query < dies`, in indices of the document). Matrix products run
over all documents at once with rows filled up to a multiple of 16, attention runs per document: a document's bits do not depend
on what else is in the call.

Axes: `T tokens  D width  H heads  G kv heads  R = H / G  K head width`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from weft.model.block import Block, RMSNorm
from weft.model.cache import FOREVER, CacheError, Change, KeyStore, StreamCache, landmark_deaths
from weft.model.config import ModelConfig
from weft.model.embedding import Embedding
from weft.model.rows import pad_rows

QUERIES = 256
"""Queries per mask: bounds its memory at QUERIES * keys."""
STACKED = 1 << 17
"""Numbers per document up to which its live slots are copied beside others' to save calls (not measured finely)."""


class Trunk(Protocol):
    """What is asked of a model: `Transformer` is one."""

    config: ModelConfig
    embedding: Embedding
    norm: RMSNorm

    @property
    def layers(self) -> list[Block]: ...

    def rotary(self, position: Tensor) -> Any: ...


@dataclass
class Piece:
    """Queries [first, end) of a document's new tokens, the keys that any of them sees, and who sees which."""

    first: int
    end: int
    keys: slice | Tensor  # among [cached slots, new tokens]
    mask: Tensor | None  # bool [R * queries, keys]; None: all visible


@dataclass
class Plan:
    """What one document's new tokens see and how its store changes, shared by all layers of a kind."""

    pieces: list[Piece] | None  # None: a single token that sees every live slot
    change: Change


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
    x = pad_rows(model.embedding(new))
    rotary = model.rotary(pad_rows(new.position))
    landmark, two_way = new.landmark.tolist(), new.two_way.tolist()
    starts = list(accumulate(lengths, initial=0))
    spans = [(s, slice(a, b)) for s, (a, b) in enumerate(pairwise(starts)) if b > a]
    plans = [(caches[s], at, *plan(caches[s], landmark[at], two_way[at], model.config)) for s, at in spans]
    longer = [entry for entry in plans if entry[2].pieces is not None]
    singles = [entry for entry in plans if entry[2].pieces is None]
    steps = [Steps([(at.start, cache.local, local.change) for cache, at, local, _ in singles])]
    steps.append(Steps([(at.start, cache.full, full.change) for cache, at, _, full in singles]))
    for layer, block in enumerate(model.layers):
        is_full = model.config.is_full(layer)
        q, k, v = block.attention.project(block.attention_norm(x), rotary)
        mixed, new_kv = torch.zeros_like(q), torch.stack([k, v.to(k.dtype)], 1)
        for cache, at, local, full in longer:
            store, one = (cache.full, full) if is_full else (cache.local, local)
            mixed[at] = attend(store, cache.place[layer], q[at], new_kv[at], one)
        if singles:
            steps[is_full].attend(singles[0][0].place[layer], q, new_kv, mixed)
        x = block.feed(x + block.attention.out(mixed.flatten(1).to(x.dtype)), total)
    for cache, at, local, full in plans:
        cache.local.commit(local.change)
        cache.full.commit(full.change)
        cache.open_block = two_way[at][-1]
    return model.norm(x)[:total]


def plan(cache: StreamCache, landmark: list[bool], two_way: list[int], config: Any) -> tuple[Plan, Plan]:
    """Plans of the local and of the full layers for one document's new tokens."""
    if two_way[0] >= 0 and two_way[0] == cache.open_block:
        raise CacheError(f"two-way block {two_way[0]} was begun in an earlier call; hand in an observed image whole")
    repeat = config.heads // config.kv_heads
    full = _plan(cache.full, landmark, two_way, repeat)
    window = cache.local.window
    if window is None or cache.length + len(landmark) > window:
        return _plan(cache.local, landmark, two_way, repeat), full
    change = cache.local.change(len(landmark), [i for i, is_mark in enumerate(landmark) if is_mark])
    cache.local.reserve(change.used)
    return Plan(full.pieces, change), full  # nothing has left the window yet: both kinds see the same


def _plan(store: KeyStore, landmark: list[bool], two_way: list[int], repeat: int) -> Plan:
    count = len(landmark)
    marks = [i for i, is_mark in enumerate(landmark) if is_mark]
    change = store.change(count, marks)
    pieces = None if count == 1 else _pieces(store, marks, np.array(two_way), repeat)
    store.reserve(change.used)
    return Plan(pieces, change)


def _pieces(store: KeyStore, marks: list[int], two_way: np.ndarray, repeat: int) -> list[Piece]:
    """Cut the new tokens into runs of queries and find each run's keys by their lifetimes."""
    n, count, cached = store.length, len(two_way), store.used
    new_born, new_dies = _lifetimes(n, marks, two_way, store)
    born = np.concatenate([np.full(cached, -1), new_born])
    dies = np.concatenate([store.deaths([int(new_born[i]) for i in marks]), new_dies])
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
        rows = None if mask.all() else torch.from_numpy(np.tile(mask, (repeat, 1))).to(device)
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


def attend(store: KeyStore, layer: int, q: Tensor, new: Tensor, plan: Plan) -> Tensor:
    """One document, one layer: q [N H K], keys and values [N 2 G K] of the new tokens -> [N H K]; the store takes them."""
    assert plan.pieces is not None
    past = store.data[layer, :, :, : store.used].to(new.dtype)
    keys, values = torch.cat([past, new.permute(1, 2, 0, 3)], 2)
    mixed = [_mix(q[p.first : p.end], keys, values, p) for p in plan.pieces]
    store.write(layer, new, plan.change)
    return mixed[0] if len(mixed) == 1 else torch.cat(mixed)


class Steps:
    """Documents that get a single token, which sees every live slot: no masks, and few calls for many documents."""

    def __init__(self, entries: list[tuple[int, KeyStore, Change]]) -> None:
        self.rows = [row for row, _, _ in entries]
        targets, groups = [], defaultdict(list)
        for row, store, change in entries:
            store.move(change, slice(None))  # what is moved has died or is overwritten below
            targets.append(store.data[:, :, :, change.targets].unbind(0))
            groups[change.used].append((row, store.data[:, :, :, : change.used].unbind(0)))
        self.targets = [list(layer) for layer in zip(*targets)]
        self.groups = []
        for members in groups.values():
            values = members[0][1][0].numel() if members[0][1] else 0
            for part in [members] if values <= STACKED else [[member] for member in members]:
                self.groups.append(([row for row, _ in part], list(zip(*(live for _, live in part)))))

    def attend(self, layer: int, q: Tensor, new: Tensor, mixed: Tensor) -> None:
        """q [T H K], new keys and values [T 2 G K]; writes rows of mixed [T H K]. Documents with equally many live slots share
        a call: the kernel treats each on its own, so that bits stay as alone."""
        rows = new.unbind(0)
        torch._foreach_copy_(self.targets[layer], [rows[row] for row in self.rows])
        for at, live in self.groups:
            part = live[layer]
            data = (part[0][None] if len(part) == 1 else torch.stack(part)).to(q.dtype)
            own = q[at[0] : at[0] + 1] if len(at) == 1 else q[at]
            query = own.reshape(len(at), data.shape[2], -1, q.shape[-1])
            mixed[at] = F.scaled_dot_product_attention(query, data[:, 0], data[:, 1]).view_as(own)


def _mix(q: Tensor, keys: Tensor, values: Tensor, piece: Piece) -> Tensor:
    """Queries [N H K] over the piece's keys [G M K]; the R query heads of a key head are rows of one product."""
    count, heads, width = q.shape
    groups = len(keys)
    rows = q.view(count, groups, heads // groups, width).permute(1, 2, 0, 3).reshape(1, groups, -1, width)
    keys, values = keys[:, piece.keys][None], values[:, piece.keys][None]
    out = F.scaled_dot_product_attention(rows, keys, values, attn_mask=piece.mask)
    return out.view(groups, heads // groups, count, width).permute(2, 0, 1, 3).reshape(count, heads, width)
