"""How long a run is: a number of steps that is given, or one that a time budget decides once and writes down.

A time budget cannot be repeated exactly, but its decisions can: each (from step, total steps) is written durably to
`horizon.json` before it takes effect, so a run that was killed replays the same learning rates and ends at the same
step. The first decision comes after a few measured steps; at a quarter, half and three quarters it is corrected if the
machine became slower or faster, so that the decay always ends within the budget.
"""

from __future__ import annotations

import json
from pathlib import Path

from weft.training.checkpoint import read_json, replace_file

MEASURE = (4, 12)
"""Steps between which the first decision is measured; earlier ones warm caches up."""
RESERVE = 0.03
"""Share of the budget kept for the last save and for noise."""


class Horizon:
    """Total steps as a function of the step."""

    def __init__(self, path: Path, max_steps: int | None, max_seconds: float | None) -> None:
        self.path = path
        self.max_steps = max_steps
        self.max_seconds = max_seconds
        self.decisions: list[tuple[int, int]] = []
        if max_seconds is not None and path.exists():
            self.decisions = [(int(start), int(total)) for start, total in read_json(path)["decisions"]]

    def total(self, step: int) -> int | None:
        """Steps of the whole run as known at `step`; None while a time budget is still being measured."""
        if self.max_seconds is None:
            return self.max_steps
        known = [total for start, total in self.decisions if start <= step]
        return known[-1] if known else None

    def decide(self, step: int, elapsed_s: float, measured_s: float | None) -> int | None:
        """A new total that should hold from `step` on, or None. measured_s: seconds per step in the measuring window."""
        if self.max_seconds is None or any(start >= step for start, _ in self.decisions):
            return None  # already decided by the run that this one replays
        total = self.total(step)
        if total is None:
            return self._fit(step, elapsed_s, measured_s) if measured_s and step >= MEASURE[1] else None
        if step not in {total * quarter // 4 for quarter in (1, 2, 3)}:
            return None
        fitted = self._fit(step, elapsed_s, measured_s)
        return fitted if fitted is not None and abs(fitted - total) > 0.03 * total else None

    def _fit(self, step: int, elapsed_s: float, step_s: float | None) -> int | None:
        if not step_s or self.max_seconds is None:
            return None
        left = max(0.0, self.max_seconds * (1 - RESERVE) - elapsed_s)
        fitted = step + max(1, int(left / step_s))
        return fitted if self.max_steps is None else min(fitted, self.max_steps)

    def record(self, step: int, total: int, write: bool) -> None:
        """Make a decision last."""
        self.decisions.append((step, total))
        if write:
            replace_file(self.path, json.dumps({"decisions": self.decisions}) + "\n")

    def forget(self, write: bool) -> None:
        """The run starts anew: no earlier decision holds."""
        self.decisions.clear()
        if write:
            self.path.unlink(missing_ok=True)

    def over_time(self, elapsed_s: float) -> bool:
        """Whether the budget is spent, whatever the plan said."""
        return self.max_seconds is not None and elapsed_s > self.max_seconds
