"""A paged cache for decoding on a GPU: the keys and values of many documents, with all bookkeeping on the device.

In: documents, one per row. Kept of a row: for full layers every token; for local layers a ring of the last `window` tokens, and
beside it a ring of the landmarks that left the first. What is alive is the same as in a session's cache: a decode step sees the
last `window` tokens, itself included, and of the landmarks the last `max_landmarks`.

Slots of a row are cut into pages, taken from one pool when `reserve` asks for them: that is the host's part, outside of CUDA
graphs. Page 0 is nobody's. What a row holds is `state [rows 4]` on the device (tokens, landmarks among them, landmarks that
have left the window, 1 after a token found no page) and `marked [rows window]` (is the token in this ring slot a landmark);
both, and the tables, have one row more than asked for, which is nobody's. `cuda_decode.py` steps over it without host reads.

Axes: `B rows of a step  G kv heads  K head width`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

FOREVER = 2**31 - 1
PAGE = 64


class PagedError(ValueError):
    """A row or a page was asked for that the cache does not have."""


class PagedKeys:
    """Keys and values of all layers of one kind: pool [layers pages 2 G PAGE K], table int32 [rows width]."""

    def __init__(
        self, layers: int, cache: PagedCache, window: int | None, max_landmarks: int | None, pages: int | None
    ) -> None:
        rows, length, page = cache.rows, cache.max_length, cache.page
        self.page, self.state, self.marked = page, cache.state, cache.marked
        self.window = FOREVER if window is None else window
        self.max_landmarks = 0 if window is None else FOREVER if max_landmarks is None else max_landmarks
        ring = -(-min(self.window, length) // page)
        self.store = ring * page
        width = ring + -(-min(self.max_landmarks, length) // page)
        self.table = torch.zeros((rows + 1, width), dtype=torch.int32, device=cache.state.device)
        self.owned = torch.zeros((rows, width), dtype=torch.int64)  # the same on the host
        count = 1 + (rows * width if pages is None else pages)
        self.free = list(range(count - 1, 0, -1))
        shape = (layers, count, 2, cache.kv_heads, page, cache.head_width)
        self.pool = torch.empty(shape, device=cache.state.device, dtype=cache.dtype)

    def reserve(self, row: int, length: int, landmarks: int) -> None:
        """Pages for a row of `length` tokens with `landmarks` of them beyond the window."""
        ring = -(-min(length, self.window) // self.page)
        beyond = -(-min(landmarks, self.max_landmarks) // self.page)
        first = self.store // self.page
        wanted = [*range(ring), *range(first, first + beyond)]
        missing = [at for at in wanted if at >= self.owned.shape[1] or not self.owned[row, at]]
        if missing and missing[-1] >= self.owned.shape[1]:
            raise PagedError(f"{length} tokens do not fit a row of {self.store}; make the cache with a larger max_length")
        if len(missing) > len(self.free):
            raise PagedError(
                f"row {row} needs {len(missing)} pages, {len(self.free)} are free; release rows or ask for more pages"
            )
        if missing:
            self.owned[row, missing] = torch.tensor([self.free.pop() for _ in missing])
            self.table[row].copy_(self.owned[row])

    def release(self, row: int) -> None:
        """Give a row's pages back."""
        self.free += self.owned[row][self.owned[row] > 0].tolist()
        self.owned[row] = 0
        self.table[row].zero_()

    def places(self, row: int, slot: Tensor) -> Tensor:
        """Slots of a row -> page * PAGE + place in the page, on the device; int64 [n], -1 stays -1."""
        page = self.owned[row][slot.clamp(min=0) // self.page]
        return torch.where(slot < 0, slot, page * self.page + slot % self.page).to(self.pool.device)


class PagedCache:
    """The past of up to `rows` documents for models with local and full layers."""

    def __init__(
        self,
        rows: int,
        local_layers: int,
        full_layers: int,
        kv_heads: int,
        head_width: int,
        *,
        window: int | None,
        max_landmarks: int | None,
        max_length: int,
        page: int = PAGE,
        pages: tuple[int | None, int | None] = (None, None),
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        """max_length: tokens of the longest document. page: tokens per page, a power of two. pages: of local and of full
        layers; None takes as many as all rows can need. Raises PagedError for a page that is no power of two."""
        if page < 1 or page & (page - 1):
            raise PagedError(f"a page holds {page} tokens; take a power of two")
        self.rows, self.max_length, self.page = rows, max_length, page
        self.kv_heads, self.head_width, self.dtype = kv_heads, head_width, dtype
        self.state = torch.zeros((rows + 1, 4), dtype=torch.int32, device=device)
        self.marked = torch.zeros((rows + 1, window or 1), dtype=torch.uint8, device=device)
        self.window, self.max_landmarks = window, max_landmarks
        self.local = PagedKeys(local_layers if window else 0, self, window, max_landmarks, pages[0])
        self.full = PagedKeys(full_layers, self, None, 0, pages[1])

    def reserve(self, row: int, length: int, landmarks: int | None = None) -> None:
        """Make room for a document of `length` tokens, `landmarks` of them beyond the window (None: as many as there can be).
        Raises PagedError where there is none."""
        if not 0 <= row < self.rows:
            raise PagedError(f"row {row} does not exist; the cache has {self.rows}")
        if length > self.max_length:
            raise PagedError(f"a document of {length} tokens is longer than max_length, {self.max_length}")
        if self.local.pool.shape[0]:
            self.local.reserve(row, length, max(0, length - self.local.window) if landmarks is None else landmarks)
        if self.full.pool.shape[0]:
            self.full.reserve(row, length, 0)

    def begin(self, row: int, landmark: Sequence[bool]) -> tuple[Tensor, Tensor]:
        """A document of len(landmark) tokens takes the row: places of its tokens in local and in full layers, int64 [n] each
        (-1: not kept), for `cuda.norm_rope_store` to write. The host's part of prefill."""
        mark = torch.tensor(list(landmark), dtype=torch.bool)
        at = torch.arange(len(mark))
        window, most = self.local.window, self.local.max_landmarks
        number = mark.cumsum(0) - 1  # of each landmark
        beyond = at < len(mark) - window
        left, count = int((mark & beyond).sum()), int(mark.sum())
        self.release(row)
        self.reserve(row, len(mark), left)
        stored = mark & beyond & (number >= count - most)
        slot = torch.where(beyond, torch.where(stored, self.local.store + number % max(most, 1), -1), at % window)
        self.state[row].copy_(torch.tensor([len(mark), count, left, 0]))
        if self.window:
            ring = torch.zeros(self.window, dtype=torch.uint8)
            ring[slot[mark & ~beyond]] = 1
            self.marked[row].copy_(ring)
        return self._places(self.local, row, slot), self._places(self.full, row, at)

    def release(self, row: int) -> None:
        """Forget a row and give its pages back."""
        self.local.release(row)
        self.full.release(row)
        self.state[row].zero_()
        self.marked[row].zero_()

    def faults(self) -> list[int]:
        """Rows in which a token found no page; reads the device. Their results are wrong from then on: reserve earlier."""
        return self.state[:-1, 3].nonzero()[:, 0].tolist()

    def nbytes(self) -> int:
        """Bytes of both pools."""
        return sum(keys.pool.numel() * keys.pool.element_size() for keys in (self.local, self.full))

    @staticmethod
    def _places(keys: PagedKeys, row: int, slot: Tensor) -> Tensor:
        return keys.places(row, slot) if keys.pool.shape[0] else slot.new_full(slot.shape, -1).to(keys.pool.device)
