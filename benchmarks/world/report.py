"""The quickstart's end: `report.html`, a page to look at, and `report.json`, the same figures for machines.

In: the quickstart's folder, the results of the evaluation, seconds per stage. Out: both files, and what the JSON holds:
`{"tasks": {name: {"value", "interval", "must", "aim", "specialist", "passed"}}, "seconds", "tokens_per_second", "parameters",
"active_parameters", "versions", "machine"}`. Nothing in here is measured again but the routing and the explanations.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from weft.benchmarks.speed.report import machine, versions
from weft.benchmarks.world.evaluate import Result
from weft.benchmarks.world.report_page import Facts, page
from weft.benchmarks.world.report_verdicts import Scores, verdicts
from weft.model.config import ModelConfig
from weft.model.count import active_params, num_params
from weft.training.tracking import read_jsonl


def report(
    root: str | Path, results: Mapping[str, Result], seconds: Mapping[str, float], *, model: Any = None
) -> dict[str, Any]:
    """Write both files into `root` and return what `report.json` holds.

    `model`: the evaluated `Generalist`, for the routing and the explanations; None = load it from `root/run`.
    """
    root = Path(root)
    if model is None:
        from weft.inference.load import load

        model = load(root / "run")
    scores = specialist_scores(root)
    config: ModelConfig = model.model.config
    found = verdicts(results, scores)
    figures = {
        "tasks": {name: verdict.row() for name, verdict in found.items()},
        "seconds": dict(seconds),
        "tokens_per_second": tokens_per_second(root / "run"),
        "parameters": num_params(config),
        "active_parameters": active_params(config),
        "versions": all_versions(root / "world"),
        "machine": {**machine(), "memory_gib": memory_gib()},
    }
    _replace(root / "report.json", json.dumps(figures, indent=1) + "\n")
    _replace(root / "report.html", page(Facts(root, results, found, scores, figures, model)))
    return figures


def specialist_scores(root: Path) -> Scores:
    """What the specialists stage wrote; nothing where it did not run."""
    path = root / "specialists.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def tokens_per_second(run: Path) -> float | None:
    """Mean over the training: every logged rate, weighted by the time since the one before."""
    rows, total, weight, last = read_jsonl(run / "speed.jsonl"), 0.0, 0.0, 0.0
    for row in rows:
        span, last = max(0.0, row["elapsed_s"] - last), row["elapsed_s"]
        if row["tokens_per_s"]:
            total, weight = total + span * row["tokens_per_s"], weight + span
    return round(total / weight, 1) if weight else None


def all_versions(world: Path) -> dict[str, str]:
    """weft, python, torch and the packages that the world was made with."""
    made = json.loads((world / "world.json").read_text(encoding="utf-8"))["versions"] if (world / "world.json").exists() else {}
    try:
        ours = version("weft")
    except PackageNotFoundError:
        ours = "not installed"
    return {"weft": ours, **versions(), **made}


def memory_gib() -> float | None:
    """Main memory of this machine."""
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (ValueError, OSError, AttributeError):
        return None


def _replace(path: Path, content: str) -> None:
    """The whole file or none of it."""
    draft = path.with_name(path.name + ".part")
    draft.write_text(content, encoding="utf-8")
    draft.replace(path)
