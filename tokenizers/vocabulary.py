"""The one id space: disjoint spans, laid out once, named by a digest.

    slice 0 text    <pad> <doc> </doc> </text> <image> <video> <audio> <sensor> <action> <time> | <0> .. <N> | text pieces
    slice 1 image   codes | <hole> </image> </video>
    slice 2 audio   codes | <hole> </audio>
    slice 3 sensor  bins  | <missing> <hole> </sensor>
    slice 4 action  discrete | bins | compressed chunks | <hole> </action>

A slice is what the output layer computes for a position: it is contiguous, holds its own closing tokens, and is known from
the stream before the token is. A modality beyond the built-in six (`extra`) adds its opening token after `<time>` and a slice
`codes | <hole x> </x>` at the end. `<hole>` is the input id of content that has features but no code; it is never an output.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from typing import Any

MODALITIES = ("text", "image", "video", "audio", "sensor", "action")
SLICES = ("text", "image", "audio", "sensor", "action")
SLICE_OF = {"text": 0, "image": 1, "video": 1, "audio": 2, "sensor": 3, "action": 4}
SPECIALS = ("<pad>", "<doc>", "</doc>", "</text>", "<image>", "<video>", "<audio>", "<sensor>", "<action>", "<time>")
TAILS = {
    "image": ("<hole image>", "</image>", "</video>"),
    "audio": ("<hole audio>", "</audio>"),
    "sensor": ("<missing>", "<hole sensor>", "</sensor>"),
    "action": ("<hole action>", "</action>"),
}


@dataclass(frozen=True)
class Vocabulary:
    """Sizes of the spans; every id follows from them."""

    text: int
    image: int = 0
    audio: int = 0
    sensor: int = 0
    discrete: int = 0
    """Discrete actions."""
    bins: int = 0
    """Bins per continuous action dimension."""
    chunks: int = 0
    """BPE pieces of compressed action chunks."""
    numbers: int = 128
    """Number tokens <0> .. <numbers - 1>: shapes in opening tokens and digits of timestamps."""
    extra: tuple[tuple[str, int], ...] = ()
    """(modality, codes) of every modality beyond the built-in ones, each with a slice of its own."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "extra", tuple((str(name), size) for name, size in self.extra))
        sizes = {name: size for name, size in asdict(self).items() if name != "extra"}
        for name, size in (*sizes.items(), *self.extra):
            if not isinstance(size, int) or isinstance(size, bool) or not 0 <= size <= 2**24:
                raise ValueError(f"vocabulary size {name}={size!r} must be an integer from 0 to 2^24")
        names = [name for name, _ in self.extra]
        taken = {*MODALITIES, *sizes, "doc", "time", "pad"}
        if len(set(names)) < len(names) or taken & set(names):
            raise ValueError(f"vocabulary extra={names} must name each new modality once, and none of {sorted(taken)}")
        if self.numbers < 2:
            raise ValueError(f"vocabulary needs at least 2 number tokens, got {self.numbers}")

    @cached_property
    def modalities(self) -> tuple[str, ...]:
        """`MODALITIES` and the extra ones: the modality index of a stream counts in it."""
        return MODALITIES + tuple(name for name, _ in self.extra)

    @cached_property
    def slice_names(self) -> tuple[str, ...]:
        """`SLICES` and one for every extra modality."""
        return SLICES + tuple(name for name, _ in self.extra)

    @cached_property
    def slice_of(self) -> dict[str, int]:
        """Modality -> index of the output slice of its body."""
        return SLICE_OF | {name: len(SLICES) + i for i, (name, _) in enumerate(self.extra)}

    @cached_property
    def specials(self) -> tuple[str, ...]:
        """The named tokens at the front of slice 0."""
        return SPECIALS + tuple(f"<{name}>" for name, _ in self.extra)

    @cached_property
    def tails(self) -> dict[str, tuple[str, ...]]:
        """Slice name -> the named tokens at its end."""
        return TAILS | {name: (f"<hole {name}>", f"</{name}>") for name, _ in self.extra}

    @cached_property
    def slices(self) -> tuple[tuple[int, int], ...]:
        """(first, end) ids of every output slice, in the order of `slice_names`."""
        sizes = [
            len(self.specials) + self.numbers + self.text,
            self.image + len(TAILS["image"]),
            self.audio + len(TAILS["audio"]),
            self.sensor + len(TAILS["sensor"]),
            self.discrete + self.bins + self.chunks + len(TAILS["action"]),
            *(size + len(self.tails[name]) for name, size in self.extra),
        ]
        ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
        return tuple((end - size, end) for end, size in zip(ends, sizes))

    @cached_property
    def spans(self) -> dict[str, tuple[int, int]]:
        """(first, end) ids of the codes of each kind: text, image, audio, sensor, discrete, bins, chunks, numbers, extras."""
        first = {name: self.slices[i][0] for i, name in enumerate(self.slice_names)}
        numbers = len(self.specials)
        action = first["action"]
        return {
            "numbers": (numbers, numbers + self.numbers),
            "text": (numbers + self.numbers, self.slices[0][1]),
            "image": (first["image"], first["image"] + self.image),
            "audio": (first["audio"], first["audio"] + self.audio),
            "sensor": (first["sensor"], first["sensor"] + self.sensor),
            "discrete": (action, action + self.discrete),
            "bins": (action + self.discrete, action + self.discrete + self.bins),
            "chunks": (action + self.discrete + self.bins, action + self.discrete + self.bins + self.chunks),
            **{name: (first[name], first[name] + size) for name, size in self.extra},
        }

    @cached_property
    def special(self) -> dict[str, int]:
        """Id of every named token: the specials and the tails of the spans."""
        named = {token: i for i, token in enumerate(self.specials)}
        for i, name in enumerate(self.slice_names[1:], start=1):
            tail = self.tails[name]
            named.update({token: self.slices[i][1] - len(tail) + j for j, token in enumerate(tail)})
        return named

    def __len__(self) -> int:
        return self.slices[-1][1]

    def number(self, value: int) -> int:
        """The id of number token `<value>`."""
        if not 0 <= value < self.numbers:
            raise ValueError(f"shape {value} does not fit the {self.numbers} number tokens; raise vocabulary.numbers")
        return self.spans["numbers"][0] + value

    def describe(self, token: int) -> str:
        """What an id is, in words: `image 17`, `<5>`, `</audio>`."""
        for name, at in self.special.items():
            if at == token:
                return name
        for name, (first, end) in self.spans.items():
            if first <= token < end:
                return f"<{token - first}>" if name == "numbers" else f"{name} {token - first}"
        raise ValueError(f"token id {token} is outside the vocabulary of {len(self)} ids")

    def digest(self) -> str:
        """SHA-256 of the layout."""
        layout = {"sizes": self.to_dict(), "specials": self.specials, "tails": self.tails, "slices": self.slice_names}
        return hashlib.sha256(json.dumps(layout, sort_keys=True).encode()).hexdigest()

    def to_dict(self) -> dict[str, Any]:
        """JSON fields."""
        return asdict(self) | {"extra": [list(pair) for pair in self.extra]}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Vocabulary:
        """The inverse of `to_dict`; an unknown key is an error."""
        known = {field.name for field in fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise ValueError(f"vocabulary has unknown keys {unknown}; known are {sorted(known)}")
        return cls(**values)
