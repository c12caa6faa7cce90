"""Which samples of a task a page shows: the best and the worst ones.

In: a task and its records. Out: keys. They are chosen when the figures are made, so that a page shows samples of this run
alone, although a file of records may hold earlier ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from weft.benchmarks.harness.aggregate import sample_scores
from weft.benchmarks.harness.measures import measure
from weft.benchmarks.harness.task import Task

SHOWN = 4
"""Best and worst samples of each task and model."""
Record = dict[str, Any]


def extremes(task: Task, records: Sequence[Record]) -> dict[str, list[str]]:
    """Keys of the best samples, best first, and of the worst, worst first; nothing is in both."""
    good = _goodness(task, records)
    order = [key for _, _, key in sorted((*(-value for value in good[r["key"]]), r["key"]) for r in records)]
    best = order[:SHOWN]
    return {"best": best, "worst": order[len(best) :][::-1][:SHOWN]}


def _goodness(task: Task, records: Sequence[Record]) -> dict[str, tuple[float, float]]:
    """(score by the first metric that scores single samples, certainty in the right direction); failed ones below all."""
    good: dict[str, tuple[float, float]] = {r["key"]: (0.0, 0.0) for r in records}
    single = [name for name in task.metrics if measure(name).pool != "corpus"]
    if single:
        about = measure(single[0])
        scores, kept = sample_scores(task, single[0], records)
        for record, row in zip(kept, scores):
            value = float(row) if row.ndim == 0 else float(row[0] / max(row[1], 1e-12))
            sure = float(record.get("confidence", 0.0))
            good[record["key"]] = (value if about.higher else -value, sure if value > 0 else -sure)
    return good | {r["key"]: (float("-inf"), 0.0) for r in records if r.get("failed")}
