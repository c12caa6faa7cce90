"""Which other ways a task is asked: with modalities removed, with inputs spoilt.

In: a task and its samples. Out: `Variant`s. Only what the prompts hold is removed or spoilt; demonstrations stay whole.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import combinations

from weft.benchmarks.harness.corrupt import TABLE
from weft.benchmarks.harness.questions import Variant, question
from weft.benchmarks.harness.samples import Sample
from weft.benchmarks.harness.task import Task
from weft.tokenizers.segment import Segment


def _segments(task: Task, samples: Sequence[Sample], seed: int) -> Iterator[Segment]:
    """Everything that is shown in prompts; a sample that cannot be read shows nothing (and fails when it is asked)."""
    for sample in samples:
        try:
            yield from question(task, sample, Variant(), seed).prompt
        except Exception:
            continue


def removals(task: Task, samples: Sequence[Sample], seed: int) -> list[Variant]:
    """Each modality and each pair, as long as another modality is left to ask with."""
    have = sorted({segment.modality for segment in _segments(task, samples, seed)})
    some = [drop for size in (1, 2) if len(have) > size for drop in combinations(have, size)]
    return [Variant(f"without {' and '.join(drop)}", drop) for drop in some]


def spoilt(task: Task, samples: Sequence[Sample], seed: int) -> list[Variant]:
    """Every corruption that touches the prompts, at every level of the table."""
    shown = list(_segments(task, samples, seed))
    return [Variant(c.name, corruption=c) for c in TABLE if any(c.touches(s) for s in shown)]
