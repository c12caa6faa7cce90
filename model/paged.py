"""Decoding many documents over a paged cache: per step one attention kernel per layer, with no bookkeeping on the host.

In: documents from their start (`prefill`), or pasts that `extend` built (`adopt`); then one token per row and step. Out: hidden
states, equal to `extend`'s to rounding. For GPUs: norm, rotation, the write into the cache and attention of a layer are one
kernel there (`WEFT_DECODE=cuda`, `WEFT_QK_NORM=cuda`; auto is plain torch, see kernels/cuda_decode.py). A session on a CPU is
faster with `extend`, which also takes several tokens of a document at once.

Axes: `B rows of a step  T tokens  D width  H heads  G kv heads  K head width`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from weft.kernels.attention import attention
from weft.kernels.choice import Choice, ChoiceError
from weft.kernels.cuda_decode import Step, advance, decode_attention, new_step
from weft.kernels.norm_rope import norm_rope_store
from weft.kernels.paged import PAGE, PagedCache, PagedKeys
from weft.model.cache import CacheError, KeyStore, StreamCache
from weft.model.rows import pad_rows
from weft.model.transformer import Transformer

CHOICE = Choice("WEFT_CACHE", ("document", "paged"), auto="document")
"""Which cache decoding uses; pages are never chosen by themselves until they have been timed on a GPU."""


def is_paged(asked: str | None) -> bool:
    """Whether `asked` ("document", "paged" or None), else WEFT_CACHE, wants pages. Raises CacheError for any other word."""
    try:
        return CHOICE.pick(asked) == "paged"
    except ChoiceError as error:
        raise CacheError(str(error)) from error


class PagedDecoder:
    """A model and the pasts of up to `rows` documents."""

    def __init__(
        self,
        model: Transformer,
        rows: int,
        max_length: int,
        *,
        page: int = PAGE,
        pages: tuple[int | None, int | None] = (None, None),
    ) -> None:
        """max_length: tokens of the longest document. page, pages: see `PagedCache`. Raises CacheError for `last_medium`."""
        self.model, config = model, model.config
        if config.last_medium:
            raise CacheError("a paged cache has no mask for media that have passed; decode a model with last_medium by extend")
        self.full = [config.is_full(layer) for layer in range(config.layers)]
        self.place = [self.full[:layer].count(kind) for layer, kind in enumerate(self.full)]
        self.cache = PagedCache(
            rows, self.full.count(False), self.full.count(True), config.kv_heads, config.head_width,
            window=None if all(self.full) else config.window, max_landmarks=config.max_landmarks, max_length=max_length,
            page=page, pages=pages, device=model.device, dtype=model.norm.weight.dtype,
        )  # fmt: skip
        self.length = [0] * rows
        self.steps: dict[int, Step] = {}

    @torch.no_grad()
    def prefill(self, new: Any, rows: Sequence[int]) -> Tensor:
        """Documents from their start, packed side by side (a batch-like object), take these rows -> hidden [T D].

        Raises CacheError where the rows do not fit the documents, PagedError where the cache is too small."""
        model = self.model
        local, full = model.layouts(new)
        border = full.cu_seqlens().tolist()
        if len(border) - 1 != len(rows) or len(set(rows)) != len(rows):
            raise CacheError(f"{len(border) - 1} documents need as many different rows; found {list(rows)}")
        landmark = new.landmark.tolist()
        places = [self.cache.begin(row, landmark[a:b]) for row, a, b in zip(rows, border, border[1:])]
        slots = [torch.cat(kind) for kind in zip(*places)]
        for row, a, b in zip(rows, border, border[1:]):
            self.length[row] = b - a
        x = model.embedding(new)
        total, rotary = len(x), model.rotary(new.position)
        for layer, block in enumerate(model.layers):
            keys, one = self._keys(layer), block.attention
            q, k, v = self._project(layer, block.attention_norm(x))
            pool = keys.pool[self.place[layer]]
            q, k = norm_rope_store(q, k, v, one.q_norm, one.k_norm, *rotary, slots[self.full[layer]], pool, one.eps)
            mixed = attention(q, k.to(q.dtype), v.to(q.dtype), full if self.full[layer] else local)
            x = x + one.out(mixed.flatten(1).to(x.dtype))
            x = block.feed(pad_rows(x), total)[:total]
        return model.norm(x)

    @torch.no_grad()
    def adopt(self, row: int, past: StreamCache) -> None:
        """Copy what `extend` has cached of a document into a row."""
        local, full = past.local, past.full
        self.cache.release(row)
        self.cache.reserve(row, past.length, len(local.kept))
        self.length[row] = past.length
        _copy(self.cache.full, row, full, torch.arange(past.length))
        window = self.cache.window
        if not window:
            self.cache.state[row, 0] = past.length
            return
        number = {index: at for at, index in enumerate(local.landmarks)}
        beyond = past.length - window  # older tokens have left the ring
        slot = [self.cache.local.store + number[i] if i < beyond else i % window for i in local.index().tolist()]
        _copy(self.cache.local, row, local, torch.tensor(slot, dtype=torch.int64))
        left = sum(index < beyond for index in local.landmarks)
        self.cache.state[row].copy_(torch.tensor([past.length, len(local.landmarks), left, 0]))
        marked = torch.zeros(window, dtype=torch.uint8)
        marked[[index % window for index in local.landmarks[left:]]] = 1
        self.cache.marked[row].copy_(marked)

    @torch.no_grad()
    def step(self, new: Any, rows: Sequence[int]) -> Tensor:
        """One token per row: `new` holds them in the order of `rows` -> hidden [B D].

        Tokens inside an observed two-way block cannot come one by one. Raises CacheError where the rows do not fit the tokens,
        PagedError where a row is full."""
        if len(new.ids) != len(rows) or len(set(rows)) != len(rows):
            raise CacheError(f"{len(new.ids)} new tokens need as many different rows; found {list(rows)}")
        for row in rows:
            self.cache.reserve(row, self.length[row] + 1)
        for row in rows:
            self.length[row] += 1
        model, total = self.model, len(rows)
        x = pad_rows(model.embedding(new))
        step = self._step(len(x))
        step.rows.fill_(-1)
        step.rows[:total] = torch.tensor(rows, dtype=torch.int32)
        step.landmark[:total] = new.landmark
        step.position[:total] = new.position
        for layer, block in enumerate(model.layers):
            one = block.attention
            q, k, v = self._project(layer, block.attention_norm(x))
            weights = (one.q_norm, one.k_norm)
            mixed = decode_attention(q, k, v, *weights, step, self._keys(layer), self.place[layer], eps=one.eps)
            x = block.feed(x + one.out(mixed.flatten(1).to(x.dtype)), total)
        advance(step, self.cache)
        return model.norm(x)[:total]

    def release(self, row: int) -> None:
        """Forget a document."""
        self.cache.release(row)
        self.length[row] = 0

    def _keys(self, layer: int) -> PagedKeys:
        return self.cache.full if self.full[layer] else self.cache.local

    def _project(self, layer: int, x: Tensor) -> tuple[Tensor, ...]:
        """[T D] -> q [T H K], k and v [T G K], neither normed nor turned."""
        one = self.model.layers[layer].attention
        qkv = one.qkv(x).view(len(x), one.heads + 2 * one.kv_heads, one.head_width)
        return qkv.split([one.heads, one.kv_heads, one.kv_heads], 1)

    def _step(self, batch: int) -> Step:
        config = self.model.config
        if batch not in self.steps:
            self.steps[batch] = new_step(self.cache, batch, config.heads, theta=config.rope_theta, split=config.rope_split)
        return self.steps[batch]


def _copy(keys: PagedKeys, row: int, store: KeyStore, slot: Tensor) -> None:
    """Live slots of a store -> these slots of a row, all layers."""
    place = keys.places(row, slot)
    page = keys.pool.shape[4]
    keys.pool[:, place // page, :, :, place % page] = store.data[:, :, :, : store.used].permute(3, 0, 1, 2, 4).to(keys.pool)


def fetch(keys: PagedKeys, row: int, slot: Tensor, like: Tensor) -> Tensor:
    """Keys and values in these slots of a row, all layers: [layers 2 G slots K], as `KeyStore.data`, in the type of `like`."""
    data = like.new_empty((*like.shape[:3], len(slot), like.shape[4]))
    if len(data):
        place, page = keys.places(row, slot), keys.pool.shape[4]
        data.copy_(keys.pool[:, place // page, :, :, place % page].permute(1, 2, 3, 0, 4))
    return data
