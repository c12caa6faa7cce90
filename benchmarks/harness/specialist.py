"""A scikit-learn specialist with the methods of a generalist that its tasks need: a rival, a baseline, and a judge.

In: training documents of one task. Out: words for new prompts. An RBF support vector machine on plain features
(`signals.EXTRACTOR`), with C and gamma as they come, one per task; nothing is tuned on the test.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from weft.benchmarks.harness.questions import observed, prompt_of, reference_of
from weft.benchmarks.harness.samples import Sample
from weft.benchmarks.harness.signals import features
from weft.benchmarks.harness.task import Task
from weft.tokenizers.segment import Document, Segment, Text


@dataclass(frozen=True)
class Named:
    """A choice, as `Generalist.predict` gives it."""

    best: str
    best_normalized: str
    probabilities: np.ndarray
    logprobs: np.ndarray


@dataclass(frozen=True)
class Written:
    """A reply, as `Generalist.generate` gives it."""

    text: str


class Specialist:
    """One machine per task; `learn` before asking."""

    digest = "scikit-learn"

    def __init__(self, machine: str = "svm") -> None:
        if machine not in ("svm", "nearest"):
            raise ValueError(f"no specialist {machine!r}; there are svm and nearest")
        self.machine = machine
        self._fitted: Any = None

    def unable(self, task: Task) -> str | None:
        """Why a task is not for a specialist, or None."""
        if task.answer not in ("text", "choices"):
            return f"a specialist names classes, task {task.name!r} asks for {task.answer}"
        if not task.data.train:
            return f"task {task.name!r} names no training documents (data.train)"
        return None

    def learn(self, task: Task, pool: Sequence[Sample]) -> None:
        """Fit on the training documents of a task."""
        rows, names = [], []
        for sample in pool:
            document = sample.load()
            right = reference_of(task, document, sample.metadata)
            rows.append(prompt_of(task.prompt, observed(document), sample.metadata))
            names.append(right[0] if isinstance(right, list) else str(right))
        self.fit(rows, names)

    def fit(self, prompts: Sequence[Sequence[Segment]], names: Sequence[str]) -> Specialist:
        """Fit on prompts and what they are called."""
        try:
            from sklearn.decomposition import PCA
            from sklearn.neighbors import KNeighborsClassifier
            from sklearn.pipeline import make_pipeline
            from sklearn.preprocessing import StandardScaler
            from sklearn.svm import SVC
        except ModuleNotFoundError:
            raise ModuleNotFoundError("specialists need scikit-learn; pip install 'weft[world]'") from None
        table, classes = _table(prompts), sorted(set(names))
        if len(classes) < 2:
            self._fitted = classes[0]
            return self
        steps: list[Any] = [StandardScaler(with_std=False)]
        if table.shape[1] > 150 < len(table):
            steps.append(PCA(150, random_state=0))
        last = SVC(C=10.0, gamma="scale") if self.machine == "svm" else KNeighborsClassifier(1)
        self._fitted = make_pipeline(*steps, last).fit(table, np.array(names))
        return self

    def name(self, prompts: Sequence[Sequence[Segment]]) -> list[str]:
        """The class of each prompt."""
        if self._fitted is None:
            raise ValueError("this specialist has learnt nothing; call learn or fit first")
        if isinstance(self._fitted, str):
            return [self._fitted] * len(prompts)
        return [str(name) for name in self._fitted.predict(_table(prompts))]

    def predict(self, prompts: Sequence[Sequence[Segment]], *, choices: Sequence[str]) -> list[Named]:
        """Its class among the choices, with certainty: a support vector machine gives no probabilities."""
        out = []
        for name in self.name(prompts):
            hot = np.array([float(c == name) for c in choices])
            logprobs = np.where(hot > 0, 0.0, -30.0)
            out.append(Named(name, name, hot, logprobs))
        return out

    def generate(self, prompts: Sequence[Sequence[Segment]], produce: str = "text", **options: Any) -> list[Written]:
        """Its class as the whole answer."""
        return [Written(name) for name in self.name(prompts)]


def _table(prompts: Sequence[Sequence[Segment]]) -> np.ndarray:
    """float64 [n F]: features of all segments of a prompt; words alone count where there are no media."""
    rows = []
    for prompt in prompts:
        media = [s for s in prompt if not isinstance(s, Text)] or list(prompt)
        rows.append(np.concatenate([features(s) for s in media]))
    width = max(map(len, rows))
    return np.stack([np.pad(row, (0, width - len(row))) for row in rows])


def judge_from(samples: Sequence[Sample]) -> Specialist:
    """A judge of generated media: trained on real documents that hold one medium and its name as target text."""
    rows, names = [], []
    for sample in samples:
        document: Document = sample.load()
        media = [s for s in observed(document) if not isinstance(s, Text)]
        words = [s.text for s in document.segments if s.role == "target" and isinstance(s, Text)]
        if media and words:
            rows.append(media[:1])
            names.append(words[0])
    if not rows:
        raise ValueError(
            "the judge's documents hold no medium with a target text; name a manifest such as digit_image.train.jsonl"
        )
    return Specialist().fit(rows, names)
