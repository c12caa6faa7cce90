"""Specialist of completion: name the digit from its upper half, answer with the mean lower half of that class.

In: the folder of a built world. Out: (mean absolute pixel error in [0, 1], test documents).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from weft.benchmarks.world import material


def halves(root: Path, split: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Upper and lower halves [N 32] in [0, 1] and labels [N]."""
    rows = material.lines(root, "half", split)
    parts = [np.stack([material.pixels(root, material.segment(r, "image", k)).reshape(-1) / 255 for r in rows]) for k in (0, 1)]
    return parts[0], parts[1], np.array([material.label(r) for r in rows])


def completions(root: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Test pictures completed by the class mean [N 64], true lower halves [N 32], guessed ones [N 32], labels [N]."""
    from sklearn.svm import SVC

    top, bottom, labels = halves(root, "train")
    namer = SVC(C=10.0).fit(top, labels)
    means = {digit: bottom[labels == digit].mean(axis=0) for digit in np.unique(labels)}
    top, bottom, labels = halves(root, "test")
    guess = np.stack([means[digit] for digit in namer.predict(top)])
    return np.concatenate([top, guess], axis=1), bottom, guess, labels


def class_means(root: Path) -> tuple[float, int]:
    """Pixel error of the class mean."""
    _, bottom, guess, labels = completions(root)
    return float(np.abs(guess - bottom).mean()), len(labels)
