"""Records become figures: each metric with its interval, the gap between slices, what failed and why.

In: a task and its records (sorted by key, failed ones included). Out: JSON-ready dicts. Text metrics are computed here, from
the written answers, so that a metric can be added without asking the model again. Nothing depends on the order of records.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from weft.benchmarks.harness import metrics as m
from weft.benchmarks.harness.measures import Measure, measure
from weft.benchmarks.harness.questions import lookup
from weft.benchmarks.harness.signals import EXTRACTOR
from weft.benchmarks.harness.stats import Estimate, bootstrap, slice_gap, t_interval
from weft.benchmarks.harness.task import Task, TaskError

Record = dict[str, Any]
SMALLEST_SLICE = 5
"""Samples that a slice needs to be compared with others; of one sample there is no interval."""
UNREAD = "\0"
"""The answer to a document that cannot be read: nobody says it."""
CORPUS_ROUNDS = 200
"""Resamples at most of metrics that are computed from all samples at once."""


def summarise(task: Task, records: Sequence[Record], rounds: int = 1000) -> dict[str, Any]:
    """Figures of one run of a task."""
    records = sorted(records, key=lambda r: r["key"])
    failed = [r for r in records if r.get("failed")]
    figures = {}
    for metric in task.metrics:
        figures[metric] = _figure(task, metric, records, rounds)
    return {
        "samples": len(records),
        "failed": len(failed),
        "failures": dict(sorted(Counter(r["failed"] for r in failed).items())),
        "metrics": figures,
    }


def _figure(task: Task, metric: str, records: Sequence[Record], rounds: int) -> dict[str, Any]:
    about = measure(metric)
    if metric == "frechet":
        return {**_frechet(records), "higher_is_better": about.higher}
    if about.pool == "corpus":
        estimate, left = _corpus(metric, records, min(rounds, CORPUS_ROUNDS)), 0
    else:
        scores, kept = sample_scores(task, metric, records)
        estimate, left = _estimate(about, scores, task.answer == "control", rounds), len(records) - len(kept)
    way = {"higher_is_better": about.higher} if about.target is None else {"higher_is_better": None, "target": about.target}
    return {**(_plain(estimate) if estimate else {"value": None}), **way, "left_out": left}


def _plain(estimate: Estimate) -> dict[str, Any]:
    """As JSON; one sample has no interval."""
    told = {key: round(value, 6) if isinstance(value, float) else value for key, value in asdict(estimate).items()}
    return told if estimate.n > 1 else {"value": told["value"], "n": estimate.n}


def _estimate(about: Measure, scores: np.ndarray, episodes: bool, rounds: int) -> Estimate | None:
    if not len(scores):
        return None
    if about.pool == "mean" and episodes:
        return t_interval(scores)
    return bootstrap(scores, _pooled(about), rounds=rounds)


def _pooled(about: Measure) -> Callable[[np.ndarray], float] | None:
    """How scores of samples become one figure; None: their mean."""
    if about.pool == "mean":
        return None
    return m.ratio if about.pool == "ratio" else lambda counts: float(np.exp(min(m.ratio(counts), 700.0)))


def sample_scores(task: Task, metric: str, records: Sequence[Record]) -> tuple[np.ndarray, list[Record]]:
    """[n] or [n 2] per sample, and the records behind them: without failures where the metric has no worst value."""
    about = measure(metric)
    if about.text:
        return _text_scores(task, metric, records), list(records)
    worst = about.worst if about.pool == "mean" else None
    found = [(r.get("scores", {}).get(metric, worst), r) for r in records]
    known = [(score, r) for score, r in found if score is not None]
    return np.array([score for score, _ in known], np.float64), [r for _, r in known]


def _said(record: Record) -> str:
    """A failed sample has said nothing."""
    return "" if record.get("failed") else str(record.get("answer", ""))


def _accepted(record: Record) -> list[str]:
    right = record.get("reference")
    return [str(item) for item in right] if isinstance(right, list) else [] if right is None else [str(right)]


def _text_scores(task: Task, metric: str, records: Sequence[Record]) -> np.ndarray:
    said, right = [_said(r) for r in records], [_accepted(r) for r in records]
    known = [i for i, words in enumerate(right) if words]
    ask, references = [said[i] for i in known], [right[i] for i in known]
    counts = metric in ("wer", "cer")
    out = np.zeros((len(records), 2) if counts else len(records))
    if counts:
        out[:] = (1.0, 1.0)  # a document whose answer cannot be read counts as one wrong word
    if not known:
        return out
    name, _, within_ms = metric.partition(":")
    if name == "temporal":
        out[known] = _temporal(ask, references, int(within_ms) / 1000 if within_ms else task.within_s)
        return out
    out[known] = TEXT[metric](ask, references)
    failed = [i for i, r in enumerate(records) if r.get("failed")]
    if not counts:
        out[failed] = 0.0  # an empty answer is no right answer, even where nothing was to be said
    return out


def _best(score: Callable[..., np.ndarray]) -> Callable[[list[str], list[list[str]]], np.ndarray]:
    """The best over accepted answers."""

    def over(said: list[str], right: list[list[str]]) -> np.ndarray:
        most = max(map(len, right))
        table = [score(said, [words[min(i, len(words) - 1)] for words in right]) for i in range(most)]
        return np.asarray(np.max(np.stack(table), axis=0))

    return over


def _errors(score: Callable[..., np.ndarray], unit: Callable[[str], int]) -> Callable[[list[str], list[list[str]]], np.ndarray]:
    """[n 2] edits and units of the first accepted answer; an empty one counts what was said."""

    def over(said: list[str], right: list[list[str]]) -> np.ndarray:
        rows = []
        for words, accepted in zip(said, right, strict=True):
            rows.append(score([words], [accepted[0]])[0] if unit(accepted[0]) else (float(unit(words)), 0.0))
        return np.array(rows, np.float64)

    return over


def _temporal(said: list[str], right: list[list[str]], within_s: float) -> np.ndarray:
    """1 where the first number of the answer (seconds) lies within `within_s` of the reference."""
    return m.temporal_hits([m.first_number(s) for s in said], [m.first_number(r[0]) for r in right], within_s)


TEXT: dict[str, Callable[[list[str], list[list[str]]], np.ndarray]] = {
    "accuracy": _best(lambda said, right: m.accuracy([s.strip() for s in said], [r.strip() for r in right])),
    "exact_match": _best(m.exact_match),
    "f1": _best(m.token_f1),
    "vqa_accuracy": m.vqa_accuracy,
    "wer": _errors(m.word_errors, lambda text: len(text.split())),
    "cer": _errors(m.character_errors, len),
    "bleu": _best(m.bleu),
    "chrf": _best(m.chrf),
    "rouge_1": _best(m.rouge_1),
    "rouge_2": _best(m.rouge_2),
    "rouge_l": _best(m.rouge_l),
    "consensus": m.caption_consensus,
}


def _frechet(records: Sequence[Record]) -> dict[str, Any]:
    """A distance of two clouds of features; no interval, because resampled clouds lie further apart than whole ones."""
    pairs = [r["features"] for r in records if "features" in r]
    found = {"value": None, "n": len(pairs), "left_out": len(records) - len(pairs), "features": EXTRACTOR}
    if len(pairs) < 2:
        return found
    table = np.array(pairs, np.float64)
    return {**found, "value": round(m.frechet_distance(table[:, 0], table[:, 1]), 6)}


def _corpus(metric: str, records: Sequence[Record], rounds: int) -> Estimate | None:
    """A figure of all samples at once, by the first accepted answer; resampling draws samples, as everywhere."""
    rows = [(_said(r).strip(), [a.strip() for a in _accepted(r)] or [UNREAD], float(r.get("confidence", 1.0))) for r in records]

    def statistic(picked: np.ndarray) -> float:
        some = [rows[int(i)] for i in picked]
        said, right = [s for s, _, _ in some], [accepted[0] for _, accepted, _ in some]
        if metric == "macro_f1":
            return m.macro_f1(said, right)
        if metric == "corpus_bleu":
            return m.corpus_bleu(said, right)
        return m.calibration_error([c for _, _, c in some], [float(s in accepted) for s, accepted, _ in some])

    return bootstrap(np.arange(len(rows)), statistic, rounds=rounds) if rows else None


def gaps(task: Task, records: Sequence[Record], rounds: int = 1000) -> dict[str, Any]:
    """Best and worst slice of every metadata column that the task names, by its first metric; small slices are only counted."""
    out: dict[str, Any] = {}
    records = sorted(records, key=lambda r: r["key"])
    metric = task.metrics[0]
    about = measure(metric)
    if about.pool == "corpus" or not records:
        return out
    for column in task.slices:
        labels, kept = [], []
        for record in records:
            try:
                labels.append(str(lookup(record.get("metadata", {}), column)))
            except TaskError:
                continue
            kept.append(record)
        scores, scored = sample_scores(task, metric, kept)
        if len(scored) < len(kept) or not scored:
            out[column] = {"note": f"{len(records) - len(scored)} samples have no score or no {column!r}"}
            continue
        counts = Counter(labels)
        large = [i for i, label in enumerate(labels) if counts[label] >= SMALLEST_SLICE]
        if len({labels[i] for i in large}) < 2:
            note = f"fewer than two values have {SMALLEST_SLICE} samples or more; ask more documents (--limit)"
            out[column] = {"metric": metric, "note": note, "sizes": dict(sorted(counts.items()))}
            continue
        gap = slice_gap(column, [labels[i] for i in large], scores[large], _pooled(about), rounds=rounds)
        best, worst = sorted((gap.best, gap.worst), key=lambda name: -about.goodness(gap.slices[str(name)].value))
        out[column] = {
            "metric": metric,
            "best": str(best),
            "worst": str(worst),
            "gap": _plain(gap.gap),
            "slices": {name: _plain(e) for name, e in gap.slices.items()},
            "too_small": {name: n for name, n in sorted(counts.items()) if n < SMALLEST_SLICE},
        }
    return out
