"""Ask one batch of questions through the public interface and write down what came back, per sample.

In: anything with the methods of `Generalist` that a task needs, a task, questions. Out: one record per question: the answer in
words or numbers, scores that need the media, new tokens. Text metrics are computed later from the records (`aggregate.py`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np

from weft.benchmarks.harness.media_files import keep
from weft.benchmarks.harness.metrics import normalise, psnr, retrieval, ssim
from weft.benchmarks.harness.questions import Question
from weft.benchmarks.harness.samples import Sample
from weft.benchmarks.harness.signals import features, forecast_scores, mel_error_db
from weft.benchmarks.harness.task import Task, TaskError
from weft.inference.generalist import Generalist
from weft.inference.generate import Request
from weft.tokenizers.media.image import load_image
from weft.tokenizers.segment import Audio, Image, Segment, Sensor, Text

Record = dict[str, Any]


@dataclass(frozen=True)
class Setting:
    """What answering needs beside model and task."""

    seed: int
    media: Path
    """Folder for generated pictures and sounds."""
    judge: Callable[[Sequence[Sequence[Segment]]], list[str]] | None = None
    """Names what media show."""


def answer(model: Any, task: Task, questions: Sequence[Question], setting: Setting) -> list[Record]:
    """The records of one batch, in order."""
    empty = [q.key for q in questions if not q.prompt and task.answer not in ("bits",)]
    if empty:
        raise TaskError(f"nothing is left of the prompt of {empty[0]!r}")
    return ASK[task.answer](model, task, questions, setting)


def _made(model: Any, task: Task, questions: Sequence[Question], setting: Setting, **defaults: Any) -> list[Any]:
    """One reply per question. Each draws noise of its own: with one seed for all, equal questions have one and the same answer,
    and an interval that takes them for many."""
    produce: Any = [*task.first, task.answer] if task.first else task.answer
    options = {**defaults, **task.produce}
    if not isinstance(model, Generalist):
        return list(model.generate([list(q.prompt) for q in questions], produce, seed=setting.seed, **options))
    return list(
        model.generate([Request(list(q.prompt), produce, {"seed": _own(setting.seed, q.key), **options}) for q in questions])
    )


def _own(seed: int, key: str) -> int:
    """The seed of one sample, from 0 to 2^63 - 1."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{key}".encode()).digest()[:8], "big") >> 1


def _texts(model: Any, task: Task, questions: Sequence[Question], setting: Setting) -> list[Record]:
    replies = _made(model, task, questions, setting, max_tokens=64, temperature=0.0)
    return [{"answer": r.text, "reference": q.reference, **_cost(r)} for q, r in zip(questions, replies, strict=True)]


def _said(task: Task, reply: Any) -> Record:
    """The words before a medium, kept to be looked at."""
    return {"said": reply.text} if "text" in task.first else {}


def _cost(reply: Any) -> Record:
    timings = getattr(reply, "timings", None)
    if timings is None:
        return {}
    return {"cost": {"new_tokens": timings.new_tokens, "first_token_s": round(timings.first_token_s, 4)}}


def _choices(model: Any, task: Task, questions: Sequence[Question], setting: Setting) -> list[Record]:
    """Questions with the same choices are asked together."""
    records: dict[int, Record] = {}
    for choices in dict.fromkeys(q.choices for q in questions):
        if not choices:
            raise TaskError("a document has no choices")
        rows = [i for i, q in enumerate(questions) if q.choices == choices]
        found = model.predict([list(questions[i].prompt) for i in rows], choices=list(choices))
        for i, choice in zip(rows, found, strict=True):
            right = questions[i].reference
            accepted = right if isinstance(right, list) else [right]
            records[i] = {
                "answer": choice.best,
                "reference": right,
                "choices": len(choices),
                "confidence": float(np.max(choice.probabilities)),
                "logprobs": [float(p) for p in choice.logprobs],
                "scores": {"accuracy_normalized": float(choice.best_normalized in accepted)},
            }
    return [records[i] for i in range(len(questions))]


def _images(model: Any, task: Task, questions: Sequence[Question], setting: Setting) -> list[Record]:
    replies = _made(model, task, questions, setting)
    records = []
    for q, reply in zip(questions, replies, strict=True):
        made = reply.image
        scores: dict[str, Any] = {}
        if {"psnr", "ssim"} & set(task.metrics):
            true = _first(q, Image)
            a, b = load_image(made.pixels, 1), load_image(true.pixels, 1)
            if a.shape != b.shape:
                raise TaskError(
                    f"the picture made is {a.shape[:2]}, the reference {b.shape[:2]}; set produce: {{grid: [h, w]}}"
                )
            scores = {"psnr": float(psnr([a], [b])[0]), "ssim": float(ssim([a[..., 0]], [b[..., 0]])[0])}
        records.append({"scores": scores, **_media_record(task, q, made, setting, Image), **_said(task, reply), **_cost(reply)})
    return _judged(model, task, questions, [r.image for r in replies], records, setting)


def _sounds(model: Any, task: Task, questions: Sequence[Question], setting: Setting) -> list[Record]:
    replies = _made(model, task, questions, setting)
    records = []
    for q, reply in zip(questions, replies, strict=True):
        made = reply.audio
        scores = {"mel_error": mel_error_db(made, _first(q, Audio))} if "mel_error" in task.metrics else {}
        records.append({"scores": scores, **_media_record(task, q, made, setting, Audio), **_said(task, reply), **_cost(reply)})
    return _judged(model, task, questions, [r.audio for r in replies], records, setting)


def _first(q: Question, kind: type[Any]) -> Any:
    found = [s for s in q.reference if isinstance(s, kind)] if isinstance(q.reference, tuple) else []
    if not found:
        raise TaskError(f"the document has no target of type {kind.__name__} to compare with")
    return found[0]


def _media_record(task: Task, q: Question, made: Segment, setting: Setting, kind: type[Any]) -> Record:
    record: Record = {
        "media": keep(made, setting.media, q.key),
        "reference": q.reference if isinstance(q.reference, str) else None,
    }
    if isinstance(q.reference, tuple) and (true := [s for s in q.reference if isinstance(s, kind)]):
        record["true_media"] = keep(true[0], setting.media, f"{q.key}/true")
    if "frechet" in task.metrics:
        record["features"] = [[float(x) for x in features(s)] for s in (made, _first(q, kind))]
    return record


def _judged(
    model: Any, task: Task, questions: Sequence[Question], made: Sequence[Any], records: list[Record], setting: Setting
) -> list[Record]:
    """What the judge and the model itself see in the media."""
    if not {"judged", "consistency"} & set(task.metrics):
        return records
    said = [q.reference for q in questions]
    if any(not isinstance(words, str) for words in said):
        raise TaskError("judged and consistency compare words; name them by reference: {metadata: NAME}")
    if "judged" in task.metrics:
        assert setting.judge is not None
        for record, seen, words in zip(records, setting.judge([[m] for m in made]), said):
            record["scores"]["judged"] = float(normalise(seen) == normalise(words))
            record["judged"] = seen
    if task.consistency is not None and "consistency" in task.metrics:
        for record, seen, words in zip(records, _understood(model, task, made), said):
            record["scores"]["consistency"] = float(normalise(seen) == normalise(words))
            record["answer"] = seen
    return records


def _understood(model: Any, task: Task, made: Sequence[Any]) -> list[str]:
    assert task.consistency is not None
    prompts = [[m, Text(task.consistency.question)] for m in made]
    if task.consistency.choices:
        return [c.best for c in model.predict(prompts, choices=list(task.consistency.choices))]
    return [r.text for r in model.generate(prompts, "text", max_tokens=64, temperature=0.0)]


def _forecasts(model: Any, task: Task, questions: Sequence[Question], setting: Setting) -> list[Record]:
    assert task.forecast is not None
    ahead, kind = task.forecast.readings, task.forecast.kind
    options = {"samples": task.forecast.samples, "seed": setting.seed, **task.produce}
    found = model.predict([list(q.prompt) for q in questions], horizon=ahead, sensor=kind, **options)
    records = []
    for q, forecast in zip(questions, found, strict=True):
        truth = _rows(q.reference)
        past = [s for s in q.prompt if isinstance(s, Sensor) and s.kind == kind]
        if len(truth) != ahead:
            raise TaskError(f"the reference has {len(truth)} readings, forecast.readings is {ahead}")
        history = _rows(past[-1])
        history = history[np.isfinite(history).all(axis=1)]
        if not len(history):
            raise TaskError(f"no reading of sensor {kind!r} is left in the prompt")
        shown = {"median": np.median(forecast.values, axis=0).round(4).tolist(), "truth": truth.round(4).tolist()}
        records.append({"answer": shown, "scores": forecast_scores(forecast.values, truth, history)})
    return records


def _rows(segment: Any) -> np.ndarray:
    values = np.asarray(segment.values, np.float64)
    return values.reshape(len(values), -1)


def _bits(model: Any, task: Task, questions: Sequence[Question], setting: Setting) -> list[Record]:
    found = model.score([list(q.prompt) for q in questions], [list(q.reference) for q in questions])
    records = []
    for score in found:
        scores: dict[str, Any] = {}
        tokens = {name: 0 for name in score.by_modality}
        for name, counts in zip(score.modality, score.counted):
            tokens[name] = tokens.get(name, 0) + int(counts)
        total = -sum(score.by_modality.values())
        scores["perplexity"] = [total, float(max(sum(tokens.values()), 1))]
        for name, value in score.by_modality.items():
            if tokens[name]:
                scores[f"perplexity:{name}"] = [-value, float(tokens[name])]
        if score.text_bytes:
            scores["bits_per_byte"] = [-score.by_modality.get("text", 0.0) / float(np.log(2)), float(score.text_bytes)]
        records.append({"scores": scores})
    return records


def rank_all(model: Any, queries: Sequence[Question], gallery: Sequence[Question], lost: Sequence[Sample] = ()) -> list[Record]:
    """Retrieval: every query against the whole gallery; relevant are items of the same `pair`, itself left out. Items that
    cannot be read (`lost`) are there to be found, and never are."""
    # Both sides are embedded document by document: the embedding of one never depends on the others.
    a = cast(np.ndarray, model.embed([list(q.prompt) for q in queries]))
    b = cast(np.ndarray, model.embed([list(q.prompt) for q in gallery]))
    similarity = np.concatenate([a @ b.T, np.full((len(a), len(lost)), -np.inf)], axis=1)
    items: list[Question | Sample] = [*gallery, *lost]
    same = np.array([[q.key == item.key for item in items] for q in queries])
    relevant = np.array([[q.pair is not None and q.pair == item.pair for item in items] for q in queries]) & ~same
    similarity[same] = -np.inf
    found = retrieval(similarity, relevant)
    out: list[Record] = []
    for i, q in enumerate(queries):
        if not relevant[i].any():
            out.append({"failed": f"the gallery holds nothing of pair {q.pair!r}"})
            continue
        best = int(np.argmax(similarity[i]))
        scores = {name: float(values[i]) for name, values in found.items()}
        out.append({"answer": items[best].key, "scores": scores, "gallery": len(items), "relevant": int(relevant[i].sum())})
    return out


ASK: dict[str, Callable[[Any, Task, Sequence[Question], Setting], list[Record]]] = {
    "text": _texts,
    "choices": _choices,
    "image": _images,
    "audio": _sounds,
    "forecast": _forecasts,
    "bits": _bits,
}
