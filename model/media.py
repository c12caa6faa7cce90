"""Media that have passed: "attend only to the last preceding medium" (Flamingo, arXiv 2204.14198, section 2.1).

In: modality and landmark of tokens. Out: for a packed batch the number of every token's medium, as `StreamLayout.build`
takes it; for a cached document `Media`, which knows where each medium began. A medium is a run of tokens of one of the chosen
modalities, from its opening token to its closing one, which is a landmark. All of its keys die where the next medium of the
document opens. A segment that is written in several pieces (merged clocks) is as many media.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

FOREVER = 1 << 62


def medium_numbers(modality: Tensor, landmark: Tensor, chosen: Sequence[int]) -> Tensor | None:
    """int64 [T]: the number of each token's medium, -1 outside of one; None where no modality is chosen.

    modality int64 [T], landmark bool [T]."""
    if not chosen:
        return None
    closed_before = torch.cumsum(landmark, 0) - landmark.long()
    return torch.where(torch.isin(modality, torch.tensor(chosen, device=modality.device)), closed_before, -1)


@dataclass(frozen=True)
class Media:
    """The media of one document so far: two integers for each."""

    chosen: tuple[int, ...]
    opens: tuple[int, ...] = ()
    """Index of each medium's first token."""
    ends: tuple[int, ...] = ()
    """One past its last token so far."""
    is_open: bool = False
    """Whether the next token may belong to the last medium."""

    def after(self, length: int, modality: Sequence[int], landmark: Sequence[bool]) -> Media:
        """The state behind the new tokens of a document that has `length`."""
        opens, ends, is_open = list(self.opens), list(self.ends), self.is_open
        for at, (kind, closes) in enumerate(zip(modality, landmark, strict=True), length):
            if kind not in self.chosen:
                is_open = False
                continue
            if not is_open:
                opens.append(at)
                ends.append(at)
            ends[-1] = at + 1
            is_open = not closes
        return replace(self, opens=tuple(opens), ends=tuple(ends), is_open=is_open)

    @property
    def has_passed(self) -> bool:
        """Whether there are keys of this document that have died by another medium."""
        return len(self.opens) > 1

    def deaths(self, index: np.ndarray) -> np.ndarray:
        """int64 [n]: first query of the document that no longer sees the keys at `index` [n]; `FOREVER` outside of media."""
        if not self.opens:
            return np.full(len(index), FOREVER)
        opens, ends = np.array(self.opens), np.array(self.ends)
        which = np.searchsorted(opens, index, side="right") - 1
        death = np.append(opens[1:], FOREVER)[which]
        return np.where((which >= 0) & (index < ends[which]), death, FOREVER)

    def to_tensors(self) -> dict[str, Tensor]:
        """A snapshot, int64."""
        return {
            "media": torch.tensor([self.opens, self.ends], dtype=torch.int64).reshape(2, -1),
            "media.is_open": torch.tensor(self.is_open),
        }

    @classmethod
    def from_tensors(cls, chosen: tuple[int, ...], snapshot: dict[str, Tensor]) -> Media:
        """The inverse of `to_tensors`; a KeyError where the snapshot was made without the option."""
        opens, ends = snapshot["media"].tolist()
        return cls(chosen, tuple(opens), tuple(ends), bool(snapshot["media.is_open"]))
