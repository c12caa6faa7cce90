"""Stages of a long command as a person sees them: a live list on a terminal, plain lines elsewhere.

In: (stage, fraction done, a word). Out: which stage runs, how far it is, how long the rest takes. The estimate starts from
what each stage is expected to take and follows what is measured.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any

EVERY_S = 10.0
"""Between two plain lines of one stage."""


def clock(seconds: float) -> str:
    """1:02:03 or 2:03."""
    minutes, s = divmod(max(0, round(seconds)), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02d}:{s:02d}" if hours else f"{m}:{s:02d}"


class Stages:
    """Where the work stands; call it as `Progress`, use it as a context."""

    def __init__(self, expected_s: Mapping[str, float], now: Any = time.monotonic) -> None:
        self.expected_s, self.now = dict(expected_s), now
        self.done: dict[str, float] = dict.fromkeys(expected_s, 0.0)
        self.begun: dict[str, float] = {}
        self.took: dict[str, float] = {}
        self.notes: dict[str, str] = {}
        self.start = now()

    def __call__(self, stage: str, fraction: float, note: str = "") -> None:
        """A stage is `fraction` done, busy with `note`."""
        self.expected_s.setdefault(stage, 1.0)
        self.begun.setdefault(stage, self.now())
        self.done[stage] = min(max(fraction, 0.0), 1.0)
        self.notes[stage] = note
        if fraction < 1.0:
            self.took.pop(stage, None)  # done before, but asked to do it again
        if fraction >= 1.0 and stage not in self.took and not self._inner(stage, note):
            self.took[stage] = self.now() - self.begun[stage]
        self.show(stage)

    def _inner(self, stage: str, note: str) -> bool:
        """A part of a stage says that it is done; the stage itself says so with its seconds."""
        return note == "done"

    def left_s(self) -> float:
        """Seconds until the end, as far as can be known."""
        return sum(self._left(stage) for stage in self.expected_s)

    def _left(self, stage: str) -> float:
        if stage in self.took:
            return 0.0
        expected, done = self.expected_s[stage], self.done.get(stage, 0.0)
        if stage not in self.begun:
            return expected
        spent = self.now() - self.begun[stage]
        if done < 0.02:
            return max(expected - spent, 0.1 * expected)
        measured = spent * (1 - done) / done
        return done * measured + (1 - done) * max(expected - spent, 0.0)  # trust what is measured as it grows

    def show(self, stage: str) -> None:
        """Tell the person."""
        raise NotImplementedError

    def __enter__(self) -> Stages:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        return None


class Plain(Stages):
    """A line when a stage begins or ends, and one every EVERY_S seconds in between, also while the stage is silent."""

    def __init__(self, expected_s: Mapping[str, float], now: Any = time.monotonic) -> None:
        super().__init__(expected_s, now)
        self.last: tuple[str, float] = ("", float("-inf"))
        self._over = threading.Event()
        self._lock = threading.Lock()

    def show(self, stage: str) -> None:
        """Print at most now and then."""
        with self._lock:
            if stage == self.last[0] and stage not in self.took and self.now() - self.last[1] < EVERY_S:
                return
            self.last = (stage, self.now())
            self._line(stage)

    def _line(self, stage: str) -> None:
        note = f"  {self.notes[stage]}" if self.notes[stage] else ""
        spent, left = clock(self.now() - self.start), clock(self.left_s())
        print(f"{spent:>7}  {stage:<12} {100 * self.done[stage]:3.0f} %  about {left} left{note}", flush=True)

    def beat(self) -> None:
        """Print the running stage again if nothing was printed for a while."""
        stage = self.last[0]
        if stage and stage not in self.took:
            self.show(stage)

    def _beats(self) -> None:
        while not self._over.wait(EVERY_S / 2):
            self.beat()

    def __enter__(self) -> Plain:
        threading.Thread(target=self._beats, name="progress", daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._over.set()


class Live(Stages):
    """All stages at once, redrawn in place."""

    def __init__(self, expected_s: Mapping[str, float], title: str) -> None:
        super().__init__(expected_s)
        from rich.live import Live as RichLive

        self.title = title
        self._live = RichLive(get_renderable=self.render, refresh_per_second=2, transient=False)

    def show(self, stage: str) -> None:
        """The clock of the live view redraws."""

    def render(self) -> Any:
        """The list of stages, the current one with its bar and its word."""
        from rich.console import Group
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        grid = Table.grid(padding=(0, 2))
        for name in self.expected_s:
            running = name in self.begun and name not in self.took
            mark = Text("+", "green") if name in self.took else Text(">", "bold yellow") if running else Text(".", "dim")
            bar = ProgressBar(total=1.0, completed=self.done[name], width=30) if running else Text("")
            spent = self.took.get(name, self.now() - self.begun[name] if running else None)
            when = clock(spent) if spent is not None else f"about {clock(self.expected_s[name])}"
            note = self.notes.get(name, "") if running else "done before" if self.notes.get(name) == "done before" else ""
            grid.add_row(
                mark, Text(name, "bold" if running else ""), bar, Text(when, "" if running else "dim"), Text(note, "dim")
            )
        foot = Text(f"{clock(self.now() - self.start)} gone, about {clock(self.left_s())} left", "bold")
        return Group(Text(self.title, "bold"), grid, foot)

    def __enter__(self) -> Live:
        self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._live.stop()


def watch(expected_s: Mapping[str, float], title: str) -> Stages:
    """Live on a terminal, plain lines elsewhere."""
    from rich.console import Console

    return Live(expected_s, title) if Console().is_terminal else Plain(expected_s)
