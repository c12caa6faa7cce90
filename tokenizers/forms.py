"""How every modality is written, as arrays over the modality index: what the builder looks up for each token at once."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np

from weft.tokenizers.registry import Modality, by_name
from weft.tokenizers.vocabulary import Vocabulary


class Forms(NamedTuple):
    """Arrays are int64 [modalities]; those of a modality without an entry are zero."""

    zero: np.ndarray
    """Id of code 0."""
    hole: np.ndarray
    """Id of content without a code; -1 where there is none (text)."""
    closer: np.ndarray
    """Id of the closing token."""
    slice: np.ndarray
    """Output slice of body and closing token."""
    opening: np.ndarray
    """Tokens of opener and shape."""
    fixed: np.ndarray
    """bool: the shape says the length of the body."""


@lru_cache(maxsize=16)
def forms_of(vocabulary: Vocabulary, registry: tuple[Modality, ...]) -> Forms:
    """The forms of a vocabulary's modalities."""
    entries = by_name(registry)
    rows = [_form(entries[name], vocabulary) if name in entries else (0,) * 6 for name in vocabulary.modalities]
    zero, hole, closer, where, opening, fixed = np.array(rows, np.int64).T.copy()
    return Forms(zero, hole, closer, where, opening, fixed.astype(bool))


def first_id(entry: Modality, vocabulary: Vocabulary) -> int:
    """Id of code 0."""
    return vocabulary.spans[entry.spans[0]][0]


def _form(entry: Modality, vocabulary: Vocabulary) -> tuple[int, ...]:
    special = vocabulary.special
    return (
        first_id(entry, vocabulary),
        special.get(entry.hole, -1),
        special[entry.closer],
        vocabulary.slice_of[entry.name],
        1 + len(entry.shape) if entry.opener else 0,
        entry.fixed,
    )
