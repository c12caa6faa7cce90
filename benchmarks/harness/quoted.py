"""Figures that a document quotes: results of one or several models with machine, date and command, in one small file.

In: results by label, as the runner gives them. Out: a JSON file without records, slices and texts. Unlike `results.json` it
says where and when, so two of them are never the same.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

KEPT = ("answer", "shots", "samples", "failed", "metrics", "missing", "corrupt", "baselines", "data", "digest", "times")


def quote(results: Mapping[str, Mapping[str, Any]], path: str | Path, command: Sequence[str]) -> Path:
    """Write `path`."""
    from weft.benchmarks.speed.report import machine

    first = next(iter(results.values()), {})
    value = {
        "machine": machine(),
        "versions": first.get("versions", {}),
        "command": " ".join(command),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "models": {
            label: {
                "weights": found["weights"],
                "seed": found["seed"],
                "tasks": {name: {k: about[k] for k in KEPT if k in about} for name, about in found["tasks"].items()},
            }
            for label, found in results.items()
        },
    }
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    return path
