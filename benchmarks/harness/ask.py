"""Ask every sample of a task in one variant, in batches, resumably; whatever happens, each sample ends with one record.

In: a model, a task, its data, a variant. Out: the records in the order of the samples, and the name of the file that keeps
them. A batch that raises is halved until the sample at fault stands alone (or the batch fits into memory).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from weft.benchmarks.harness.answers import Setting, answer, rank_all
from weft.benchmarks.harness.names import slug
from weft.benchmarks.harness.questions import Picker, Question, Variant, question, reference_of
from weft.benchmarks.harness.record_file import RecordFile
from weft.benchmarks.harness.samples import Sample, TaskData
from weft.benchmarks.harness.task import Task

Record = dict[str, Any]
Progress = Callable[[str, int, int], None]


@dataclass
class Asker:
    """One task of one model."""

    model: Any
    task: Task
    data: TaskData
    out: Path
    seed: int
    batch: int
    workers: int
    picker: Picker
    judge: Callable[..., list[str]] | None
    progress: Progress

    def ask(self, variant: Variant, key: str) -> tuple[list[Record], str]:
        """Records of all samples; `key` names what decides the answers beside the documents."""
        file = RecordFile(self.out / f"{slug(variant.name)}-{key}.jsonl")
        samples = self.data.samples
        left = [s for s in samples if not file.has(s.key, s.digest)]
        total, lock, done = len(samples), threading.Lock(), [len(samples) - len(left)]
        self.progress(f"{self.task.name}: {variant.name}", done[0], total)

        def work(part: Sequence[Sample]) -> None:
            # The folder of media is the variant's own; the names within come from the keys.
            setting = Setting(self.seed, self.out / "media" / slug(variant.name), self.judge)
            file.add(self._batch(part, variant, setting))
            with lock:
                done[0] += len(part)
                self.progress(f"{self.task.name}: {variant.name}", done[0], total)

        # Retrieval compares each query with the whole gallery, so its queries are asked together.
        size = max(len(left), 1) if self.task.answer == "retrieval" else self.batch
        parts = [left[i : i + size] for i in range(0, len(left), size)]
        if self.workers == 1:
            for part in parts:
                work(part)
        else:
            with ThreadPoolExecutor(self.workers) as threads:
                list(threads.map(work, parts))
        return [file.records[s.key] for s in samples], file.path.name

    def _batch(self, part: Sequence[Sample], variant: Variant, setting: Setting) -> list[Record]:
        """One record per sample, whatever happens."""
        readable: list[tuple[Sample, Question]] = []
        records: dict[str, Record] = {}
        for sample in part:
            try:
                readable.append((sample, question(self.task, sample, variant, self.seed, self.picker(sample))))
            except Exception as error:
                records[sample.key] = self._failed(sample, error)
        if self.task.answer == "retrieval":
            ask: Callable[[list[Question]], list[Record]] = self._ranked
        else:
            ask = lambda questions: answer(self.model, self.task, questions, setting)  # noqa: E731
        for sample, record in self._divided(readable, ask):
            records[sample.key] = record
        return [self._finished(sample, records[sample.key]) for sample in part]

    def _ranked(self, questions: list[Question]) -> list[Record]:
        gallery, lost = [], []
        for sample in self.data.gallery:
            try:
                gallery.append(question(self.task, sample, Variant(), self.seed))
            except ModuleNotFoundError:
                raise
            except Exception:
                lost.append(sample)
        return rank_all(self.model, questions, gallery, lost)

    def _divided(
        self, items: list[tuple[Sample, Question]], ask: Callable[[list[Question]], list[Record]]
    ) -> list[tuple[Sample, Record]]:
        """Ask together; where that fails ask halves, so that one bad sample (or too little memory) fails alone."""
        if not items:
            return []
        begun = time.perf_counter()
        try:
            records = ask([q for _, q in items])
        except Exception as error:
            if len(items) == 1:
                return [(items[0][0], self._failed(items[0][0], error))]
            half = len(items) // 2
            return [*self._divided(items[:half], ask), *self._divided(items[half:], ask)]
        spent = {"batch_s": round(time.perf_counter() - begun, 4), "batch": len(items)}
        for record in records:
            record["cost"] = {**record.get("cost", {}), **spent}
        return [(sample, record) for (sample, _), record in zip(items, records, strict=True)]

    def _failed(self, sample: Sample, error: Exception) -> Record:
        """A sample that could not be read or asked; its reference is kept where it can be, for rates of errors."""
        if isinstance(error, ModuleNotFoundError):
            raise error
        record: Record = {"failed": f"{type(error).__name__}: {error}".splitlines()[0][:300]}
        try:
            right = reference_of(self.task, sample.load(), sample.metadata)
            record["reference"] = right if isinstance(right, str | list) else None
        except Exception:
            record["reference"] = None
        return record

    def _finished(self, sample: Sample, record: Record) -> Record:
        scores = record.get("scores", {})
        wild = [name for name, value in scores.items() if not np.isfinite(np.asarray(value, np.float64)).all()]
        if wild:
            record = {"failed": f"score {wild[0]} is not finite", "reference": record.get("reference")}
        return {"key": sample.key, "digest": sample.digest, "metadata": sample.metadata, **record}
