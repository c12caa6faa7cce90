"""Which samples of a task a page shows: the best and the worst ones, and what they were asked.

In: a task, its records and samples. Out: keys, and files of pictures, films and sounds. They are chosen when the figures are
made, so that a page shows samples of this run alone, although a file of records may hold earlier ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from weft.benchmarks.harness.aggregate import sample_scores
from weft.benchmarks.harness.measures import measure
from weft.benchmarks.harness.media_files import keep
from weft.benchmarks.harness.questions import Variant, question
from weft.benchmarks.harness.samples import Sample
from weft.benchmarks.harness.task import Task
from weft.tokenizers.segment import Audio, Image, Text, Video

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
            good[record["key"]] = (about.goodness(value), sure if value > 0 else -sure)
    return good | {r["key"]: (float("-inf"), 0.0) for r in records if r.get("failed")}


def asked(task: Task, samples: Sequence[Sample], shown: dict[str, list[str]], folder: Path) -> dict[str, dict[str, Any]]:
    """By key: the words of a shown sample's own prompt, and its media as files in `folder`. Demonstrations are left out."""
    keys = {key for some in shown.values() for key in some}
    out: dict[str, dict[str, Any]] = {}
    for sample in samples:
        if sample.key not in keys:
            continue
        try:
            prompt = question(task, sample, Variant(), 0).prompt
            media = [s for s in prompt if isinstance(s, Image | Audio | Video)]
            files = [keep(segment, folder, f"{sample.key}/{i}") for i, segment in enumerate(media)]
        except Exception:  # a sample that cannot be read has failed already, and its card says why
            continue
        out[sample.key] = {"words": " / ".join(s.text for s in prompt if isinstance(s, Text)), "files": files}
    return out
