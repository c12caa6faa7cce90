"""What was asked for and what came out: the musts as rules.

In: results and the specialists' scores. Out: a `Verdict` per task. Three rules are not in the table itself: the must of the
four environments holds for their mean; prose must stay below the unigram and the trigram of the same data; a specialist whose
figure has another unit than the task's stands beside the task's second figure.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from weft.benchmarks.world.evaluate import Result
from weft.benchmarks.world.tasks import passed

Scores = Mapping[str, Mapping[str, Any]]
"""specialists.json: key -> fields of `specialists.Score`."""


@dataclass(frozen=True)
class Verdict:
    """One row of the table."""

    name: str
    value: float
    interval: tuple[float, float]
    must: float | None
    aim: float | None
    specialist: float | None
    """In the task's own unit; None where there is none."""
    passed: bool | None
    """None: there is nothing to hold it against."""
    reached: bool
    """The aim, too."""

    def row(self) -> dict[str, Any]:
        """As `report.json` holds it."""
        return {
            "value": self.value,
            "interval": list(self.interval),
            "must": self.must,
            "aim": self.aim,
            "specialist": self.specialist,
            "passed": self.passed,
        }


def verdicts(results: Mapping[str, Result], scores: Scores) -> dict[str, Verdict]:
    """Every result held against what was asked for."""
    played = control_mean(results)
    found = {}
    for name, result in results.items():
        task, e = result.task, result.estimate
        must, aim, value = task.must, task.aim, e.value
        if task.kind == "bits":
            known = [float(scores[k]["value"]) for k in (f"{name}, unigram", name) if k in scores]
            must = min(known) if len(known) == 2 else None
        judged = played[0] if task.kind == "control" else value
        ok = None if must is None else passed(task, judged, must)
        if task.kind == "bits" and must is not None:
            ok = value < must
        far = bool(ok and aim is not None and passed(task, judged, aim))
        found[name] = Verdict(name, value, (e.low, e.high), must, aim, specialist(result, scores), ok, far)
    return found


def specialist(result: Result, scores: Scores) -> float | None:
    """The specialist's figure where it has the task's unit. The experts of the environments are 100 by definition."""
    task = result.task
    if task.kind == "control":
        return 100.0
    if task.specialist is None or task.specialist not in scores or task.kind == "rest":
        judged = scores.get(f"{task.specialist}, judged")
        return float(judged["value"]) if judged else None
    return float(scores[task.specialist]["value"])


def control_mean(results: Mapping[str, Result]) -> tuple[float, float, float]:
    """(mean, low, high) of the normalised returns over environments; the intervals are independent, so variances add."""
    played = [r.estimate for r in results.values() if r.task.kind == "control"]
    if not played:
        return float("nan"), float("nan"), float("nan")
    mean = float(np.mean([e.value for e in played]))
    half = float(np.sqrt(sum(((e.high - e.low) / 2) ** 2 for e in played)) / len(played))
    return mean, mean - half, mean + half
