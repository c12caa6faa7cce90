"""The registry: one declarative entry per modality. The vocabulary, the grammar, the stream and the bundle read it.

A modality that is not built in is one more entry (`REGISTRY + (Modality(...),)`), its tokenizer, and its span in
`Vocabulary.extra`; docs/adding-a-modality.md walks through one.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class Modality:
    """How one modality is written in the stream."""

    name: str
    slice: str
    """Output slice in which body and closing token lie; modalities may share one (video and image)."""
    shape: tuple[str, ...] = ()
    """The numbers that the opening tokens state."""
    fixed: bool = False
    """True: the body has exactly as many tokens as the product of the shape, and the closing token is forced."""
    spans: tuple[str, ...] = ()
    """Spans whose codes may stand in the body; one body keeps to one span."""
    unit: str | None = None
    """Variable body: the shape number of which its length is a multiple (channels, dims)."""
    block: tuple[str, ...] = ()
    """Shape numbers whose product is one two-way block when the segment is observed."""
    place: Literal["grid", "channel", "none"] = "none"
    """grid: (row, column); channel: (channel, place in the clock tick); none: the three axes move together."""
    missing: bool = False
    """True: `<missing>`, the first id after the codes, is a legal body token."""
    segment: str = ""
    """`module:Class` of what a user hands in."""
    content: str = ""
    """Field of that class that holds the media."""
    tokenizer: str = ""
    """`module:Class` of the tokenizer."""
    weight: float = 1.0
    """Loss weight where a plan does not say."""

    def __post_init__(self) -> None:
        if not self.name.isidentifier():
            raise ValueError(f"modality name {self.name!r} must be an identifier such as 'thermal'")
        if self.fixed and not self.shape:
            raise ValueError(f"modality {self.name!r} has a fixed body, so its opening tokens must state a shape")
        unknown = [name for name in (*self.block, *filter(None, [self.unit])) if name not in self.shape]
        if unknown:
            raise ValueError(f"modality {self.name!r} names {unknown}, which its shape {self.shape} does not have")

    @property
    def opener(self) -> str | None:
        """The opening token; text has none."""
        return None if self.name == "text" else f"<{self.name}>"

    @property
    def whole(self) -> bool:
        """Whether a segment is one piece: a shape without a first number that counts (frames)."""
        return self.fixed and len(self.shape) < 3

    @property
    def closer(self) -> str:
        return f"</{self.name}>"

    @property
    def hole(self) -> str:
        """The input id of content that has features but no code."""
        return f"<hole {self.slice}>"

    def load_class(self, which: Literal["tokenizer", "segment"]) -> Any:
        """The class behind the entry's path, imported when it is needed."""
        path = self.tokenizer if which == "tokenizer" else self.segment
        module, _, name = path.partition(":")
        return getattr(importlib.import_module(module), name)


def _builtin(name: str, segment: str, content: str, **fields: Any) -> Modality:
    paths: dict[str, Any] = {
        "segment": f"weft.tokenizers.segment:{segment}",
        "tokenizer": f"weft.tokenizers.{name}:{segment}Tokenizer",
    }
    return Modality(name=name, content=content, **paths, **fields)


# The order numbers the modalities and breaks ties in time: a reading comes before the action taken at the same instant.
REGISTRY: tuple[Modality, ...] = (
    _builtin("text", "Text", "text", slice="text", spans=("text",)),
    _builtin(
        "image",
        "Image",
        "pixels",
        slice="image",
        shape=("h", "w"),
        fixed=True,
        spans=("image",),
        block=("h", "w"),
        place="grid",
    ),
    _builtin(
        "video",
        "Video",
        "frames",
        slice="image",
        shape=("frames", "h", "w"),
        fixed=True,
        spans=("image",),
        block=("h", "w"),
        place="grid",
    ),
    _builtin("audio", "Audio", "samples", slice="audio", spans=("audio",)),
    _builtin(
        "sensor",
        "Sensor",
        "values",
        slice="sensor",
        shape=("channels",),
        spans=("sensor",),
        unit="channels",
        place="channel",
        missing=True,
    ),
    _builtin(
        "action",
        "Action",
        "values",
        slice="action",
        shape=("dims",),
        spans=("discrete", "bins", "chunks"),
        unit="dims",
        place="channel",
    ),
)


def by_name(registry: tuple[Modality, ...] = REGISTRY) -> dict[str, Modality]:
    """name -> entry; a name that stands twice is an error."""
    found = {entry.name: entry for entry in registry}
    if len(found) != len(registry):
        raise ValueError(f"the registry names a modality twice: {[entry.name for entry in registry]}")
    return found
