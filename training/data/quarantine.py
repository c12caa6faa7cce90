"""Samples that could not be used: named, counted, replaced within a budget, and known to the next start.

One JSON object per line: {"draw", "sample", "reason"}. A sample is replaced from the draw at which it failed on, so
that a resumed run repeats what the interrupted one did: drawn earlier, it is tried again as it was then.
"""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Mapping
from pathlib import Path

from weft.training.data.shards import allowed

log = logging.getLogger(__name__)


class TooManyBadSamples(ValueError):
    """More samples failed than the budget allows; the message lists them."""


def quarantined(folder: str | Path) -> dict[str, str]:
    """sample -> reason, of all ranks and starts of a run whose quarantine is `folder`."""
    found: dict[str, str] = {}
    for path in sorted(Path(folder).glob("quarantine-*.jsonl")):
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                item = json.loads(line)
                found.setdefault(str(item["sample"]), str(item["reason"]))
            except (ValueError, KeyError, TypeError):  # the last line of a process that was killed
                continue
    return found


class Quarantine:
    """The bad samples of one rank; starts with what every rank wrote into `folder` before."""

    def __init__(
        self, sizes: Mapping[str, int], budget: float = 0.001, folder: str | Path | None = None, rank: int = 0
    ) -> None:
        self.sizes, self.budget = dict(sizes), budget
        self.bad: dict[str, tuple[int, str]] = {}
        """sample -> (first draw, reason)."""
        self._of: dict[str, str] = {}
        self._lock = threading.Lock()
        self._path = None if folder is None else Path(folder) / f"quarantine-{rank}.jsonl"
        if folder is not None:
            Path(folder).mkdir(parents=True, exist_ok=True)
            for path in sorted(Path(folder).glob("quarantine-*.jsonl")):
                self._read(path)

    def holds(self, sample: str, draw: int) -> bool:
        """Whether `sample` is known to be bad at this draw."""
        found = self.bad.get(sample)
        return found is not None and draw >= found[0]

    def add(self, source: str, sample: str, draw: int, reason: str) -> None:
        """Note a bad sample. Raises `TooManyBadSamples` where its source has more than the budget allows."""
        with self._lock:
            known = self.bad.get(sample)
            if known is None or draw < known[0]:
                self.bad[sample] = (draw, reason)
                self._of[sample] = source
                log.warning("sample %s is replaced from now on: %s", sample, reason)
                if self._path is not None:
                    line = {"draw": draw, "sample": sample, "source": source, "reason": reason}
                    with open(self._path, "a", encoding="utf-8") as file:
                        file.write(json.dumps(line) + "\n")
            self._check(source)

    def _check(self, source: str) -> None:
        mine = [s for s, of in self._of.items() if of == source]
        if len(mine) > (most := allowed(self.budget, self.sizes[source])):
            listed = "; ".join(f"{s} ({self.bad[s][1]})" for s in mine[:10])
            raise TooManyBadSamples(
                f"{len(mine)} samples of source {source!r} cannot be used, the budget of {self.budget:.2%} allows {most} of "
                f"{self.sizes[source]}: {listed}; repair the shards or raise data.bad_budget"
            )

    def _read(self, path: Path) -> None:
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                item = json.loads(line)
                sample, draw = str(item["sample"]), int(item["draw"])
                if item["source"] in self.sizes and (sample not in self.bad or draw < self.bad[sample][0]):
                    self.bad[sample] = (draw, str(item["reason"]))
                    self._of[sample] = str(item["source"])
            except (ValueError, KeyError, TypeError):  # the last line of a process that was killed
                log.warning("%s holds a line that cannot be read; it is left out", path)
