"""What a person sees while a run is under way: a live panel on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from typing import Any, Literal, Protocol


class Panel(Protocol):
    """Shows figures."""

    def show(self, step: int, total: int | None, figures: dict[str, float], eta_s: float | None) -> None: ...

    def say(self, text: str) -> None: ...

    def close(self) -> None: ...


class Silent:
    """Shows nothing: ranks other than the first."""

    def show(self, step: int, total: int | None, figures: dict[str, float], eta_s: float | None) -> None:
        """Nothing."""

    def say(self, text: str) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""


class Plain:
    """One line at most every `every_s` seconds; the first and the last step always."""

    def __init__(self, every_s: float) -> None:
        self.every_s = every_s
        self._last = float("-inf")
        self._pending: str | None = None

    def show(self, step: int, total: int | None, figures: dict[str, float], eta_s: float | None) -> None:
        """One line of the figures."""
        self._pending = f"step {step}/{total or '?'}  " + "  ".join(words(figures)) + f"  eta {clock(eta_s)}"
        if time.monotonic() - self._last >= self.every_s:
            self._flush()

    def _flush(self) -> None:
        if self._pending is not None:
            print(self._pending, flush=True)
            self._pending, self._last = None, time.monotonic()

    def say(self, text: str) -> None:
        """A line of its own."""
        print(text, flush=True)

    def close(self) -> None:
        """The last line."""
        self._flush()


class Live:
    """A table that is redrawn in place."""

    def __init__(self) -> None:
        from rich.live import Live as RichLive

        self._live = RichLive(refresh_per_second=4, transient=False)
        self._live.start()

    def show(self, step: int, total: int | None, figures: dict[str, float], eta_s: float | None) -> None:
        """Redraw."""
        from rich.panel import Panel as Box
        from rich.progress_bar import ProgressBar
        from rich.table import Table

        table = Table.grid(padding=(0, 2))
        table.add_row(
            "step", f"{step} / {total or '?'}", ProgressBar(total=total or 1, completed=step if total else 0, width=40)
        )
        for name, value in figures.items():
            table.add_row(name, number(value), "")
        table.add_row("time left", clock(eta_s), "")
        self._live.update(Box(table, title="weft train", width=88))

    def say(self, text: str) -> None:
        """A line above the panel."""
        self._live.console.print(text)

    def close(self) -> None:
        """Leave the last state on the screen."""
        self._live.stop()


def open_panel(kind: Literal["auto", "live", "plain", "none"], every_s: float, first: bool) -> Panel:
    """The panel for this process."""
    if kind == "none" or not first:
        return Silent()
    if kind == "live" or (kind == "auto" and sys.stdout.isatty()):
        return Live()
    return Plain(every_s)


def words(figures: dict[str, Any]) -> list[str]:
    """`name value` pairs."""
    return [f"{name} {number(value)}" for name, value in figures.items()]


def number(value: float) -> str:
    """Short, but never wrong by more than half a percent."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def clock(seconds: float | None) -> str:
    """1:02:03."""
    if seconds is None:
        return "?"
    minutes, s = divmod(int(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02d}:{s:02d}" if hours else f"{m}:{s:02d}"
