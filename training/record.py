"""What a run writes down and shows: rows, events, speed, trackers, panel, and a summary at the end.

`metrics.jsonl` holds what the seed determines, `speed.jsonl` what the clock does. Rank 0 writes; on the others every call
is there and does nothing, so that the loop needs no branches.
"""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path
from typing import Any

from weft.model.config import ModelConfig
from weft.training.checkpoint import replace_file
from weft.training.config import RunConfig
from weft.training.data.quarantine import quarantined
from weft.training.engine import Engine
from weft.training.pace import Pace
from weft.training.panel import Panel, Silent, open_panel
from weft.training.state import Progress
from weft.training.strict import plain
from weft.training.tracking import JsonLines, Tracker, last_figures, open_trackers

log = logging.getLogger("weft.training")
SHOWN = ("lr", "grad_norm")
"""Figures on the panel besides the losses."""


class Record:
    """All sinks of one run."""

    def __init__(self, config: RunConfig, engine: Engine) -> None:
        self.config, self.folder = config, Path(config.folder)
        self.first, self.device = engine.world.first, engine.device
        self.model: ModelConfig = engine.model.config
        self.ranks = engine.world.size
        self.rows: JsonLines | None = None
        self.speed: JsonLines | None = None
        self.trackers: list[Tracker] = []
        self.panel: Panel = Silent()

    def open(self, progress: Progress, resumed: Path | None) -> dict[str, float]:
        """Open every sink; rows behind the resumed checkpoint are cut, because they will be written again.

        Returns the last figures of a run that is continued (on rank 0).
        """
        if not self.first:
            return {}
        self.folder.mkdir(parents=True, exist_ok=True)
        if resumed is None:
            (self.folder / "metrics.jsonl").unlink(missing_ok=True)
        self.rows = JsonLines(self.folder / "metrics.jsonl")
        self.rows.rewind(progress.metrics_bytes)
        self.speed = JsonLines(self.folder / "speed.jsonl")
        tracking = self.config.tracking
        at = None if resumed is None else progress.step
        self.trackers = open_trackers(tracking.trackers, self.folder, self.folder.name, at, plain(self.config))
        self.panel = open_panel(tracking.panel, tracking.plain_every_s, self.first)
        if resumed is None:
            return {}
        self.say(f"continuing from {resumed} at step {progress.step}")
        return last_figures(self.folder / "metrics.jsonl")

    def row(self, step: int, figures: dict[str, float]) -> None:
        """One row of scalars, to every sink."""
        if self.rows is not None:
            self.rows.log(step, figures)
        for tracker in self.trackers:
            tracker.log(step, {k: v for k, v in figures.items() if math.isfinite(v)})

    def event(self, step: int, text: str) -> None:
        """Something that a person should know, in the log and in `metrics.jsonl`."""
        if self.first:
            log.warning("step %d: %s", step, text)
        if self.rows is not None:
            self.rows.write({"step": step, "event": text})

    def say(self, text: str) -> None:
        """A line for the person at the terminal."""
        self.panel.say(text)

    def show(self, step: int, total: int | None, figures: dict[str, float], lost: dict[str, int], pace: Pace) -> None:
        """Redraw the panel; now and then a row of `speed.jsonl`."""
        rate, step_s = pace.tokens_per_s(), pace.step_s(step)
        speed = {"tokens/s": rate, **self._mfu(rate)}
        if self.speed is not None and (step % 20 == 0 or step < 3):
            row = {"tokens_per_s": rate, "step_s": step_s or 0.0, "elapsed_s": pace.elapsed_s(), **self._mfu(rate)}
            self.speed.log(step, row)
        shown = {k: v for k, v in figures.items() if k.startswith("loss") or k in SHOWN}
        shown |= {f"data {name}": float(n) for name, n in lost.items() if n}
        self.panel.show(step + 1, total, {**shown, **speed}, step_s and total and step_s * (total - step - 1))

    def flush(self) -> int:
        """Rows on the disk; their size in bytes."""
        return self.rows.flush() if self.rows else 0

    def summary(self, progress: Progress, metrics: dict[str, float], elapsed_s: float) -> None:
        """`summary.json`, the plots, and a sentence about lost data if there is any."""
        if not self.first:
            return
        self.flush()
        bad = quarantined(self.folder / "quarantine")
        told: dict[str, Any] = {name: getattr(progress, name) for name in ("applied", "skipped", "tokens")}
        told |= {"steps": progress.step, "elapsed_s": round(elapsed_s, 3), "data": {**progress.lost, "quarantined": len(bad)}}
        told["metrics"] = {k: v if math.isfinite(v) else None for k, v in metrics.items()}
        replace_file(self.folder / "summary.json", json.dumps(told, indent=1, sort_keys=True) + "\n")
        if any(progress.lost.values()) or bad:
            lost = ", ".join(f"{n:,} {name}" for name, n in progress.lost.items())
            self.say(f"data: {lost}; {len(bad):,} samples in quarantine" + (f" ({self.folder / 'quarantine'})" if bad else ""))
        if self.config.tracking.plots:
            from weft.training.plots import draw

            draw(self.folder)

    def close(self) -> None:
        """Flush and release every sink."""
        self.panel.close()
        for sink in (*self.trackers, self.rows, self.speed):
            if sink is not None:
                sink.close()

    def _mfu(self, rate: float) -> dict[str, float]:
        from weft.training.plan import mfu

        share = mfu(self.model, rate / self.ranks, self.device, self.config.data.length)
        return {} if share is None else {"mfu": share}
