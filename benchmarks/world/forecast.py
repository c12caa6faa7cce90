"""Specialists of the motor: ridge regression over the past readings, and a support vector machine over spectra.

In: the folder of a built world. Out: (figure, test documents).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from weft.benchmarks.world import material


def histories(root: Path, split: str) -> tuple[np.ndarray, np.ndarray]:
    """The current's past [N context] and future [N ahead] in amperes."""
    rows = material.lines(root, "motor_forecast", split)
    past = np.array([material.segment(r, "sensor", 0) for r in rows])[..., 0]
    return past, np.array([material.segment(r, "sensor", 1) for r in rows])[..., 0]


def over_persistence(guess: np.ndarray, past: np.ndarray, future: np.ndarray) -> float:
    """Mean absolute error of `guess` [N ahead] over that of repeating the last reading (persistence)."""
    return float(np.abs(guess - future).mean() / np.abs(past[:, -1:] - future).mean())


def forecast_ridge(root: Path) -> tuple[float, int]:
    """Linear in the past readings."""
    from sklearn.linear_model import Ridge
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    past, future = histories(root, "train")
    model = make_pipeline(StandardScaler(), Ridge(alpha=1.0)).fit(past, future)
    past, future = histories(root, "test")
    return over_persistence(model.predict(past), past, future), len(past)


def spectra(root: Path, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Magnitude spectra of current and vibration, their spread and crest, the mean temperature; and the fault's name."""
    rows = material.lines(root, "motor_fault", split)
    found = []
    for row in rows:
        current, vibration, temperature = (np.array(material.segment(row, "sensor", k))[:, 0] for k in range(3))
        parts = [np.abs(np.fft.rfft(current)), np.abs(np.fft.rfft(vibration))]
        crest = [np.abs(v).max() / v.std() for v in (current, vibration)]
        found.append(np.concatenate([*parts, [current.std(), vibration.std(), *crest, temperature.mean()]]))
    return np.array(found), np.array([material.label(r) for r in rows])


def fault_svm(root: Path) -> tuple[float, int]:
    """Accuracy of an RBF support vector machine on standardised spectra."""
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler
    from sklearn.svm import SVC

    model = make_pipeline(StandardScaler(), SVC(C=10.0)).fit(*spectra(root, "train"))
    features, labels = spectra(root, "test")
    return float((model.predict(features) == labels).mean()), len(labels)
