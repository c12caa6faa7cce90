"""Who may attend to whom, as two numbers per token.

In: the document, landmark and two-way tensors of T packed tokens (all documents of a batch side by side), and a window.
Out: `StreamLayout`, which every attention backend reads. Key j is visible to query i exactly when `born[j] <= i < dies[j]`,
because causal order, document borders, a sliding window, landmarks and two-way blocks all make a key visible to ONE contiguous
run of queries. Built in O(T) by cumulative operations, on any device, without a sync.

Axes: `T tokens  H heads  G kv heads  K head width`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from weft.kernels.tiles import KeyTiles, QueryTiles, key_tiles, tile_extreme

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask


class LayoutError(ValueError):
    """The tensors handed to `StreamLayout.build` do not describe a layout."""


@dataclass(frozen=True, eq=False)
class StreamLayout:
    """Key lifetimes and query ranges of T packed tokens. All tensors int32 on one device.

    Every key that query i may see lies in the main range `[first_key[i], end_key[i])` or is one of the landmarks
    `landmark_at[first_landmark[i] : end_landmark[i]]`, which all lie before the main range. Without `medium` the main range is
    exact; with it the lifetimes still decide element by element.
    """

    born: Tensor
    """[T]: first query that sees key j."""
    dies: Tensor
    """[T]: first query after those that see key j."""
    document_start: Tensor
    """[T]: first token of token i's document."""
    document_end: Tensor
    """[T]: one past its last token."""
    first_key: Tensor
    """[T], monotone."""
    end_key: Tensor
    """[T], monotone."""
    landmark_at: Tensor
    """[T]: positions of all landmarks in order; entries past their number are T."""
    first_landmark: Tensor
    """[T]: index into `landmark_at`."""
    end_landmark: Tensor
    """[T]: index into `landmark_at`; equal to `first_landmark` where no landmark lies before the main range."""
    window: int | None
    """Keys that a query sees, itself included; None: the whole document."""
    plans: dict[Any, Any] = field(default_factory=dict, repr=False)
    """What backends derive from this layout once and share between layers."""

    @classmethod
    def build(
        cls,
        document: Tensor,
        landmark: Tensor,
        two_way: Tensor,
        window: int | None,
        max_landmarks: int | None = None,
        medium: Tensor | None = None,
    ) -> StreamLayout:
        """The layout of T packed tokens.

        document [T] int: does not decrease; equal numbers are one document.
        landmark [T] bool: every later token of the document sees these keys, however far.
        two_way [T] int: -1, or the number of a block (a contiguous run inside one document) whose tokens all see each other.
        window: a query sees the last `window` keys of its document, itself included; None: all.
        max_landmarks: beyond the window only the last so many landmarks of a document stay visible.
        medium [T] int: -1, or the number of the medium (image, clip) a token belongs to, a contiguous run. All keys of a medium
            die when the next medium of the document opens ("attend only to the last preceding medium", Flamingo).

        Raises LayoutError for shapes or numbers that cannot be a layout. Values on an accelerator are not read.
        """
        _check(document, landmark, two_way, window, max_landmarks, medium)
        total = len(document)
        at = torch.arange(total, device=document.device, dtype=torch.int32)
        start, end = _runs(document, at)
        block_start, block_end = _runs(two_way, at, start)
        inside = two_way >= 0
        born = torch.where(inside, block_start, at)
        dies = end if window is None else torch.minimum(at + window, end)
        dies = torch.where(inside, torch.maximum(dies, block_end), dies)
        end_key = torch.where(inside, block_end, at + 1)
        first_key = start if window is None else torch.maximum(at - (window - 1), start)
        first_key = torch.where(inside, torch.minimum(first_key, block_start), first_key)
        before = torch.cat([at.new_zeros(1), torch.cumsum(landmark, 0, dtype=torch.int32)])  # landmarks before position i
        landmark_at = at.new_full((total + 1,), total)
        landmark_at.scatter_(0, torch.where(landmark, before[:-1], total).long(), at)
        landmark_at[total] = total
        dies = torch.where(landmark, torch.maximum(dies, _landmark_death(before, landmark_at, born, end, max_landmarks)), dies)
        if medium is not None:
            dies = torch.minimum(dies, torch.maximum(_next_medium(medium, at, start, end), torch.where(inside, block_end, 0)))
        first_landmark = before[start.long()]
        if max_landmarks is not None:
            first_landmark = torch.maximum(first_landmark, before[1:] - max_landmarks)
        end_landmark = before[first_key.long()]
        first_landmark = torch.minimum(first_landmark, end_landmark)
        return cls(
            born, dies, start, end, first_key, end_key, landmark_at[:total], first_landmark, end_landmark, window
        )  # fmt: skip

    def __len__(self) -> int:
        return len(self.born)

    @property
    def device(self) -> torch.device:
        return self.born.device

    def to(self, device: torch.device | str) -> StreamLayout:
        """The same layout on another device (plans are made anew)."""
        names = ("born", "dies", "document_start", "document_end", "first_key", "end_key", "landmark_at", "first_landmark")
        tensors = {name: getattr(self, name).to(device) for name in (*names, "end_landmark")}
        return StreamLayout(**tensors, window=self.window)

    def dense_mask(self) -> Tensor:
        """bool [T queries, T keys]: the truth that every backend is held to. O(T^2) memory."""
        query = torch.arange(len(self), device=self.device, dtype=torch.int32)[:, None]
        return (self.born <= query) & (query < self.dies)

    @cached_property
    def pairs(self) -> int:
        """Number of visible (query, key) pairs."""
        return int((self.dies - self.born).sum(dtype=torch.int64))

    def flops(self, heads: int, width: int) -> int:
        """Multiply-adds times two of the two forward matmuls over visible pairs only; backward costs 2.5 times that."""
        return 4 * self.pairs * heads * width

    def cu_seqlens(self) -> Tensor:
        """int32 [documents + 1]: document borders, 0 first and T last (the form of variable-length kernels)."""
        at = torch.arange(len(self), device=self.device, dtype=torch.int32)
        starts = at[self.document_start == at]
        return torch.cat([starts, starts.new_full((1,), len(self))])

    def key_tiles(self, size: int) -> KeyTiles:
        """Lifetime extremes per tile of `size` keys; the last tile may be short."""
        return key_tiles(self.born, self.dies, size)

    def query_tiles(self, size: int) -> QueryTiles:
        """Key ranges per tile of `size` queries: main range, and the landmarks before it of the queries' documents."""
        has = self.end_landmark > self.first_landmark
        first = torch.where(has, self.first_landmark, len(self))
        last = torch.where(has, self.end_landmark, 0)
        low, high = tile_extreme(first, size, "amin"), tile_extreme(last, size, "amax")
        main = (tile_extreme(self.first_key, size, "amin"), tile_extreme(self.end_key, size, "amax"))
        return QueryTiles(size, *main, torch.minimum(low, high), high)

    def to_block_mask(self, size: int = 128) -> BlockMask:
        """FlexAttention's BlockMask from the intervals: O((T / size)^2) compares instead of O(T^2) mask values.

        Its `mask_mod` is the interval test, so that a change of layout never changes the compiled program.
        """
        from weft.kernels.block_mask import block_mask

        return block_mask(self.born, self.dies, self.key_tiles(size))

    def to_xformers(self) -> Any:
        """The xformers attention bias that says the same. Raises NotExpressible (a ValueError) naming what no bias can say."""
        from weft.kernels.xformers_bias import bias

        return bias(self.born, self.dies, self.cu_seqlens(), self.window)


def _runs(label: Tensor, at: Tensor, also: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Start and end of the run of equal labels (and of equal `also`) around each token."""
    new = torch.ones_like(label, dtype=torch.bool)
    new[1:] = label[1:] != label[:-1]
    if also is not None:
        new[1:] |= also[1:] != also[:-1]
    start = torch.cummax(torch.where(new, at, 0), 0).values
    last = torch.ones_like(new)
    last[:-1] = new[1:]
    end = torch.where(last, at + 1, len(label)).flip(0).cummin(0).values.flip(0)
    return start, end


def _landmark_death(before: Tensor, landmark_at: Tensor, born: Tensor, end: Tensor, max_landmarks: int | None) -> Tensor:
    """Where a landmark at each position dies: the end of its document, or the birth of the `max_landmarks`-th one after it."""
    if max_landmarks is None:
        return end
    rank = torch.clamp(before[:-1] + max_landmarks, max=len(landmark_at) - 1)
    successor = landmark_at[rank.long()]
    exists = successor < end
    return torch.where(exists, born[torch.where(exists, successor, 0).long()], end)


def _next_medium(medium: Tensor, at: Tensor, start: Tensor, end: Tensor) -> Tensor:
    """For a token of a medium: where the next medium of its document opens (else the document's end); others: the end."""
    run_start, run_end = _runs(medium, at, start)
    opens = torch.where((medium >= 0) & (run_start == at), at, len(at))
    next_open = (
        torch.cat([opens, opens.new_full((1,), len(at))]).flip(0).cummin(0).values.flip(0)
    )  # first opening at or after i
    death = torch.minimum(next_open[run_end.long()], end)
    return torch.where(medium >= 0, death, end)


def _check(
    document: Tensor, landmark: Tensor, two_way: Tensor, window: int | None, max_landmarks: int | None, medium: Tensor | None
) -> None:
    given = {"document": document, "landmark": landmark, "two_way": two_way}
    if medium is not None:
        given["medium"] = medium
    for name, tensor in given.items():
        if tensor.shape != (document.numel(),):
            shape = tuple(document.shape)
            raise LayoutError(f"{name} has shape {tuple(tensor.shape)}, document {shape}; all must be [T]")
    if landmark.dtype != torch.bool:
        raise LayoutError(f"landmark is {landmark.dtype}; it must be bool")
    if window is not None and window < 1:
        raise LayoutError(f"window is {window}; it counts the query itself, so it must be at least 1 (None: no window)")
    if max_landmarks is not None and max_landmarks < 0:
        raise LayoutError(f"max_landmarks is {max_landmarks}; it must be at least 0 (None: no limit)")
    if document.device.type == "cpu" and bool((document[1:] < document[:-1]).any()):
        raise LayoutError("document numbers must not decrease along the packed tokens; pack whole documents side by side")
