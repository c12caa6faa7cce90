"""Attention of several documents' new tokens over their caches, in as few calls as their shapes allow.

In: tasks, each a document's store and the plan of its new tokens. Out: `Group`s of documents that do the same work: as many new
tokens, as many keys. A group's stores lie side by side in one tensor, so that a step reads and writes them in place. Every
kernel call treats each document on its own, so that its bits are those it has alone.

Axes: `n documents of a group  N new tokens of each  H heads  G kv heads  R = H / G  M keys  K head width`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from weft.model.cache import Change, KeyStore

SHARED = 1 << 17
"""Numbers that a store holds in one layer up to which it is moved beside others' to save calls (not measured finely)."""
AREA = 1 << 22
"""Query-key pairs of one call, which bound the memory of its masks."""


@dataclass
class Piece:
    """Queries [first, end) of a document's new tokens, the keys that any of them sees, and who sees which."""

    first: int
    end: int
    keys: slice | Tensor  # among [cached slots, new tokens]
    mask: Tensor | None  # bool [queries, keys]; None: all visible


@dataclass
class Plan:
    """What one document's new tokens see and how its store changes, shared by all layers of a kind."""

    pieces: list[Piece] | None  # None: a single token that sees every live slot
    change: Change


@dataclass
class Task:
    """One document's plan in one store; its new tokens are rows `row`, `row` + 1 ... of the call."""

    row: int
    store: KeyStore
    plan: Plan


def together(tasks: Sequence[Task]) -> list[Group]:
    """Tasks that do the same work, in groups."""
    alike: dict[Hashable, list[Task]] = defaultdict(list)
    for task in tasks:
        alike[_work(task)].append(task)
    groups = []
    for members in alike.values() if len(tasks[0].store.data) else ():  # a model without layers of this kind
        store, plan = members[0].store, members[0].plan
        size = store.data[0].numel()
        area = sum((p.end - p.first) * p.mask.shape[1] for p in plan.pieces or () if p.mask is not None)
        most = max(1, AREA // max(area, 1)) if size <= SHARED else 1
        groups += [Group(members[i : i + most]) for i in range(0, len(members), most)]
    return groups


def _work(task: Task) -> Hashable:
    """Equal for documents that can share calls."""
    pieces, change = task.plan.pieces, task.plan.change
    shape = (task.store.data.shape, task.store.used, change.used)
    if pieces is None:
        return shape
    if any(isinstance(piece.keys, Tensor) for piece in pieces):
        return id(task)
    return (*shape, *((p.first, p.end, p.keys.start, p.keys.stop, p.mask is None) for p in pieces))  # type: ignore[union-attr]


def side_by_side(stores: Sequence[KeyStore]) -> Tensor:
    """The stores' data as one tensor [layers n 2 G slots K] that shares their memory; they are moved if they lie apart."""
    data = [store.data for store in stores]
    first = data[0]
    if len(data) == 1:
        return first[:, None]
    gap, memory = data[1].storage_offset() - first.storage_offset(), first.untyped_storage().data_ptr()
    ahead = (first.storage_offset() + i * gap for i in range(len(data)))
    in_order = gap == first[0].numel() and all(
        d.storage_offset() == at and d.stride() == first.stride() and d.untyped_storage().data_ptr() == memory
        for d, at in zip(data, ahead)
    )
    if in_order:
        layers, *one = first.shape
        stride, *inner = first.stride()
        return first.as_strided((layers, len(data), *one), (stride, gap, *inner))
    base = torch.stack(data, 1)
    for i, store in enumerate(stores):
        store.data = base[:, i]
    return base


class Group:
    """Documents whose new tokens do the same work."""

    def __init__(self, tasks: Sequence[Task]) -> None:
        stores, first = [task.store for task in tasks], tasks[0]
        pieces = [task.plan.pieces or [] for task in tasks]
        self.stores, self.changes = stores, [task.plan.change for task in tasks]
        self.pieces, self.past, self.used = first.plan.pieces, first.store.used, first.plan.change.used
        self.base = side_by_side(stores)
        count = first.plan.change.count
        starts = [task.row for task in tasks]
        self.shape = (len(tasks), count)
        if starts == list(range(starts[0], starts[0] + len(tasks) * count, count)):
            self.rows: slice | Tensor = slice(starts[0], starts[0] + len(tasks) * count)
        else:
            self.rows = torch.tensor([start + i for start in starts for i in range(count)], device=self.base.device)
        groups = self.base.shape[3]
        self.masks = [_masks([own[i].mask for own in pieces], groups) for i in range(len(self.pieces or ()))]
        slots = {change.slots for change in self.changes}
        self.slots = slots.pop() if len(slots) == 1 else None
        self.moving = [(store, change) for store, change in zip(stores, self.changes) if change.moves]
        if self.pieces is None:  # what is moved has died or is overwritten below: all layers at once
            for store, change in self.moving:
                store.move(change, slice(None))
            self.moving = []
            self.live = [part.unbind(0) for part in self.base[:, :, :, :, : self.used].unbind(2)]
            self.free = None if self.slots is None else self.base[:, :, :, :, self.slots[0]].unbind(0)

    def attend(self, layer: int, q: Tensor, kv: Tensor, mixed: Tensor) -> None:
        """One layer: q [T H K], new keys and values [T 2 G K]; the stores take theirs; writes the rows of mixed [T H K]."""
        own, query = kv[self.rows], q[self.rows].unflatten(1, (kv.shape[2], -1))  # [n*N 2 G K], [n*N G R K]
        if self.pieces is None:
            self._write_one(layer, own)
            keys, values = (part[layer].to(q.dtype) for part in self.live)
            mixed[self.rows] = F.scaled_dot_product_attention(query, keys, values).flatten(1, 2)
            return
        own, query = own.unflatten(0, self.shape), query.unflatten(0, self.shape)
        new = own.permute(0, 2, 3, 1, 4)
        if self.past:
            new = torch.cat([self.base[layer, :, :, :, : self.past].to(new.dtype), new], 3)
        keys, values = new.unbind(1)
        parts = [_mix(query[:, p.first : p.end], keys, values, p, mask) for p, mask in zip(self.pieces, self.masks)]
        mixed[self.rows] = (parts[0] if len(parts) == 1 else torch.cat(parts, 1)).flatten(0, 1)
        self._write(layer, own)

    def _write_one(self, layer: int, own: Tensor) -> None:
        """A new key and value [n 2 G K] of each document into its slot of one layer."""
        if self.free is not None:
            self.free[layer].copy_(own)
            return
        slots = [change.slots[0] for change in self.changes if change.slots is not None]
        torch._foreach_copy_([self.base[layer, i, :, :, slot] for i, slot in enumerate(slots)], list(own))

    def _write(self, layer: int, own: Tensor) -> None:
        """New keys and values [n N 2 G K] into the slots of one layer."""
        if self.slots is not None:
            for store, change in self.moving:
                store.move(change, layer)
            self.base[layer, :, :, :, slice(*self.slots)].copy_(own.permute(0, 2, 3, 1, 4))
        else:
            for store, change, rows in zip(self.stores, self.changes, own):
                store.write(layer, rows, change)


def _masks(masks: Sequence[Tensor | None], groups: int) -> Tensor | None:
    """bool [n*G 1 N M] of the same piece of every document, or [1 1 N M] where they agree."""
    given = [mask for mask in masks if mask is not None]
    if not given:
        return None
    if all(mask is given[0] or torch.equal(mask, given[0]) for mask in given):
        return given[0][None, None]
    return torch.stack(given)[:, None].repeat_interleave(groups, 0)


def _mix(q: Tensor, keys: Tensor, values: Tensor, piece: Piece, mask: Tensor | None) -> Tensor:
    """Queries [n N G R K] over the piece's keys [n G M K] -> [n N H K]; the R query heads of a key head read it in place."""
    n, count, groups, repeat, width = q.shape
    query = q.permute(0, 2, 3, 1, 4).reshape(n * groups, repeat, count, width)
    keys, values = (x[:, :, piece.keys].reshape(n * groups, 1, -1, width).expand(-1, repeat, -1, -1) for x in (keys, values))
    out = F.scaled_dot_product_attention(query, keys, values, attn_mask=mask)
    return out.view(n, groups, repeat, count, width).permute(0, 3, 1, 2, 4).reshape(n, count, groups * repeat, width)
