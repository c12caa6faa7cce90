"""Which draws a step makes and which rank takes them: pure functions of integers.

Step s makes draws [s * n, (s + 1) * n): the global batch depends on the seed and the step alone, never on the number of
ranks, micro-steps or workers. `assign` only divides it, balanced by cost. So a run saved on 2 ranks continues on 1 with
the same batches, accumulation over k micro-steps sees what one big batch sees, and the only state to save is the step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeVar

from weft.training.random import integer, uniform

Unit = TypeVar("Unit")


def step_draws(step: int, draws_per_step: int) -> range:
    """The draws of one optimizer step."""
    if step < 0 or draws_per_step < 1:
        raise ValueError(f"step {step} and draws_per_step {draws_per_step} must be at least 0 and 1")
    return range(step * draws_per_step, (step + 1) * draws_per_step)


def assign(costs: Sequence[int], bins: int) -> list[list[int]]:
    """Numbers of the items of each bin: the dearest first, each to the emptiest bin (Graham's LPT rule), integers only.

    Every bin gets an item as long as there are as many items as bins. Within a bin the items keep their order.
    """
    if bins < 1:
        raise ValueError(f"{bins} bins: at least one rank and one micro-step are needed")
    load, held = [0] * bins, [0] * bins
    out: list[list[int]] = [[] for _ in range(bins)]
    for item in sorted(range(len(costs)), key=lambda i: (-int(costs[i]), i)):
        where = min(range(bins), key=lambda b: (load[b], held[b], b))
        out[where].append(item)
        load[where] += max(int(costs[item]), 1)
        held[where] += 1
    return [sorted(items) for items in out]


def bin_of(rank: int, micro: int, accumulate: int) -> int:
    """The bin of one micro-step of one rank."""
    return rank * accumulate + micro


def replacement(seed: int, draw: int, attempt: int, units: int) -> int:
    """The unit that stands in for a bad one: the same for every rank and at every resume."""
    return integer(units, seed, "replacement", draw, attempt)


def choose_pair(seed: int, draw: int, group: Sequence[Unit]) -> list[Unit]:
    """At most two members of a group of documents with one pair key, in a random order."""
    first = integer(len(group), seed, "pair", draw)
    if len(group) == 1:
        return [group[first]]
    other = integer(len(group) - 1, seed, "partner", draw)
    return [group[first], group[other + (other >= first)]]


def dropped(
    modalities: Sequence[str], droppable: Sequence[bool], rates: Mapping[str, float], seed: int, draw: int
) -> list[int]:
    """Segments that modality dropout removes from a document.

    `modalities` names each segment's modality, `droppable` says that it is observed. A modality is dropped as a whole with its
    rate. A target is never dropped, and at least one observed segment stays: if all would go, one modality (drawn) stays.
    """
    present = sorted({m for m, ok in zip(modalities, droppable) if ok})
    gone = [m for m in present if uniform(seed, "modality dropout", draw, m) < rates.get(m, 0.0)]
    if gone and len(gone) == len(present):
        gone.pop(integer(len(gone), seed, "modality kept", draw))
    return [i for i, (m, ok) in enumerate(zip(modalities, droppable)) if ok and m in gone]


def prompt_draw(seed: int, draw: int, rate: float, end_share: float = 0.5) -> str | None:
    """None, "end" or "any": whether this sequence gets a demonstration, and from where in the other episode (Gato, 2.2)."""
    if uniform(seed, "prompt", draw) >= rate:
        return None
    return "end" if uniform(seed, "prompt end", draw) < end_share else "any"


def becomes_target(seed: int, draw: int, member: int, segment: int, chance: float) -> bool:
    """Whether an undecided segment bears loss this time."""
    return chance >= 1 or (chance > 0 and uniform(seed, "role", draw, member, segment) < chance)
