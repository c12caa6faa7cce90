"""How fast a run goes: time since its first start, seconds per step, tokens per second of the last minute."""

from __future__ import annotations

import time

from weft.training.horizon import MEASURE

WINDOW_S = 60.0
LEAST = 16
"""Steps that are remembered however long they took."""


class Pace:
    """Fed with (step, tokens so far) after every step."""

    def __init__(self) -> None:
        self._began = time.monotonic()
        self._marks: list[tuple[int, float, int]] = []  # (step, time, tokens)

    def resume(self, elapsed_s: float) -> None:
        """Count the seconds that earlier starts of the run took."""
        self._began = time.monotonic() - elapsed_s

    def elapsed_s(self) -> float:
        """Seconds of the run, over all its starts."""
        return time.monotonic() - self._began

    def mark(self, step: int, tokens: int) -> None:
        """A step is done."""
        now = time.monotonic()
        self._marks.append((step, now, tokens))
        while len(self._marks) > LEAST and now - self._marks[0][1] > WINDOW_S:
            self._marks.pop(0)

    def step_s(self, step: int) -> float | None:
        """Seconds per step over the remembered steps; None until enough of them were taken."""
        marks = [mark for mark in self._marks if mark[0] >= min(MEASURE[0], step)]
        if len(marks) < 2 or marks[-1][0] == marks[0][0]:
            return None
        return (marks[-1][1] - marks[0][1]) / (marks[-1][0] - marks[0][0])

    def tokens_per_s(self) -> float:
        """Over the remembered steps; 0 before the second."""
        if len(self._marks) < 2:
            return 0.0
        first, last = self._marks[0], self._marks[-1]
        return (last[2] - first[2]) / max(1e-9, last[1] - first[1])
