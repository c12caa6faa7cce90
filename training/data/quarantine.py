"""Samples that could not be used: named, counted, replaced within a budget, and known to the next start.

One JSON object per line: {"draw", "sample", "reason"}. A sample is replaced from the draw at which it failed on, so
that a resumed run repeats what the interrupted one did: drawn earlier, it is tried again as it was then.
"""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from weft.training.data.shards import allowed

log = logging.getLogger(__name__)


class TooManyBadSamples(ValueError):
    """More samples failed than the budget allows; the message lists them."""


def quarantined(folder: str | Path) -> dict[str, str]:
    """sample -> reason, of all ranks and starts of a run whose quarantine is `folder`."""
    found: dict[str, str] = {}
    for line in lines(folder):
        found.setdefault(line["sample"], line["reason"])
    return found


def lines(folder: str | Path) -> Iterator[dict[str, Any]]:
    """Every whole line {"draw", "sample", "source", "reason"} of every rank."""
    for path in sorted(Path(folder).glob("quarantine-*.jsonl")):
        for text in path.read_text(encoding="utf-8").splitlines():
            try:
                item = json.loads(text)
                yield {"draw": int(item["draw"]), **{name: str(item[name]) for name in ("sample", "source", "reason")}}
            except (ValueError, KeyError, TypeError):  # the last line of a process that was killed
                log.warning("%s holds a line that cannot be read; it is left out", path)


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
        self._folder = None if folder is None else Path(folder)
        self._path = None if folder is None else Path(folder) / f"quarantine-{rank}.jsonl"
        if folder is not None:
            Path(folder).mkdir(parents=True, exist_ok=True)
            for line in lines(folder):
                sample, draw = line["sample"], line["draw"]
                if line["source"] in self.sizes and (sample not in self.bad or draw < self.bad[sample][0]):
                    self.bad[sample], self._of[sample] = (draw, line["reason"]), line["source"]

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
                        file.write(("" if _whole(self._path) else "\n") + json.dumps(line) + "\n")
            self._check(source)

    def _check(self, source: str) -> None:
        """The budget is the source's, so what the other ranks have written since counts too; only their draws do not."""
        mine = {s: self.bad[s][1] for s, of in self._of.items() if of == source}
        if self._folder is not None:
            mine |= {line["sample"]: line["reason"] for line in lines(self._folder) if line["source"] == source}
        if len(mine) > (most := allowed(self.budget, self.sizes[source])):
            listed = "; ".join(f"{s} ({reason})" for s, reason in list(mine.items())[:10])
            raise TooManyBadSamples(
                f"{len(mine)} samples of source {source!r} cannot be used, the budget of {self.budget:.2%} allows {most} of "
                f"{self.sizes[source]}: {listed}; repair the shards or raise data.bad_budget"
            )


def _whole(path: Path) -> bool:
    """Whether a file ends with a line, or is not there: a killed process may have left half of one."""
    try:
        return path.read_bytes()[-1:] in (b"", b"\n")
    except FileNotFoundError:
        return True
