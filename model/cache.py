"""One document's keys and values: what decoding and streaming keep of the past.

In: the keys of every new token. Kept: for full layers all of them; for local layers a ring of the last `window` keys and,
beside it, the landmarks that left the ring (at most `max_landmarks`). So a local layer stays bounded in an endless session,
at `2 * (window + max_landmarks) * G * K` numbers. Keys are turned by absolute positions before they are stored; eviction
moves no position. The order of slots means nothing to attention, so live slots are always the contiguous range 0 .. used.

Axes: `G kv heads  K head width`; a store is [layers 2 G slots K], keys and values side by side.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from weft.model.config import ModelConfig
from weft.model.media import FOREVER, Media

FIRST_SLOTS = 64


class CacheError(ValueError):
    """A cache was asked for something that its past does not allow, or a snapshot does not fit the model."""


@dataclass
class Change:
    """What one extension by `count` tokens does to a store; worked out once, applied to every layer."""

    count: int
    landmarks: list[int]  # indices of the live landmarks afterwards
    freed: list[int] = field(default_factory=list)  # landmarks whose slots are given up
    kept: list[int] | None = None  # index in each landmark slot afterwards; None: unchanged
    moves: list[tuple[int, int]] = field(default_factory=list)  # (slot, slot) inside the store, all read before any is written
    slots: tuple[int, int] | None = None  # the run of slots that takes all new tokens in their order
    sources: Tensor | None = None  # without such a run: the new tokens that are stored
    targets: Tensor | int | None = None  # their slots; of a single token its one slot
    used: int = 0  # live slots afterwards


class KeyStore:
    """Keys and values of all layers of one kind."""

    def __init__(self, layers: int, config: ModelConfig, window: int | None, device: torch.device, dtype: torch.dtype) -> None:
        self.window, self.max_landmarks = window, config.max_landmarks
        self.data = torch.empty((layers, 2, config.kv_heads, 0, config.head_width), device=device, dtype=dtype)
        self.length = 0
        self.landmarks: list[int] = []  # live landmarks, oldest first (local stores only)
        self.kept: list[int] = []  # landmark in slot window + p

    @property
    def used(self) -> int:
        """Live slots; they are 0 .. used."""
        return self.length if self.window is None else min(self.length, self.window) + len(self.kept)

    def reserve(self, slots: int) -> None:
        """Make room for `slots`: at least doubling, never past what a bounded store can need."""
        have = self.data.shape[3]
        if slots <= have:
            return
        size = max(slots, 2 * have, FIRST_SLOTS)
        if self.window is not None:
            size = max(slots, min(size, self.window + (self.max_landmarks or size)))
        grown = self.data.new_zeros((*self.data.shape[:3], size, self.data.shape[4]))
        grown[:, :, :, :have] = self.data
        self.data = grown

    def index(self) -> np.ndarray:
        """Index in the document of the key in each live slot, int64 [used]."""
        if self.window is None or self.length <= self.window:
            return np.arange(self.length)
        last = self.length - 1
        ring = last - (last - np.arange(self.window)) % self.window
        return np.concatenate([ring, np.array(self.kept, dtype=np.int64)])

    def deaths(self, new_born: list[int]) -> np.ndarray:
        """First query index that no longer sees each live slot, given the births of the landmarks about to come."""
        index = self.index()
        if self.window is None:
            return np.full(len(index), FOREVER)
        dies = index + self.window
        if self.landmarks:
            marks = np.array(self.landmarks)
            at = np.searchsorted(marks, index).clip(max=len(marks) - 1)
            death = np.array(landmark_deaths(len(marks), new_born, self.max_landmarks)[: len(marks)])
            dies = np.where(marks[at] == index, np.maximum(dies, death[at]), dies)
        return dies

    def change(self, count: int, new_landmarks: list[int]) -> Change:
        """Which slots the next `count` tokens take; `new_landmarks` are the places (from 0) of landmarks among them."""
        n, window = self.length, self.window
        if window is None:
            return self._targets(Change(count, [], used=n + count), 0)
        landmarks = self.landmarks + [n + i for i in new_landmarks] if new_landmarks else self.landmarks
        excess = 0 if self.max_landmarks is None else max(0, len(landmarks) - self.max_landmarks)
        change = Change(count, landmarks[excess:] if excess else landmarks, freed=landmarks[:excess])
        first = n + count - window  # the oldest index that stays in the ring
        if first > 0:
            live = change.landmarks
            leaving = live[bisect_left(live, max(n - window, 0)) : bisect_left(live, first)]
            if leaving or change.freed:
                return self._rearranged(change, leaving)
        change.used = min(n + count, window) + len(self.kept)
        return self._targets(change, max(0, first - n))

    def _rearranged(self, change: Change, leaving: list[int]) -> Change:
        """Landmarks leave the ring for the landmark slots, dead ones give theirs up; slots stay contiguous."""
        assert self.window is not None
        n, window, dead = self.length, self.window, set(change.freed)
        survivors = sum(index not in dead for index in self.kept)
        size = survivors + len(leaving)
        kept = [index if index not in dead else -1 for index in self.kept[:size]] + [-1] * (size - len(self.kept))
        tail = [(window + p, index) for p, index in enumerate(self.kept) if p >= size and index not in dead]
        incoming = tail + [(index % window if index < n else -1, index) for index in leaving]
        stored: list[int] = []
        targets: list[int] = []
        for (slot, index), place in zip(incoming, [p for p, index in enumerate(kept) if index < 0]):
            kept[place] = index
            if slot >= 0:
                change.moves.append((slot, window + place))
            else:
                stored.append(index - n)
                targets.append(window + place)
        change.kept, change.used = kept, min(n + change.count, window) + size
        return self._targets(change, max(0, n + change.count - window - n), stored, targets)

    def _targets(self, change: Change, first: int, stored: list[int] = [], targets: list[int] = []) -> Change:  # noqa: B006
        """Slots of the new tokens `first` .. `count`, plus `stored` tokens in landmark slots."""
        ring = self.window or FOREVER
        begin = self.length % ring
        if change.count == 1 or (not stored and first == 0 and begin + change.count <= ring):
            change.slots = (begin, begin + change.count)
            change.targets = begin if change.count == 1 else None
            return change
        sources = [*range(first, change.count), *stored]
        slots = [(self.length + i) % ring for i in range(first, change.count)] + targets
        device = self.data.device
        change.sources = torch.tensor(sources, device=device)
        change.targets = torch.tensor(slots, device=device)
        return change

    def move(self, change: Change, layers: int | slice) -> None:
        """Bring landmarks that leave the ring to their slots."""
        if change.moves:
            source, target = zip(*change.moves)
            store = self.data[layers]
            store[..., list(target), :] = store[..., list(source), :]

    def write(self, layer: int, new: Tensor, change: Change) -> None:
        """Store the new keys and values [count 2 G K] of one layer."""
        self.move(change, layer)
        if change.slots is not None:
            self.data[layer, :, :, slice(*change.slots)] = new.permute(1, 2, 0, 3)
        else:
            assert change.sources is not None and isinstance(change.targets, Tensor)
            rows = new[change.sources].permute(1, 2, 0, 3).to(self.data.dtype)
            self.data[layer].index_copy_(2, change.targets, rows)

    def commit(self, change: Change) -> None:
        """The change has been written to every layer."""
        self.length += change.count
        self.landmarks = change.landmarks
        if change.kept is not None:
            self.kept = change.kept

    def nbytes(self) -> int:
        """Allocated bytes."""
        return self.data.numel() * self.data.element_size()


def landmark_deaths(old: int, new_born: list[int], max_landmarks: int | None) -> list[int]:
    """Death of `old` landmarks followed by the new ones: the birth of the `max_landmarks`-th one after each."""
    if max_landmarks is None:
        return [FOREVER] * (old + len(new_born))
    born = [-1] * old + new_born
    return [born[i + max_landmarks] if i + max_landmarks < len(born) else FOREVER for i in range(len(born))]


class StreamCache:
    """The past of one document. Made by `Transformer.new_cache()`, filled by `Transformer.extend`."""

    def __init__(self, config: ModelConfig, device: torch.device, dtype: torch.dtype) -> None:
        self.config = config
        local = [layer for layer in range(config.layers) if not config.is_full(layer)]
        full = [layer for layer in range(config.layers) if config.is_full(layer)]
        self.place = {layer: i for layers in (local, full) for i, layer in enumerate(layers)}
        self.local = KeyStore(len(local), config, config.window, device, dtype)
        self.full = KeyStore(len(full), config, None, device, dtype)
        self.open_block = -1
        """Two-way block of the last token, -1 outside of one."""
        self.media = Media(config.last_medium) if config.last_medium else None
        """Where media began and ended, where the config hides passed ones."""

    @property
    def length(self) -> int:
        """Tokens of the document so far."""
        return self.full.length

    def nbytes(self) -> int:
        """Allocated bytes of keys and values."""
        return self.local.nbytes() + self.full.nbytes()

    def clone(self) -> StreamCache:
        """An independent copy: two continuations of one past."""
        return StreamCache.from_tensors(self.config, self.to_tensors())

    def to_tensors(self) -> dict[str, Tensor]:
        """A snapshot that safetensors can hold; only live slots are in it."""
        snapshot = {"state": torch.tensor([self.length, self.open_block])}
        if self.media is not None:
            snapshot |= self.media.to_tensors()
        for name, store in (("local", self.local), ("full", self.full)):
            snapshot[f"{name}.data"] = store.data[:, :, :, : store.used].clone()
            snapshot[f"{name}.landmarks"] = torch.tensor(store.landmarks, dtype=torch.int64)
            snapshot[f"{name}.kept"] = torch.tensor(store.kept, dtype=torch.int64)
        return snapshot

    @classmethod
    def from_tensors(cls, config: ModelConfig, snapshot: dict[str, Tensor]) -> StreamCache:
        """The inverse of `to_tensors`. Raises `CacheError` for a snapshot of another model shape."""
        try:
            data = snapshot["full.data"]
            cache = cls(config, data.device, data.dtype)
            length, cache.open_block = snapshot["state"].tolist()
            if cache.media is not None:
                cache.media = Media.from_tensors(config.last_medium, snapshot)
            for name, store in (("local", cache.local), ("full", cache.full)):
                store.length = length
                store.landmarks = snapshot[f"{name}.landmarks"].tolist()
                store.kept = snapshot[f"{name}.kept"].tolist()
                data = snapshot[f"{name}.data"]
                shape = (*store.data.shape[:3], store.used, store.data.shape[4])
                if data.shape != shape:
                    raise CacheError(f"snapshot {name}.data has shape {list(data.shape)}, this model needs {list(shape)}")
                store.data = data.clone()
        except KeyError as missing:
            raise CacheError(f"snapshot lacks {missing}; it needs the tensors of StreamCache.to_tensors()") from None
        return cache
