"""Observed media that are read through a resampler: their feature rows in groups, `latents` positions for each.

In: a prepared segment of n tokens, features [n F]. Out: the same with G * latents tokens, G = ceil(n / tokens), features
[G * latents, tokens / latents * F]: no row is lost, a position carries some of its group's, and whatever moves positions moves
them. A group stays together and has the time of its first row; its positions lie where the rows lie that they carry. Rows that
the last group lacks are NaN, which the model leaves out. Codes are holes, and the shape states (groups, latents).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from weft.tokenizers.base import Tokenizer, Tokens
from weft.tokenizers.interleave import Prepared
from weft.tokenizers.registry import Modality
from weft.tokenizers.stream import Resample, StreamError


def resampled(item: Prepared, shape: Resample) -> Prepared:
    """A segment as its latents."""
    tokens, entry = item.tokens, item.entry
    if tokens.features is None:
        return item
    count, size = tokens.features.shape
    groups = -(-count // shape.tokens)
    length = groups * shape.latents
    rows = np.full((groups * shape.tokens, size), np.nan, np.float32)
    rows[:count] = tokens.features
    carried = np.minimum(np.arange(length) * shape.rows, count - 1)
    latents = Tokens(
        codes=np.full(length, -1, np.int64),
        grid=(groups, *[1] * (len(entry.shape) - 2), shape.latents) if entry.fixed else (length,),
        time=np.repeat(tokens.time[:: shape.tokens], shape.latents),
        features=rows.reshape(length, shape.rows * size),
        place=None if tokens.place is None else tokens.place[carried],
        group=length if entry.whole else shape.latents,
    )
    return replace(item, tokens=latents)


def read_resample(text: str) -> dict[str, Resample]:
    """`image=16:4,audio=25:5` as shapes. Raises StreamError for anything else."""
    found = {}
    for part in filter(None, text.split(",")):
        match = re.fullmatch(r"\s*(\w+)=(\d+):(\d+)\s*", part)
        if match is None:
            raise StreamError(f"resample has {part!r}; write modality=rows:positions, for example image=16:4,audio=25:5")
        found[match[1]] = Resample(int(match[2]), int(match[3]))
    return found


def check_resample(
    shapes: Mapping[str, Resample], tokenizers: Mapping[str, Tokenizer], entries: Mapping[str, Modality]
) -> None:
    """Raise StreamError for a modality that cannot be read through a resampler."""
    for name in shapes:
        entry, tokenizer = entries.get(name), tokenizers.get(name)
        if tokenizer is None or entry is None:
            raise StreamError(f"stream.resample[{name}]: there is no {name} tokenizer; drop the entry or add one")
        if not tokenizer.feature_size or entry.opener is None or entry.unit or (entry.fixed and len(entry.shape) < 2):
            raise StreamError(
                f"stream.resample[{name}]: only media whose features stand in no columns (image, video, audio) are resampled; "
                "drop the entry"
            )
