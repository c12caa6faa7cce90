"""Real handwritten digits: 8 x 8 scans, split by sample, as pictures of one or of several digits.

In: a seed. Out: uint8 pixels [N 8 8] with labels [N] per split. The scans are the UCI "Optical recognition of handwritten
digits" test set (E. Alpaydin, C. Kaynak, 1998; CC BY 4.0) as shipped inside scikit-learn: 1,797 pictures of 17 grey levels.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from weft.benchmarks.world.splits import share

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
NUMBERS = (*WORDS, "ten", "eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen")
PER_CLASS = {"test": 40, "val": 10}
"""Scans of each class that training never sees; the rest (about 130 of each class) are the training split."""


@dataclass(frozen=True)
class Scans:
    """One split: pixels uint8 [N 8 8], labels int64 [N], index int64 [N] in scikit-learn's order."""

    pixels: np.ndarray
    labels: np.ndarray
    index: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    def of(self, digit: int) -> np.ndarray:
        """Rows of this split that show `digit`."""
        return np.flatnonzero(self.labels == digit)


def load_scans(seed: int, scale: float = 1.0) -> dict[str, Scans]:
    """train / val / test, the same number of every class in val and test; of each split its `share`."""
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("the sample world needs scikit-learn: pip install 'weft[world]'") from error
    data = load_digits()
    pixels = np.clip(np.round(data.images * (255 / 16)), 0, 255).astype(np.uint8)
    draw = np.random.default_rng([seed, 1])
    rows: dict[str, list[np.ndarray]] = {"train": [], "val": [], "test": []}
    for digit in range(10):
        order = draw.permutation(np.flatnonzero(data.target == digit))
        parts = np.split(order, [PER_CLASS["test"], PER_CLASS["test"] + PER_CLASS["val"]])
        for name, part in zip(("test", "val", "train"), parts):
            rows[name].append(part[: max(2, round(len(part) * share(name, scale)))])
    found = {}
    for name, parts in rows.items():
        index = draw.permutation(np.concatenate(parts))
        found[name] = Scans(pixels[index], data.target[index].astype(np.int64), index.astype(np.int64))
    return found


def distort(pixels: np.ndarray, draw: np.random.Generator) -> np.ndarray:
    """A plausible other scan of the same digit: a little turned, scaled, shifted and inked. uint8 [8 8] -> uint8 [8 8]."""
    from scipy.ndimage import affine_transform

    angle, slant = draw.normal(0, 0.10), draw.normal(0, 0.10)
    size = 1 + draw.normal(0, 0.06, 2)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    matrix = turn @ np.array([[1, 0], [slant, 1]]) @ np.diag(size)
    middle = np.array([3.5, 3.5])
    offset = middle - matrix @ (middle + np.clip(draw.normal(0, 0.4, 2), -0.9, 0.9))
    moved = affine_transform(pixels.astype(np.float64), matrix, offset, order=1)
    return np.clip(np.round(moved * draw.uniform(0.9, 1.1)), 0, 255).astype(np.uint8)


def side_by_side(pictures: list[np.ndarray]) -> np.ndarray:
    """Two to four digits on one wider canvas: uint8 [8 8 * n]."""
    return np.concatenate(pictures, axis=1)


def spoken(digits: list[int] | np.ndarray) -> str:
    """The digits in words: "three seven"."""
    return " ".join(WORDS[int(d)] for d in digits)
