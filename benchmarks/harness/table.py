"""Results in the terminal: one table with a column per model, and a progress bar per variant."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from weft.benchmarks.harness.ask import Progress


@contextmanager
def progress(console: Any, label: str) -> Iterator[Progress]:
    """A callback that draws a bar; plain lines where the output is no terminal."""
    if not console.is_terminal:
        said: set[str] = set()

        def line(what: str, done: int, total: int) -> None:
            if done == total and what not in said:
                said.add(what)
                console.print(f"{label}: {what}, {total} samples")

        yield line
        return
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Bars(*columns, console=console, transient=True) as bars:
        bar = bars.add_task(label)

        def tick(what: str, done: int, total: int) -> None:
            bars.update(bar, description=f"{label}: {what}", completed=done, total=total)

        yield tick


def figure(about: Mapping[str, Any]) -> str:
    """`0.912 [0.88, 0.94]`, `-` where nothing was measured."""
    if about.get("value") is None:
        return "-"
    mark = f" ({about['left_out']} left out)" if about.get("left_out") else ""
    if "low" not in about:
        return f"{about['value']:.3f}{mark}"
    return f"{about['value']:.3f} [{about['low']:.3f}, {about['high']:.3f}]{mark}"


def rows(results: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, str, dict[str, str]]]:
    """(task, metric, label -> figure) for every metric of every task, baselines as labels of their own."""
    out: list[tuple[str, str, dict[str, str]]] = []
    tasks = list(dict.fromkeys(name for found in results.values() for name in found["tasks"]))
    for task in tasks:
        metrics = dict.fromkeys(m for found in results.values() for m in found["tasks"].get(task, {}).get("metrics", {}))
        for metric in metrics or {"": None}:
            cells: dict[str, str] = {}
            for label, found in results.items():
                about = found["tasks"].get(task, {})
                cells[label] = "not for it" if about.get("not_applicable") else figure(about.get("metrics", {}).get(metric, {}))
                for base, known in about.get("baselines", {}).items():
                    if metric in known["metrics"]:
                        cells.setdefault(base, figure(known["metrics"][metric]).split(" [")[0])
            out.append((task, metric, cells))
    return out


def show(console: Any, results: Mapping[str, Mapping[str, Any]]) -> None:
    """Print the table, and below it what is broken by removal, corruption and slices."""
    listed = rows(results)
    columns = list(dict.fromkeys([*results, *(c for _, _, cells in listed for c in cells)]))
    table = _table("figure [95 % interval]", "task", "metric", *columns, "samples", "failed")
    before = None
    for task, metric, cells in listed:
        about = [found["tasks"].get(task, {}) for found in results.values()]
        counts = ["/".join(str(a.get(k, "-")) for a in about) for k in ("samples", "failed")] if task != before else ["", ""]
        table.add_row(task if task != before else "", metric, *(cells.get(c, "") for c in columns), *counts)
        before = task
    console.print(table)
    if any(cost(a) for found in results.values() for a in found["tasks"].values()):
        console.print(cost_table(results))
    for label, found in results.items():
        for task, about in found["tasks"].items():
            for reason, count in about.get("failures", {}).items():
                console.print(f"[yellow]{label}, {task}: {count} failed: [/]{reason}", markup=True)
            for kind in ("missing", "corrupt"):
                if about.get(kind):
                    console.print(variants_table(label, task, about, kind))
            for column, gap in about.get("slices", {}).items():
                if "gap" in gap:
                    console.print(
                        f"{label}, {task}, by {column}: best {gap['best']}, worst {gap['worst']}, gap {figure(gap['gap'])}"
                    )


def _table(title: str, *heads: str) -> Any:
    """A table whose first two columns, the names, are never cut off."""
    from rich.table import Column, Table

    names = [Column(head, no_wrap=True, overflow="fold") for head in heads[:2]]
    return Table(*names, *heads[2:], title=title, title_justify="left")


def variants_table(label: str, task: str, about: Mapping[str, Any], kind: str) -> Any:
    """A task's figures as its inputs are removed or spoilt."""
    from rich.table import Table

    metrics = list(about["metrics"])
    table = Table("input", *metrics, "failed", title=f"{label}, {task}: {kind}", title_justify="left")
    table.add_row("whole", *(figure(about["metrics"][m]) for m in metrics), str(about["failed"]))
    for name, found in about[kind].items():
        table.add_row(name, *(figure(found["metrics"][m]) for m in metrics), str(found["failed"]))
    return table


def cost(about: Mapping[str, Any]) -> list[str]:
    """Tokens per second, seconds to the first token, seconds in all, peak memory; empty where nothing was asked."""
    times = about.get("times") or {}
    if "seconds" not in times:
        return []
    rate, first = times.get("tokens_per_s"), times.get("first_token_s")
    shown = [f"{rate:.0f}" if rate else "-", f"{1000 * first:.0f} ms" if first else "-"]
    return [*shown, f"{times['seconds']:.1f} s", f"{times['peak_memory_gib']:.2f} GiB"]


COST = ("new tokens/s", "first token", "this run", "peak memory")
"""Heads of `cost`. Rates are of all answers on record; the run's seconds are small where records were there already."""


def cost_table(results: Mapping[str, Mapping[str, Any]]) -> Any:
    """What answering took, per task and model."""
    table = _table("cost", "task", "model", *COST)
    for label, found in results.items():
        for task, about in found["tasks"].items():
            if told := cost(about):
                table.add_row(task, label, *told)
    return table
