"""`weft sample-world` and `weft quickstart`: the sample world, and the main job on it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

EXPECTED_S = {"world": 35.0, "shards": 35.0, "tokenizers": 30.0, "streams": 80.0, "specialists": 35.0, "evaluation": 50.0}
"""Seconds of each stage at scale 1 on 2 CPU cores: where the estimate of the time left starts."""
STEP_S = 0.25
"""Seconds of a training step there."""
WORLD_S = {"digits": 8.0, "videos": 6.0, "speech": 30.0, "returns": 10.0, "documents": 6.0}


def sample_world(folder: str, scale: float = 1.0, seed: int = 0) -> None:
    """Write the sample world: media, documents with questions and answers, a data card. Same arguments, same bytes.

    Args:
        folder: where to; new, empty, or an earlier sample world, which is completed.
        scale: share of the full world's documents, above 0 and at most 1.
        seed: of every random draw.
    """
    from weft.benchmarks.world.build import build_world
    from weft.commands.progress import watch

    with watch({"world": max(10.0, sum(WORLD_S.values()) * scale)}, "weft sample-world") as stages:
        root = build_world(folder, scale=scale, seed=seed, progress=lambda part, done: stages("world", done, part))
        stages("world", 1.0, "written")
    _print_world(root)


def _print_world(root: Path) -> None:
    """What was built, as a table."""
    from rich.table import Table

    sources = json.loads((root / "world.json").read_text(encoding="utf-8"))["sources"]
    table = Table("source", "train", "val", "test", "share of training tokens", title="documents", title_justify="left")
    for name, about in sources.items():
        counts = about["documents"]
        table.add_row(name, *(str(counts[split]) for split in ("train", "val", "test")), f"{about['share']:g} %")
    console = _console()
    console.print(table)
    console.print(f"data card: {root / 'README.md'}", soft_wrap=True, highlight=False)


def quickstart(
    out: str | None = None,
    short: bool = False,
    minutes: float = 10.5,
    scale: float = 1.0,
    seed: int = 0,
    steps: int | None = None,
    limit: int | None = None,
    device: str = "auto",
) -> None:
    """Build the sample world, train ONE small generalist, examine it beside its specialists, write a report.

    A stage that is done is not done again: interrupt it whenever you like and run the same command to go on.

    Args:
        out: folder of everything that is made; runs/quickstart if not given, runs/short for a short one.
        short: two to three minutes in all: a fifth of the documents, learnt a little; goes with --out, --seed and --device.
        minutes: time for training.
        scale: share of the sample world's documents, above 0 and at most 1.
        seed: of every random draw.
        steps: train for so many optimizer steps instead of minutes.
        limit: test documents per task at most, and a tenth as many episodes; all of them if not given.
        device: auto (a GPU if there is one), cpu, or cuda.
    """
    from weft.benchmarks.world.quickstart import Quickstart, QuickstartError
    from weft.benchmarks.world.quickstart import quickstart as work
    from weft.benchmarks.world.quickstart import short as short_one
    from weft.commands.progress import watch

    out = out or ("runs/short" if short else "runs/quickstart")
    whole = Quickstart(scale=scale, minutes=minutes, seed=seed, max_steps=steps, limit=limit, device=device)
    if short and whole != Quickstart(seed=seed, device=device):
        raise QuickstartError("a short quickstart has its own size; leave out --minutes, --scale, --steps, --limit, or --short")
    config = short_one(seed, device) if short else whole
    with watch(expected(config), f"weft quickstart -> {out}") as stages:
        figures = work(out, config, progress=stages)
    print_results(figures)
    console = _console()
    console.print(f"report: {(Path(out) / 'report.html').resolve()}", soft_wrap=True, highlight=False)
    console.print(f"model:  {(Path(out) / 'run').resolve()}", soft_wrap=True, highlight=False)


def expected(config: Any) -> dict[str, float]:
    """Seconds per stage as far as they can be guessed, in the order of the work."""
    share = max(0.1, config.scale)
    training = config.max_steps * STEP_S if config.max_steps else config.minutes * 60
    tested = min(1.0, (config.limit or 200) / 200)
    return {
        "world": EXPECTED_S["world"] * share,
        "shards": EXPECTED_S["shards"] * share,
        "tokenizers": EXPECTED_S["tokenizers"],
        "streams": EXPECTED_S["streams"] * share,
        "training": training,
        "specialists": EXPECTED_S["specialists"] * share,
        "evaluation": EXPECTED_S["evaluation"] * max(0.1, tested * share),
    }


def print_results(figures: Mapping[str, Any]) -> None:
    """The table of `report.json`, with the machine that made it."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    from weft.benchmarks.world.control import PLANTS

    about = figures["machine"]
    where = about.get("gpu") or f"{about.get('cpu') or 'CPU'}, threads: {about.get('threads')}"
    title = f"one model of {figures['parameters'] / 1e6:.2f} M parameters, on {where}"
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for name in ("task", "value", "95 % interval", "must", "aim", "rival", ""):
        table.add_column(name, justify="left" if name in ("task", "") else "right", no_wrap=True)
    for name, row in figures["tasks"].items():
        low, high = row["interval"]
        verdict = {True: "[green]held[/]", False: "[red]below[/]", None: "-"}[row["passed"]]
        limits = (_short(row[key], digits) for key, digits in (("must", 2), ("aim", 2), ("specialist", 3)))
        table.add_row(name, _short(row["value"]), f"{_short(low, 2)} to {_short(high, 2)}", *limits, verdict)
    console = _console()
    console.print(table)
    played = [row["value"] for name, row in figures["tasks"].items() if name in PLANTS]
    if played:
        console.print(f"mean of the environments: {sum(played) / len(played):.1f}; their must holds for it", highlight=False)
    judged = [row["passed"] for row in figures["tasks"].values() if row["passed"] is not None]
    console.print(f"{sum(judged)} of {len(judged)} tasks hold their must", highlight=False)
    seconds = figures["seconds"]
    parts = ", ".join(f"{name} {value:.0f}" for name, value in seconds.items())
    console.print(f"{sum(seconds.values()):.0f} s in all ({parts})", highlight=False)
    if figures["tokens_per_second"]:
        console.print(f"{figures['tokens_per_second']:,.0f} tokens a second while training", highlight=False)


def _short(value: float | None, digits: int = 3) -> str:
    return "-" if value is None else f"{value:.1f}" if abs(value) >= 10 else f"{value:.{digits}f}"


def _console() -> Any:
    """Wide enough for the table where nothing says how wide the output is."""
    from rich.console import Console

    console = Console()
    return console if console.is_terminal else Console(width=110)
