"""What shall be produced: the user's words turned into a list of `Produce`, checked before any work.

In: `produce="text" | "image" | ... | "any"`, a `Produce`, a segment to edit, or a list of these in order. Out: `list[Produce]`,
or None for "any" (the model chooses). A mistake is refused here, by name, with the repair.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, replace
from typing import Any

import numpy as np

from weft.inference.errors import ProduceError
from weft.inference.spaces import as_space
from weft.inference.values import is_integer, is_number
from weft.tokenizers.segment import ActionSpace, Segment
from weft.tokenizers.vocabulary import MODALITIES

MOST = {"text": 256, "image": 4096, "video": 16384, "audio": 1500, "sensor": 4096, "action": 4096}
"""Tokens of one produced body at most, where the call does not say: enough for a page, a minute of sound, a megapixel."""

LIMIT = 1 << 18
"""Tokens of one produced body at most, whatever the call says: a guard against a wrong unit, not a property of the model."""


@dataclass(frozen=True)
class Produce:
    """One segment to produce."""

    modality: str
    _: KW_ONLY
    max_tokens: int | None = None
    """Body tokens at most; an open-ended body is closed there. None = `MOST` of the modality."""
    min_tokens: int | None = None
    """Body tokens at least before an open-ended body may close. None = 1."""
    grid: tuple[int, ...] | None = None
    """Image (h, w) or video (frames, h, w) in patches. None: like the last one in the prompt, else the model states it."""
    seconds: float | None = None
    """Length of a sound: it closes exactly there."""
    readings: int | None = None
    """Readings of a sensor segment, or steps of an action segment. None: the model closes it."""
    channels: int | None = None
    """Channels of a sensor segment. None: like the last sensor segment of this kind in the prompt."""
    kind: str | None = None
    """Fitted scaling of a sensor segment. None: like the last sensor segment in the prompt."""
    rate_hz: float | None = None
    """Readings or actions a second. None: like the last such segment in the prompt."""
    start: Any = None
    """When the segment begins; None = it has no clock, or follows the last such segment in the prompt."""
    space: Any = None
    """Action space: ours, or a gymnasium Discrete or Box."""
    edit: Segment | None = None
    """Keep a part of this image or sound and produce the rest."""
    keep: Any = None
    """What to keep: a fraction 0..1 from the start, a number of patch rows or of sound tokens, or a bool mask [h w]."""

    def __post_init__(self) -> None:
        if self.modality not in MODALITIES:
            raise ProduceError(f"cannot produce {self.modality!r}; modalities are {', '.join(MODALITIES)}, or 'any'")
        for name in ("max_tokens", "min_tokens", "readings", "channels"):
            value = getattr(self, name)
            if value is not None and not (is_integer(value) and 1 <= value <= LIMIT):
                raise ProduceError(f"{name}={value!r} must be an integer from 1 to {LIMIT}")
        for name in ("seconds", "rate_hz"):
            value = getattr(self, name)
            if value is not None and not (is_number(value) and 0 < value < float("inf")):
                raise ProduceError(f"{name}={value!r} must be a positive number")
        if self.grid is not None:
            sides = {"image": 2, "video": 3}.get(self.modality)
            grid = tuple(self.grid) if isinstance(self.grid, Sequence | np.ndarray) else ()
            if len(grid) != sides or not all(is_integer(n) and n >= 1 for n in grid):
                raise ProduceError(f"grid={self.grid!r} must be (h, w) for an image or (frames, h, w) for a video, in patches")
            object.__setattr__(self, "grid", tuple(map(int, grid)))
        if self.edit is not None and self.modality not in ("image", "audio"):
            raise ProduceError(f"a part of {self.modality} cannot be kept; edit an Image or an Audio")
        if (self.edit is None) != (self.keep is None):
            raise ProduceError("produce=Image(...) or Audio(...) needs keep= (how much of it stays), and keep= needs it")
        if self.modality == "action":
            if self.space is None:
                raise ProduceError("produce='action' needs space= (an ActionSpace, an integer n, a Discrete or a Box)")
            object.__setattr__(self, "space", as_space(self.space))

    @property
    def action_space(self) -> ActionSpace:
        """The checked space of an action segment."""
        assert isinstance(self.space, ActionSpace)
        return self.space

    @property
    def least(self) -> int:
        """Body tokens at least."""
        return self.min_tokens or 1

    @property
    def most(self) -> int:
        """Body tokens at most."""
        return max(self.max_tokens or MOST[self.modality], self.least)


FIELDS = {
    "text": ("max_tokens", "min_tokens"),
    "image": ("max_tokens", "grid", "edit", "keep"),
    "video": ("max_tokens", "grid", "rate_hz", "start"),
    "audio": ("max_tokens", "min_tokens", "seconds", "edit", "keep"),
    "sensor": ("max_tokens", "readings", "channels", "kind", "rate_hz", "start"),
    "action": ("max_tokens", "readings", "rate_hz", "start", "space"),
}
"""Options of `generate` that speak about each modality."""


def requested(produce: Any, options: Mapping[str, Any]) -> tuple[Produce, ...] | None:
    """What one request produces, in order. `options` are defaults for every item that they speak about."""
    if isinstance(produce, str) and produce == "any":
        if unused := sorted(name for name, value in options.items() if value is not None and name != "max_tokens"):
            raise ProduceError(f"{unused[0]}= says nothing about 'any'; name what to produce, or drop it")
        return None
    alone = isinstance(produce, str | Produce | Segment)
    items = [produce] if alone else list(produce) if isinstance(produce, list | tuple) else None
    if not items:
        raise ProduceError(
            f"produce={produce!r} names nothing; give a modality, a Produce, a segment to edit, or a list of them"
        )
    given = {name: value for name, value in options.items() if value is not None}
    produces = tuple(_one(item, given) for item in items)
    used = {name for item in produces for name in FIELDS[item.modality]}
    if unused := sorted(given.keys() - used):
        raise ProduceError(f"{unused[0]}= says nothing about {', '.join(p.modality for p in produces)}; drop it")
    return produces


def _one(item: Any, given: Mapping[str, Any]) -> Produce:
    if isinstance(item, Produce):
        fill = {n: given[n] for n in FIELDS[item.modality] if n in given and getattr(item, n) is None}
        return replace(item, **fill)
    if isinstance(item, Segment):
        own = {name: given[name] for name in FIELDS.get(item.modality, ()) if name in given}
        return Produce(modality=item.modality, edit=item, **own)
    if not isinstance(item, str) or item not in MODALITIES:
        raise ProduceError(f"cannot produce {item!r}; modalities are {', '.join(MODALITIES)}, or 'any'")
    return Produce(modality=item, **{n: given[n] for n in FIELDS[item] if n in given and n != "edit"})
