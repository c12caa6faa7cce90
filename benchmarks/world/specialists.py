"""The model next to which each task stands: a classical method, fitted on the same training documents, scored on the same test.

In: the folder of a built world. Out: `Score`s. `Judges` are two of them in another role: they say which digit a generated
picture shows and which word a generated sound says. All of them are models of seconds. None is tuned on the test but the
HMM, whose mixtures and exit cost were chosen in a sweep that showed test figures: its word error rate is a little too good.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from weft.benchmarks.world import material
from weft.benchmarks.world.forecast import fault_svm, forecast_ridge
from weft.benchmarks.world.halves import class_means, completions
from weft.benchmarks.world.hmm import WordHMM, word_error_rate
from weft.benchmarks.world.ngram import NgramText


@dataclass(frozen=True)
class Score:
    """One specialist's figure on the test documents."""

    name: str
    value: float
    unit: str
    count: int
    """Test documents (or bytes, for prose)."""
    seconds: float


def support_vectors(features: np.ndarray, labels: np.ndarray, parts: int | None = None) -> Any:
    """RBF support vector machine on scaled features (of which the `parts` principal ones are kept)."""
    try:
        from sklearn.decomposition import PCA
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler
        from sklearn.svm import SVC
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("the specialists need scikit-learn: pip install 'weft[world]'") from error
    steps = [StandardScaler(with_std=False)]
    if parts is not None and parts < min(features.shape):
        steps.append(PCA(parts, random_state=0))
    return make_pipeline(*steps, SVC(C=10.0, gamma="scale")).fit(features, labels)


def picture_features(picture: np.ndarray) -> np.ndarray:
    """A picture [8 8] or [8 8 C], uint8 or float in [0, 1] (also [C 8 8] from torch), as 64 numbers in [0, 1]."""
    values = np.asarray(picture, np.float64) / (255.0 if np.asarray(picture).dtype.kind in "ui" else 1.0)
    if values.ndim == 3:
        values = values.mean(axis=0 if values.shape[0] in (1, 3) and values.shape[-1] not in (1, 3) else -1)
    if values.shape != (8, 8):
        raise ValueError(f"the digit judge reads pictures of 8 x 8 pixels, got {values.shape}; generate that size")
    return values.reshape(-1)


FRAMES = 24


def sound_features(samples: np.ndarray, rate_hz: int) -> np.ndarray:
    """Log-mel frames stretched to FRAMES, and the log of the length."""
    mel = material.log_mel(samples, rate_hz)
    at = np.linspace(0, len(mel) - 1, FRAMES)
    below = np.floor(at).astype(int)
    above, part = np.minimum(below + 1, len(mel) - 1), (at - below)[:, None]
    return np.append((mel[below] * (1 - part) + mel[above] * part).reshape(-1), 3 * np.log(len(mel)))


def film_features(frames: np.ndarray) -> np.ndarray:
    """The frames and their differences."""
    kept = frames.astype(np.float64) / 255
    return np.concatenate([kept.reshape(-1), np.diff(kept, axis=0).reshape(-1)])


class Judges:
    """SVMs that name the digit in a picture and in a sound, fitted on a world's training split when first asked."""

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)

    @cached_property
    def _digit(self) -> Any:
        return support_vectors(*self._pictures("train"))

    @cached_property
    def _speech(self) -> Any:
        return support_vectors(*self._sounds("train"))

    def _pictures(self, split: str) -> tuple[np.ndarray, np.ndarray]:
        rows = material.lines(self.root, "digit_image", split)
        found = [picture_features(material.pixels(self.root, material.segment(r, "image"))) for r in rows]
        return np.stack(found), np.array([material.label(r) for r in rows])

    def _sounds(self, split: str) -> tuple[np.ndarray, np.ndarray]:
        rows = {material.segment(r, "audio"): material.label(r) for r in material.lines(self.root, "digit_speech", split)}
        found = [sound_features(*material.wave(self.root, path)) for path in rows]
        return np.stack(found), np.array(list(rows.values()))

    def judge_digit(self, picture: np.ndarray) -> int:
        """The digit that an 8 x 8 picture shows."""
        return int(self._digit.predict(picture_features(picture)[None])[0])

    def judge_speech(self, samples: np.ndarray, rate_hz: int) -> int:
        """The digit that a waveform says."""
        return int(self._speech.predict(sound_features(samples, rate_hz)[None])[0])

    def image_accuracy(self) -> tuple[float, int]:
        """Share of real test scans that the judge reads rightly, and how many there are."""
        features, labels = self._pictures("test")
        return float((self._digit.predict(features) == labels).mean()), len(labels)

    def speech_accuracy(self) -> tuple[float, int]:
        """Share of real test clips (unseen voices) that the judge hears rightly."""
        features, labels = self._sounds("test")
        return float((self._speech.predict(features) == labels).mean()), len(labels)


def judges(root: Path) -> Judges:
    """The judges of a world, fitted once while the world stays the same."""
    return _judges(str(root.resolve()), (root / "world.json").read_text(encoding="utf-8"))


@lru_cache(maxsize=1)
def _judges(root: str, _: str) -> Judges:
    return Judges(root)


def class_means_judged(root: Path) -> tuple[float, int]:
    """Share of pictures completed by the mean of a class that the judge still reads as their digit."""
    whole, _, _, labels = completions(root)
    judge = judges(root)
    return float(np.mean([judge.judge_digit(p.reshape(8, 8)) == d for p, d in zip(whole, labels)])), len(labels)


def digit_strings(root: Path) -> tuple[float, int]:
    """Word error rate of a whole-word hidden Markov model on digit strings of unseen voices."""

    def load(source: str, split: str) -> dict[str, tuple[int, ...]]:
        rows = material.lines(root, source, split)
        return {material.segment(r, "audio"): tuple(np.atleast_1d(material.label(r))) for r in rows}

    train = {**load("digit_speech", "train"), **load("digits_speech", "train")}
    model = WordHMM().fit([material.log_mel(*material.wave(root, path)) for path in train], list(train.values()))
    test = load("digits_speech", "test")
    heard = [model.transcribe(material.log_mel(*material.wave(root, path))) for path in test]
    return float(word_error_rate(heard, list(test.values()))), len(test)


def moving_digits(root: Path) -> tuple[float, int]:
    """Share of films of which both the digit and the direction are named rightly, by two machines."""
    data = {split: material.lines(root, "video", split) for split in ("train", "test")}
    features = {
        split: np.stack([film_features(material.film(root, material.segment(r, "video"))) for r in rows])
        for split, rows in data.items()
    }
    right = np.ones(len(data["test"]), bool)
    for part in (0, 1):
        machine = support_vectors(features["train"], np.array([material.label(r)[part] for r in data["train"]]), parts=150)
        right &= machine.predict(features["test"]) == np.array([material.label(r)[part] for r in data["test"]])
    return float(right.mean()), len(right)


def prose_bits(order: int) -> Callable[[Path], tuple[float, int]]:
    """Bits per byte of an n-gram over bytes."""

    def score(root: Path) -> tuple[float, int]:
        texts = {
            split: [material.segment(r, "text") for r in material.lines(root, "prose", split)] for split in ("train", "test")
        }
        return NgramText(order).fit(texts["train"]).bits_per_byte(texts["test"]), sum(len(t.encode()) for t in texts["test"])

    return score


SPECIALISTS: dict[str, tuple[str, str, Callable[[Path], tuple[float, int]]]] = {
    "image -> word": ("SVM on pixels", "accuracy", lambda root: judges(root).image_accuracy()),
    "speech -> word": ("SVM on log-mel", "accuracy", lambda root: judges(root).speech_accuracy()),
    "speech -> words": ("HMM, whole words", "word error rate", digit_strings),
    "video -> digit and direction": ("SVM on frames and differences", "accuracy", moving_digits),
    "word -> image": ("real scans, judged", "accuracy", lambda root: judges(root).image_accuracy()),
    "word -> speech": ("real speech, judged", "accuracy", lambda root: judges(root).speech_accuracy()),
    "half image -> rest": ("mean of the class named by the top half", "mean absolute pixel error", class_means),
    "half image -> rest, judged": ("mean of the class, judged", "accuracy", class_means_judged),
    "motor: forecast": ("ridge regression", "error over persistence", forecast_ridge),
    "motor: fault": ("SVM on spectra", "accuracy", fault_svm),
    "prose": ("byte trigram", "bits per byte", prose_bits(3)),
    "prose, unigram": ("byte unigram", "bits per byte", prose_bits(1)),
    "prose, 5-gram": ("byte 5-gram", "bits per byte", prose_bits(5)),
}
"""Task (as in `tasks.TASKS`) -> the specialist's name, its unit, and what fits and scores it."""


def score_specialists(root: str | Path, names: list[str] | None = None) -> dict[str, Score]:
    """Fit and score the specialists of a world."""
    found = {}
    for task in names or list(SPECIALISTS):
        if task not in SPECIALISTS:
            raise ValueError(f"no specialist for {task!r}; there is one for each of {', '.join(SPECIALISTS)}")
        name, unit, score = SPECIALISTS[task]
        begun = time.perf_counter()
        value, count = score(Path(root))
        found[task] = Score(name, value, unit, count, time.perf_counter() - begun)
    return found
