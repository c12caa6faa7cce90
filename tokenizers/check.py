"""What a tokenizer answered, checked before it enters a stream, and the draw of what bears loss."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from weft.tokenizers.clock import label
from weft.tokenizers.forms import first_id
from weft.tokenizers.interleave import Prepared
from weft.tokenizers.plan import LossPlan
from weft.tokenizers.registry import Modality
from weft.tokenizers.stream import StreamError
from weft.tokenizers.vocabulary import Vocabulary


def check(item: Prepared, vocabulary: Vocabulary) -> None:
    """Raise StreamError where a tokenizer's answer cannot stand in a stream."""
    tokens, entry, name = item.tokens, item.entry, label(item.segment)
    n, group = len(tokens), tokens.group
    if entry.opener and n == 0:
        raise StreamError(f"{name} has no tokens; drop it or give it content")
    if group < 1 or n % group:
        raise StreamError(f"{name}: {n} tokens are not whole groups of {group}")
    if len(tokens.time) != n or (tokens.features is not None and len(tokens.features) != n):
        raise StreamError(f"{name}: times and features must have one row for each of its {n} tokens")
    begins = tokens.time[::group]
    if len(begins) > 1 and (begins[1:] < begins[:-1]).any():
        raise StreamError(f"{name}: its tokens go backwards in time; sort its readings")
    if n and (tokens.time[0] < 0):
        raise StreamError(f"{name}: its first token lies before its start")
    if entry.fixed and (len(tokens.grid) != len(entry.shape) or math.prod(tokens.grid) != n):
        raise StreamError(f"{name}: grid {tokens.grid} does not hold its {n} tokens")
    for which, value in zip(reversed(entry.shape), reversed(tokens.grid)):
        if which != "frames" and not 1 <= value < vocabulary.numbers:
            raise StreamError(
                f"{name}: {which}={value} does not fit number tokens 1..{vocabulary.numbers - 1}; "
                "make it smaller or raise vocabulary.numbers"
            )
    size = vocabulary.slices[vocabulary.slice_of[entry.name]][1] - first_id(entry, vocabulary) - _tail(entry, vocabulary)
    codes = tokens.codes
    low, high = (int(codes.min()), int(codes.max())) if n else (0, -1)
    if low < -1 or high >= size:
        raise StreamError(
            f"{name}: codes {low}..{high} leave the span of {size}; the vocabulary was laid out for another tokenizer"
        )
    if tokens.features is None and low < 0:
        raise StreamError(f"{name} has neither codes nor features; fit its tokenizer")


def _tail(entry: Modality, vocabulary: Vocabulary) -> int:
    """Ids at the end of the slice that are no content."""
    return len(vocabulary.tails.get(entry.slice, ())) - entry.missing


def draw_targets(items: Sequence[Prepared], plan: LossPlan | None, rng: np.random.Generator | None) -> list[bool]:
    """Which segments bear loss, drawn in the given order. An undecided segment whose tokenizer has no codes stays observed."""
    targets = []
    for item in items:
        modality, role = item.entry.name, item.segment.role
        if plan is None or role == "observed":
            targets.append(False)
            continue
        coded = bool(len(item.tokens) == 0 or item.tokens.codes.min() >= 0)
        if role == "target":
            if not coded:
                raise StreamError(
                    f"{label(item.segment)} is a target, but the {modality} tokenizer is input-only (it has no codes); "
                    "fit its quantizer or make the role 'observed'"
                )
            targets.append(True)
        else:
            chance = plan.generate.get(modality, 0.0) if coded else 0.0
            if 0 < chance < 1 and rng is None:
                raise StreamError(f"the plan generates {modality} with probability {chance}; hand in rng to draw with")
            targets.append(chance >= 1 or (chance > 0 and rng is not None and rng.random() < chance))
    return targets
