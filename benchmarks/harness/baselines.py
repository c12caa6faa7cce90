"""What a figure has to be compared with: chance, the most frequent answer, the last reading, a trained specialist.

In: a task, its questions' records, its training documents. Out: the same figures as for a model, by the same metrics.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from weft.benchmarks.harness.aggregate import summarise
from weft.benchmarks.harness.questions import Question, Variant, question, reference_of
from weft.benchmarks.harness.samples import Sample, TaskData
from weft.benchmarks.harness.signals import forecast_scores
from weft.benchmarks.harness.specialist import Specialist
from weft.benchmarks.harness.task import Task

Record = dict[str, Any]


def baselines(task: Task, data: TaskData, records: Sequence[Record], seed: int, rounds: int) -> dict[str, Any]:
    """Figures of every baseline that the task names."""
    out: dict[str, Any] = {}
    for name in task.baselines:
        if name == "chance":
            out[name] = chance(task, records)
        elif name == "majority":
            said = majority(task, data.pool)
            out[name] = {"answer": said, **_figures(task, _answered(task, data, seed, lambda q, said=said: said), rounds)}
        elif name == "specialist":
            machine = Specialist()
            machine.learn(task, data.pool)
            out[name] = _figures(task, _answered(task, data, seed, lambda q, m=machine: m.name([q.prompt])[0]), rounds)
        elif name == "persistence":
            out[name] = _figures(task, _persistent(task, data, seed), rounds)
    return out


def _figures(task: Task, records: list[Record], rounds: int) -> dict[str, Any]:
    found = summarise(task, records, rounds)
    return {"metrics": found["metrics"], "failed": found["failed"]}


def chance(task: Task, records: Sequence[Record]) -> dict[str, Any]:
    """Expected figure of blind choice, where that is defined: choices and retrieval."""
    figures: dict[str, Any] = {}
    whole = [r for r in records if not r.get("failed")]
    if task.answer == "choices" and whole:
        value = float(np.mean([1 / r["choices"] for r in whole]))
        figures = {name: {"value": value} for name in ("accuracy", "exact_match") if name in task.metrics}
    if task.answer == "retrieval" and whole:
        for name in task.metrics:
            if name.startswith("recall@"):
                k = int(name.removeprefix("recall@"))
                figures[name] = {"value": float(np.mean([_drawn(k, r["relevant"], r["gallery"]) for r in whole]))}
    return {"metrics": figures}


def _drawn(k: int, relevant: int, gallery: int) -> float:
    """Probability that k items drawn without replacement hold a relevant one."""
    missed = 1.0
    for i in range(min(k, gallery)):
        missed *= max(gallery - relevant - i, 0) / (gallery - i)
    return 1 - missed


def majority(task: Task, pool: Sequence[Sample]) -> str:
    """The most frequent answer of the training documents, the first in the alphabet among equals."""
    counts: Counter[str] = Counter()
    for sample in pool:
        right = reference_of(task, sample.load(), sample.metadata)
        counts[right[0] if isinstance(right, list) else str(right)] += 1
    return min(counts, key=lambda words: (-counts[words], words))


def _answered(task: Task, data: TaskData, seed: int, say: Any) -> list[Record]:
    out = []
    for sample in data.samples:
        try:
            q: Question = question(task, sample, Variant(), seed)
            out.append({"key": sample.key, "answer": say(q), "reference": q.reference})
        except Exception as error:
            out.append({"key": sample.key, "failed": f"{type(error).__name__}: {error}"})
    return out


def _persistent(task: Task, data: TaskData, seed: int) -> list[Record]:
    """Every future reading equals the last one."""
    out = []
    for sample in data.samples:
        try:
            q = question(task, sample, Variant(), seed)
            truth = np.asarray(q.reference.values, np.float64).reshape(len(q.reference.values), -1)
            past: Any = [s for s in q.prompt if getattr(s, "kind", None) == q.reference.kind][-1]
            history = np.asarray(past.values, np.float64).reshape(len(past.values), -1)
            still = np.broadcast_to(history[-1:], (2, *truth.shape))
            out.append({"key": sample.key, "scores": forecast_scores(still, truth, history)})
        except Exception as error:
            out.append({"key": sample.key, "failed": f"{type(error).__name__}: {error}"})
    return out
