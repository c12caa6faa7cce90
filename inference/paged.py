"""Decoding over pages: single-token steps run through `PagedDecoder`, on a GPU with one attention kernel per layer.

In: a model. Out: `PagedModel`, which is that model in every respect but one: a call that gives each document one token is a
step over a paged cache. A document keeps its `StreamCache`, whose bookkeeping goes on as ever; only its keys lie in pages
meanwhile. Whoever reads or sets the `data` of one of its stores (the next part of a prompt, a clone, a snapshot) has them
brought back first, so that everything else goes on working. A session that has met limits of its own, and inputs with features
or two-way blocks, go to the model itself.

Asked for by `load(..., cache="paged")` or WEFT_CACHE=paged; never chosen by itself until it has been timed on a GPU. Which
kernel does a step is `weft.kernels.cuda_decode.CHOICE` (WEFT_DECODE).
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from weft.inference.around import Around
from weft.inference.lanes import KINDS, steps_of
from weft.model.cache import KeyStore, StreamCache
from weft.model.paged import PagedDecoder, fetch

FIRST_LENGTH = 256
OWN = ("data", "_data", "stay")


class PagedModel(Around):
    """A `Transformer` whose single-token steps run over pages. Everything else is the model's own."""

    _decoder: PagedDecoder
    _guests: list[weakref.ref[StreamCache] | None]

    def __init__(self, model: Any) -> None:
        """Raises `CacheError` for a model that pages cannot serve."""
        self.inner = model
        self._lock = threading.RLock()
        self._settle(1, FIRST_LENGTH)

    def extend(self, new: Any, caches: Sequence[StreamCache], lengths: Sequence[int]) -> Tensor:
        """As `Transformer.extend`; one token per document becomes a step over pages."""
        single = all(length == 1 for length in lengths) and len(lengths) == len({id(cache) for cache in caches}) > 0
        plain = not any(len(rows) for rows in new.features.values()) and not bool((new.two_way >= 0).any())
        if not (single and plain and all(map(self._serves, caches))):
            return self.inner.extend(new, caches, lengths)
        with self._lock:
            stays = self._stays(caches)
            marks = new.landmark.tolist()
            changes = steps_of(caches, marks)
            hidden = self._decoder.step(new, [stay.row for stay in stays])
            for cache, stay, change, mark in zip(caches, stays, changes, marks):
                for kind in KINDS:
                    getattr(cache, kind).commit(change[kind])
                cache.open_block = -1
                stay.landmarks += mark
            return hidden

    def _serves(self, cache: StreamCache) -> bool:
        """Its keys live as long as the config says: a limit of its own (a session's) has not been met yet."""
        config, local, full = self.inner.config, cache.local, cache.full
        most = local.max_landmarks
        few = most == config.max_landmarks or (most is not None and len(local.landmarks) < most)
        return local.window == config.window and few and (full.window is None or full.length < full.window)

    def _stays(self, caches: Sequence[StreamCache]) -> list[Stay]:
        """Each document's row; those without one get one."""
        longest = max(cache.length for cache in caches) + 1
        strangers = [cache for cache in caches if _stay_of(cache, self._decoder) is None]
        free = [row for row, guest in enumerate(self._guests) if guest is None or guest() is None]
        if longest > self._decoder.cache.max_length or len(strangers) > len(free):
            self._settle(len(self._guests) - len(free) + len(strangers), max(longest, self._decoder.cache.max_length))
            strangers, free = list(caches), list(range(len(self._guests)))
        for cache, row in zip(strangers, free):
            self._decoder.adopt(row, cache)
            Stay(self, cache, row)
            self._guests[row] = weakref.ref(cache)
        return [stay for cache in caches if (stay := _stay_of(cache, self._decoder)) is not None]

    def _settle(self, rows: int, length: int) -> None:
        """New pages for so many documents of so many tokens, rounded up to powers of two; everybody leaves the old ones."""
        for guest in self.__dict__.get("_guests", ()):
            if guest is not None and (cache := guest()) is not None and (stay := _stay_of(cache, self._decoder)) is not None:
                stay.end()
        with torch.inference_mode(False):  # they are written in any mode
            self._decoder = PagedDecoder(self.inner, 1 << (rows - 1).bit_length(), 1 << (length - 1).bit_length())
        self._guests = [None] * len(self._decoder.length)


class Stay:
    """A document's time in a row of a decoder."""

    def __init__(self, model: PagedModel, cache: StreamCache, row: int) -> None:
        """`row` has adopted the cache."""
        self.model, self.decoder, self.row = model, model._decoder, row
        self.landmarks = len(cache.local.landmarks)
        """Landmarks so far as the row counts them: those alive when it began, and all since."""
        self.local, self.full = PagedStore(cache.local, self), PagedStore(cache.full, self)
        cache.local, cache.full = self.local, self.full

    def end(self) -> None:
        """Bring the keys back and leave."""
        with self.model._lock, torch.inference_mode(False), torch.no_grad():
            if self.local.stay is None:
                return  # another thread was faster
            local, pages = self.local, self.decoder.cache
            first = self.landmarks - len(local.landmarks)
            number = {index: first + at for at, index in enumerate(local.landmarks)}
            slot = torch.arange(local.used)
            if pages.window:
                beyond, most = local.length - pages.window, max(pages.local.max_landmarks, 1)  # older tokens have left the ring
                slots = [
                    pages.local.store + number[i] % most if i < beyond else i % pages.window for i in local.index().tolist()
                ]
                slot = torch.tensor(slots, dtype=torch.int64)
            keys = (
                fetch(pages.local, self.row, slot, local._data),
                fetch(pages.full, self.row, torch.arange(local.length), self.full._data),
            )
            local.stay = self.full.stay = None
            local.data, self.full.data = keys
            self.decoder.release(self.row)
            if self.decoder is self.model._decoder:
                self.model._guests[self.row] = None


class PagedStore(KeyStore):
    """A store whose keys lie in pages until somebody reads or sets `data`."""

    def __init__(self, store: KeyStore, stay: Stay) -> None:
        self.__dict__.update({name: value for name, value in vars(store).items() if name not in OWN})
        layers, two, groups, _, width = store.data.shape
        self._data = store.data.new_empty((layers, two, groups, 0, width))
        self.stay: Stay | None = stay

    @property
    def data(self) -> Tensor:  # type: ignore[override]
        """[layers 2 G slots K]."""
        if self.stay is not None:
            self.stay.end()
        return self._data

    @data.setter
    def data(self, value: Tensor) -> None:
        if self.stay is not None:
            self.stay.end()
        self._data = value

    def __copy__(self) -> KeyStore:
        """A plain store that holds the same."""
        plain = KeyStore.__new__(KeyStore)
        plain.data = self.data
        plain.__dict__.update({name: value for name, value in vars(self).items() if name not in OWN})
        return plain


def _stay_of(cache: StreamCache, decoder: PagedDecoder) -> Stay | None:
    stay = cache.local.stay if isinstance(cache.local, PagedStore) else None
    return stay if stay is not None and stay.decoder is decoder else None
