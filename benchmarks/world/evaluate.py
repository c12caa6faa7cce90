"""Ask the one model everything, through the public interface alone, and grade it.

In: a built world, a `Generalist`, the tasks. Out: a `Result` per task with its interval and samples to look at. No task has
weights, a head or a code path of its own: `generate`, `predict`, `score`, `embed` and `rollout` answer all of them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from weft.benchmarks.harness.metrics import normalised_return, ratio
from weft.benchmarks.harness.stats import Estimate, bootstrap, t_interval
from weft.benchmarks.world.control import PLANTS
from weft.benchmarks.world.documents import FORECAST
from weft.benchmarks.world.hmm import edits
from weft.benchmarks.world.material import label, lines
from weft.benchmarks.world.specialists import Judges, judges
from weft.benchmarks.world.tasks import TASKS, TEST_SEED, Task, grade, prompt, recall_directions, reference, understand
from weft.inference.generate import Request
from weft.inference.request import Produce
from weft.inference.rollout import EpisodeSpec
from weft.tokenizers.manifest import load_document
from weft.tokenizers.segment import Document, Image, Segment, Sensor

BATCH = 64
FORECAST_SAMPLES = 16
SPEECH_TEMPERATURE = 0.5
IMAGE_TEMPERATURE = 0.5
REST = (Produce("text", max_tokens=24), Produce("image", grid=(2, 4)))
"""What follows an upper half: its name, then the lower half."""
SHOWN = 12
"""Samples kept per task for the report."""


@dataclass
class Result:
    """One row: what was measured, how sure it is, and what to look at."""

    task: Task
    estimate: Estimate
    seconds: float
    samples: list[dict[str, Any]] = field(default_factory=list)
    parts: dict[str, Any] = field(default_factory=dict)
    """Figures behind the figure: per direction, per dropped modality, raw returns."""


@dataclass(frozen=True)
class Exam:
    """What every grader needs."""

    world: Path
    model: Any
    judges: Judges
    limit: int | None
    """Test documents per task at most; None = all."""

    def questions(self, source: str) -> list[dict[str, Any]]:
        """Test lines of a source."""
        return lines(self.world, source, "test")[: self.limit]

    def document(self, line: dict[str, Any]) -> Document:
        """A line as a document."""
        return load_document(line, self.world)

    def prompts(self, rows: Sequence[dict[str, Any]], drop: str | None = None) -> list[tuple[Segment, ...]]:
        """The observed parts."""
        return [self.document(prompt(row, drop)).segments for row in rows]

    def answers(self, rows: Sequence[dict[str, Any]]) -> list[Segment]:
        """The last target segment of every line, as given."""
        return [self.document({**row, "segments": reference(row)}).segments[-1] for row in rows]


def chunks(items: Sequence[Any], size: int = BATCH) -> Iterable[Sequence[Any]]:
    """Consecutive parts of at most `size`."""
    return (items[i : i + size] for i in range(0, len(items), size))


def write_texts(exam: Exam, prompts: Sequence[Any]) -> list[str]:
    """Greedy answers in words."""
    replies = [model_reply for part in chunks(prompts) for model_reply in exam.model.generate(list(part), max_tokens=24)]
    return [reply.text for reply in replies]


def texts(exam: Exam, task: Task) -> Result:
    """An answer in words, written freely; a rate of word errors, or right or wrong."""
    rows = [row for source in task.sources for row in exam.questions(source)]
    if task.drop:
        return with_one_removed(exam, task, rows)
    said = write_texts(exam, exam.prompts(rows))
    right = [grade(task, row, words) for row, words in zip(rows, said)]
    shown = [
        {"prompt": row, "said": words, "label": label(row), "right": ok}
        for row, words, ok in spread(list(zip(rows, said, right)))
    ]
    if task.read == "words":
        heard = [understand(task, words) for words in said]
        counts = np.array([[edits(h, label(row)), len(label(row))] for h, row in zip(heard, rows)], float)
        return Result(task, bootstrap(counts, ratio), 0.0, shown, {"all words right": float(np.mean(right))})
    return Result(task, bootstrap(np.array(right, float)), 0.0, shown)


def with_one_removed(exam: Exam, task: Task, rows: list[dict[str, Any]]) -> Result:
    """Share of the answers that are right with everything and stay right with each modality removed."""
    whole = np.array([grade(task, row, words) for row, words in zip(rows, write_texts(exam, exam.prompts(rows)))])
    kept, parts = [], {"nothing removed": float(whole.mean())}
    for modality in task.drop:
        ok = np.array([grade(task, row, words) for row, words in zip(rows, write_texts(exam, exam.prompts(rows, modality)))])
        parts[f"{modality} removed"] = float(ok.mean())
        kept.append(ok[whole].astype(float))
    return Result(task, bootstrap(np.concatenate(kept) if whole.any() else np.zeros(1)), 0.0, [], parts)


def drawn(exam: Exam, rows: list[dict[str, Any]], produce: str, **options: Any) -> list[Any]:
    """A reply per row, each with a seed of its own: equal prompts would draw equal media from one."""
    asked = [Request(prompt, produce, {**options, "seed": i}) for i, prompt in enumerate(exam.prompts(rows))]
    return [reply for part in chunks(asked) for reply in exam.model.generate(list(part))]


def images(exam: Exam, task: Task) -> Result:
    """A picture drawn from words, judged by the specialist that reads real scans."""
    rows = exam.questions(task.sources[0])
    replies = drawn(exam, rows, "image", grid=(4, 4), temperature=IMAGE_TEMPERATURE)
    made = [np.asarray(reply.image.pixels) for reply in replies]
    return judged(exam, task, rows, made, [exam.judges.judge_digit(picture) for picture in made])


def judged(exam: Exam, task: Task, rows: list[dict[str, Any]], made: list[Any], seen: list[int]) -> Result:
    """Right where the judge names the digit that was asked for."""
    right = np.array([float(digit == label(row)) for digit, row in zip(seen, rows)])
    shown = [{"made": m, "label": label(row), "judged": digit} for m, row, digit in spread(list(zip(made, rows, seen)))]
    return Result(task, bootstrap(right), 0.0, shown)


def rests(exam: Exam, task: Task) -> Result:
    """The lower half of a scan from its upper half, after its name; also the mean absolute error of its pixels."""
    rows = exam.questions(task.sources[0])
    tops = [np.asarray(exam.model.tokenizer.tokenizers["image"].pixels(p[0])) for p in exam.prompts(rows)]
    truth = [np.asarray(exam.model.tokenizer.tokenizers["image"].pixels(a)) for a in exam.answers(rows)]
    replies = [r for part in chunks(exam.prompts(rows)) for r in exam.model.generate(list(part), REST, temperature=0)]
    made = [np.asarray(reply.image.pixels) for reply in replies]
    whole = [np.concatenate([top, bottom]) for top, bottom in zip(tops, made)]
    result = judged(exam, task, rows, whole, [exam.judges.judge_digit(picture) for picture in whole])
    error = bootstrap([float(np.abs(m - t).mean()) for m, t in zip(made, truth)])
    named = [grade(task, row, reply.text) for row, reply in zip(rows, replies)]
    result.parts |= {"mean absolute pixel error": error.value, "named right": float(np.mean(named))}
    for sample, (top, bottom) in zip(result.samples, spread(list(zip(tops, truth)))):
        sample["truth"] = np.concatenate([top, bottom])
    return result


def speech(exam: Exam, task: Task) -> Result:
    """A word spoken: codes to waveform, judged by the specialist that hears real clips."""
    rows = exam.questions(task.sources[0])
    made = [r.audio for r in drawn(exam, rows, "audio", max_tokens=25, temperature=SPEECH_TEMPERATURE)]
    seen = [exam.judges.judge_speech(np.asarray(sound.samples), int(sound.rate_hz)) for sound in made]
    return judged(exam, task, rows, made, seen)


def retrieval(exam: Exam, task: Task) -> Result:
    """Class recall at 1 in every direction; the figure is the worst of them."""
    found, pairs = {}, {}
    for source in task.sources:
        rows = exam.questions(source)
        found[source] = exam.model.embed([exam.document(row).segments[0] for row in rows])
        pairs[source] = np.array([row["pair"] for row in rows])
    hits = {}
    for query, gallery in recall_directions(task.sources):
        nearest = (found[query] @ found[gallery].T).argmax(1)
        hits[f"{query[5:]} -> {gallery[5:]}"] = (pairs[gallery][nearest] == pairs[query]).astype(float)
    worst = min(hits, key=lambda name: hits[name].mean())
    parts = {name: float(values.mean()) for name, values in hits.items()}
    return Result(task, bootstrap(hits[worst]), 0.0, [], {**parts, "worst": worst})


def control(exam: Exam, task: Task) -> Result:
    """Episodes in an environment; 0 is random play, 100 the expert."""
    plant = PLANTS[task.sources[0]]
    spec = EpisodeSpec(plant.name, plant.rate_hz, history=task.context_steps)
    episodes = task.episodes if exam.limit is None else min(task.episodes, max(2, exam.limit // 10))
    played = exam.model.rollout(plant.name, spec, episodes, seed=TEST_SEED, max_steps=1000)
    known = world_returns(exam.world)[plant.name]
    scores = normalised_return(played.returns, known["random"], known["expert"])
    first = played.episodes[0]
    seen = np.stack(first.observations).reshape(len(first), -1)
    sample = {"observations": seen, "actions": np.stack(first.actions), "return": first.total}
    return Result(task, t_interval(scores), 0.0, [sample], {"mean return": float(played.returns.mean()), **known})


def world_returns(world: Path) -> dict[str, dict[str, float]]:
    """Mean returns of random play and of the experts, as the world measured them."""
    import json

    return json.loads((world / "world.json").read_text(encoding="utf-8"))["control"]


def forecast(exam: Exam, task: Task) -> Result:
    """Mean absolute error of the median forecast over the error of "as the last reading"."""
    rows = exam.questions(task.sources[0])
    pasts, ahead = exam.prompts(rows), FORECAST["ahead"]
    said = []
    for part, some in zip(chunks(pasts), chunks(rows)):
        kind = some[0]["segments"][0]["kind"]
        said += exam.model.predict(list(part), horizon=ahead, sensor=kind, samples=FORECAST_SAMPLES)
    truth = [values(answer) for answer in exam.answers(rows)]
    errors = np.array(
        [[np.abs(s.median - t).mean(), np.abs(values(p[-1])[-1] - t).mean()] for s, t, p in zip(said, truth, pasts)]
    )
    shown = [
        {"past": values(past[-1]), "truth": t, "median": s.median, "low": s.quantiles[0.05], "high": s.quantiles[0.95]}
        for past, t, s in spread(list(zip(pasts, truth, said)))
    ]
    inside = [((t >= s.quantiles[0.05]) & (t <= s.quantiles[0.95])).mean() for t, s in zip(truth, said)]
    return Result(task, bootstrap(errors, ratio), 0.0, shown, {"truth inside 90 % interval": float(np.mean(inside))})


def values(segment: Segment) -> np.ndarray:
    """Readings of a sensor segment as float64 [N channels]."""
    assert isinstance(segment, Sensor)
    return np.asarray(segment.values, np.float64).reshape(-1, 1)


def bits(exam: Exam, task: Task) -> Result:
    """Bits per byte of held-out prose."""
    rows = exam.questions(task.sources[0])
    scored = [s for part in chunks(exam.answers(rows), 16) for s in exam.model.score([[] for _ in part], [[a] for a in part])]
    counts = np.array([[-s.total / np.log(2), s.text_bytes] for s in scored])
    return Result(task, bootstrap(counts, ratio), 0.0)


GRADERS: dict[str, Callable[[Exam, Task], Result]] = {
    "text": texts,
    "image": images,
    "rest": rests,
    "speech": speech,
    "retrieval": retrieval,
    "control": control,
    "forecast": forecast,
    "bits": bits,
}


def spread(items: list[Any], count: int = SHOWN) -> list[Any]:
    """At most `count` items, evenly spread."""
    return items[:: max(1, len(items) // count)][:count]


def evaluate(
    world: str | Path,
    model: Any,
    *,
    tasks: Sequence[str] | None = None,
    limit: int | None = None,
    progress: Callable[[str, float], None] | None = None,
) -> dict[str, Result]:
    """Every task (or the named ones) on the held-out documents of `world`."""
    unknown = sorted(set(tasks or ()) - set(TASKS))
    if unknown:
        raise ValueError(f"no task {unknown[0]!r}; the sample world has {', '.join(TASKS)}")
    exam = Exam(Path(world), model, judges(Path(world)), limit)
    wanted = [TASKS[name] for name in tasks or TASKS]
    found = {}
    for i, task in enumerate(wanted):
        if progress:
            progress(task.name, i / len(wanted))
        begun = time.perf_counter()
        result = GRADERS[task.kind](exam, task)
        found[task.name] = replace(result, seconds=time.perf_counter() - begun)
    if progress:
        progress("done", 1.0)
    return found


__all__ = ["Image", "Result", "evaluate"]
