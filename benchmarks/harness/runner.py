"""Score a model on tasks: ask, record, aggregate, write.

    evaluate(model, tasks, out)  ->  out/results.json, out/TASK/VARIANT-DIGEST.jsonl, out/TASK/media/

In: a `Generalist` or a rival with the methods that the tasks need, tasks with their folders. Out: figures with intervals.
Every sample has one record, failed ones too. A second call with the same model and tasks asks only what is missing, and gives
the same JSON but for the keys `times`. Scores do not depend on batch size, order of documents or workers.
"""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from weft.benchmarks.harness import control, environments
from weft.benchmarks.harness.aggregate import gaps, summarise
from weft.benchmarks.harness.ask import Asker, Progress
from weft.benchmarks.harness.baselines import baselines
from weft.benchmarks.harness.names import slug
from weft.benchmarks.harness.questions import Picker, Variant, random_picker, similar_picker
from weft.benchmarks.harness.record_file import RecordFile
from weft.benchmarks.harness.samples import TaskData, data_digest, task_data
from weft.benchmarks.harness.shown import asked, extremes
from weft.benchmarks.harness.specialist import judge_from
from weft.benchmarks.harness.task import Task, TaskError
from weft.benchmarks.harness.variants import removals, spoilt

Record = dict[str, Any]


@dataclass(frozen=True)
class EvalConfig:
    """How to run, not what: nothing here changes a score but `shots`, `limit`, `episodes` and `seed`."""

    shots: int | None = None
    """Demonstrations per question, instead of each task's own number; tasks without training documents keep theirs."""
    limit: int | None = None
    """Documents per task at most."""
    episodes: int | None = None
    """Episodes per control task, instead of each task's own number."""
    batch: int = 16
    workers: int = 1
    """Threads that read and ask batches."""
    seed: int = 0
    missing: bool = False
    """Also ask with each modality and each pair of modalities removed."""
    corrupt: bool = False
    """Also ask with spoilt inputs."""
    rounds: int = 1000
    """Resamples of an interval."""

    def __post_init__(self) -> None:
        if self.batch < 1 or self.workers < 1 or self.rounds < 10:
            raise TaskError(
                f"batch={self.batch} and workers={self.workers} must be at least 1, rounds={self.rounds} at least 10"
            )
        for name in ("shots", "limit", "episodes"):
            value = getattr(self, name)
            if value is not None and value < (0 if name == "shots" else 1):
                raise TaskError(f"{name}={value} is too small")


def evaluate(
    model: Any,
    tasks: Sequence[tuple[Task, Path]],
    out: str | Path,
    config: EvalConfig | None = None,
    *,
    name: str = "model",
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Run tasks (each with the folder that its paths count from) and write `out/results.json`."""
    config, out = config or EvalConfig(), Path(out)
    out.mkdir(parents=True, exist_ok=True)
    found = {}
    for task, root in tasks:
        if config.shots is not None and task.data.train:
            task = replace(task, shots=config.shots)
        found[task.name] = _Run(model, task, root, out / slug(task.name), config, progress or (lambda *_: None)).result()
    results = {
        "model": name,
        "weights": str(getattr(model, "digest", "")),
        "seed": config.seed,
        "versions": versions(),
        "tasks": found,
    }
    draft = out / "results.json.part"
    draft.write_text(json.dumps(results, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    draft.replace(out / "results.json")
    return results


def versions() -> dict[str, str]:
    """What computed the figures."""
    from importlib.metadata import PackageNotFoundError, version

    found = {"python": sys.version.split()[0]}
    for package in ("weft", "torch", "numpy", "gymnasium", "jiwer", "sacrebleu", "rouge-score", "scikit-image", "scikit-learn"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


class _Run:
    """One task."""

    def __init__(self, model: Any, task: Task, root: Path, out: Path, config: EvalConfig, progress: Progress) -> None:
        self.model, self.task, self.root, self.out = model, task, root, out
        self.config, self.progress = config, progress

    def result(self) -> dict[str, Any]:
        """Figures of the task, with everything that was asked for beside them."""
        head = {"about": self.task.about, "answer": self.task.answer, "shots": self.task.shots, "digest": self.task.digest()}
        reason = self.model.unable(self.task) if hasattr(self.model, "unable") else None
        if reason:
            return {**head, "not_applicable": reason}
        begun = time.perf_counter()
        data = task_data(self.task, self.root, self.config.limit)
        if hasattr(self.model, "learn"):
            self.model.learn(self.task, data.pool)
        found = self._control(data) if self.task.answer == "control" else self._documents(data)
        times = {
            **found.pop("times", {}),
            "seconds": round(time.perf_counter() - begun, 3),
            "peak_memory_gib": peak_memory_gib(),
        }
        return {**head, **found, "data": data.digest(), "times": times}

    # -- control

    def _control(self, data: TaskData) -> dict[str, Any]:
        assert self.task.control is not None
        rounds = self.config.rounds
        records, file = self._episodes(data, Variant())
        out: dict[str, Any] = {**summarise(self.task, records, rounds), "records": file}
        if self.task.slices:
            out["slices"] = gaps(self.task, records, rounds)
        if "chance" in self.task.baselines:
            played = control.chance(self.task, self.root, len(records))
            out["baselines"] = {"chance": _short(summarise(self.task, played, rounds))}
        tables = {
            "missing": environments.removals(self.task) if self.config.missing else [],
            "corrupt": environments.spoilt(self.task) if self.config.corrupt else [],
        }
        for table, variants in tables.items():
            if variants:
                found = {v.name: self._episodes(data, v)[0] for v in variants}
                out[table] = {name: _short(summarise(self.task, some, rounds)) for name, some in found.items()}
        strips, scale = self._strips(records), control.returns_scale(self.task, self.root)
        return {**out, **({"scale": scale} if scale else {}), **({"strips": strips} if strips else {})}

    def _episodes(self, data: TaskData, variant: Variant) -> tuple[list[Record], str]:
        """Records of all episodes in one variant, and the name of their file."""
        assert self.task.control is not None
        stem = "episodes" if variant == Variant() else f"episodes-{slug(variant.name)}"
        file = RecordFile(self.out / f"{stem}-{self._key(data, variant)}.jsonl")
        records = control.play(
            self.model,
            self.task,
            self.root,
            data.pool,
            file,
            variant,
            episodes=self.config.episodes or self.task.control.episodes,
            seed=self.config.seed,
            batch=self.config.batch,
            progress=lambda done, total: self.progress(f"{self.task.name}: {variant.name}", done, total),
        )
        return records, file.path.name

    def _strips(self, records: Sequence[Record]) -> dict[str, str]:
        """Picture strips of the worst and the best episode."""
        whole = sorted((r for r in records if not r.get("failed")), key=lambda r: (r["scores"]["return"], r["key"]))
        out = {}
        for name, record in (("worst", whole[0]), ("best", whole[-1])) if whole else ():
            path = self.out / "media" / f"{name}-{record['key']}.png"
            drawn = path.name if path.exists() else control.strip(self.task, record, path)
            if drawn:
                out[name] = drawn
        return out

    # -- documents

    def _documents(self, data: TaskData) -> dict[str, Any]:
        judge = judge_from(data.judge).name if data.judge else None
        asker = Asker(
            self.model,
            self.task,
            data,
            self.out,
            self.config.seed,
            self.config.batch,
            self.config.workers,
            self._picker(data),
            judge,
            self.progress,
        )
        records, file = asker.ask(Variant(), self._key(data, Variant()))
        rounds = self.config.rounds
        shown = extremes(self.task, records)
        out: dict[str, Any] = {
            **summarise(self.task, records, rounds),
            "records": file,
            "shown": shown,
            "asked": asked(self.task, data.samples, shown, self.out / "media" / "asked"),
        }
        if self.task.slices:
            out["slices"] = gaps(self.task, records, rounds)
        if self.task.baselines:
            out["baselines"] = baselines(self.task, data, records, self.config.seed, rounds)
        tables = {
            "missing": removals(self.task, data.samples, self.config.seed) if self.config.missing else [],
            "corrupt": spoilt(self.task, data.samples, self.config.seed) if self.config.corrupt else [],
        }
        for table, variants in tables.items():
            if variants:
                found = {v.name: asker.ask(v, self._key(data, v))[0] for v in variants}
                out[table] = {name: _short(summarise(self.task, some, rounds)) for name, some in found.items()}
        return {**out, "times": _cost(records)}

    def _picker(self, data: TaskData) -> Picker:
        if self.task.shots and self.task.pick == "similar":
            return similar_picker(self.task, data.pool, self.task.shots, self.model.embed)
        return random_picker(self.task, data.pool, self.task.shots, self.config.seed)

    def _key(self, data: TaskData, variant: Variant) -> str:
        """Digest of all that decides an answer beside the document itself."""
        says = (
            self.task.digest(),
            str(getattr(self.model, "digest", "")),
            type(self.model).__name__,
            str(getattr(getattr(self.model, "model", None), "device", "")),
            str(self.config.seed),
            variant,
            data_digest(data.pool) if data.pool else "",
            data_digest(data.judge) if data.judge else "",
            data_digest(data.gallery) if data.gallery else "",
        )
        return hashlib.sha256(repr(says).encode()).hexdigest()[:16]


def _cost(records: Sequence[Record]) -> dict[str, Any]:
    """Tokens per second and the median time to the first token, of what was asked with nothing removed."""
    timed = [r["cost"] for r in records if "cost" in r]
    tokens, seconds = sum(c.get("new_tokens", 0) for c in timed), sum(c["batch_s"] / c["batch"] for c in timed)
    first = sorted(c["first_token_s"] for c in timed if "first_token_s" in c)
    return {
        "new_tokens": tokens,
        "tokens_per_s": round(tokens / seconds, 2) if seconds and tokens else None,
        "first_token_s": first[len(first) // 2] if first else None,
    }


def _short(found: dict[str, Any]) -> dict[str, Any]:
    return {"metrics": found["metrics"], "samples": found["samples"], "failed": found["failed"]}


def peak_memory_gib() -> float:
    """Most memory that this process held, on the GPU if it used one."""
    import resource

    import torch

    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return round(torch.cuda.max_memory_allocated() / 2**30, 3)
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 3)
