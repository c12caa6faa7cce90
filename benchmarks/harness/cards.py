"""One sample as a card of a page: what was said, what is right, scores, pictures, sounds and forecasts.

In: a record and the folder of its task. Out: HTML with the media inside it.
"""

from __future__ import annotations

import base64
import html
from collections.abc import Mapping
from pathlib import Path
from typing import Any

NAMES = {"answer": "answer", "reference": "right", "judged": "judge sees", "said": "said first"}
WIDE, HIGH = 220, 70
"""Pixels of a forecast."""


def sample(record: Mapping[str, Any], folder: Path, asked: Mapping[str, Any] | None = None) -> str:
    """A card; `asked` holds the words and the files of the prompt."""
    asked = asked or {"words": "", "files": []}
    lines = [f"<small>{html.escape(str(record['key']))}</small>"]
    lines += [f"<span class=soft>asked</span> {html.escape(asked['words'])}"] if asked["words"] else []
    if record.get("failed"):
        lines.append(f"<span class=bad>{html.escape(record['failed'])}</span>")
    for name, label in NAMES.items():
        value = record.get(name)
        if isinstance(value, str | list):
            told = " / ".join(map(str, value)) if isinstance(value, list) else value
            lines.append(f"<span class=soft>{label}</span> {html.escape(told) or '<i>nothing</i>'}")
    if "confidence" in record:
        lines.append(f"<span class=soft>probability</span> {record['confidence']:.2f}")
    scores = [f"<span class=soft>{html.escape(name)}</span> {_number(v)}" for name, v in record.get("scores", {}).items()]
    lines += [", ".join(scores)] if scores else []
    shown = [("asked", "asked", file) for file in asked["files"]]
    shown += [(label, "whole", record[name]) for label, name in (("made", "media"), ("true", "true_media")) if record.get(name)]
    figures = [
        f"<figure>{medium(folder / 'media' / place / name)}<figcaption>{label}</figcaption></figure>"
        for label, place, name in shown
    ]
    if isinstance(record.get("answer"), dict):
        figures.append(f"<figure>{_curves(record['answer'])}<figcaption>median blue, truth grey</figcaption></figure>")
    said = "".join(f"<p>{line}</p>" for line in lines)
    seen = f"<div class=pair>{''.join(figures)}</div>" if figures else ""
    return f"<div class=card>{said}{seen}</div>"


def _number(value: Any) -> str:
    return f"{value[0] / max(value[1], 1e-12) if isinstance(value, list) else value:.3g}"


def medium(path: Path, style: str = "") -> str:
    """A picture or a sound inside the page."""
    if not path.is_file():
        return ""
    data = base64.b64encode(path.read_bytes()).decode()
    if path.suffix == ".wav":
        return f"<audio controls src='data:audio/wav;base64,{data}'></audio>"
    return f"<img class='{style}' alt='' src='data:image/png;base64,{data}'>"


def _curves(answer: Mapping[str, Any]) -> str:
    """Median forecast and truth of the first channel."""
    lines = {name: [float(row[0]) for row in answer[name]] for name in ("truth", "median") if name in answer}
    values = [v for line in lines.values() for v in line]
    low, span = min(values), max(max(values) - min(values), 1e-9)
    drawn = []
    for name, line in lines.items():
        step = (WIDE - 4) / max(len(line) - 1, 1)
        points = " ".join(f"{2 + i * step:.1f},{HIGH - 3 - (HIGH - 6) * (v - low) / span:.1f}" for i, v in enumerate(line))
        color = "#8a94a6" if name == "truth" else "#2f6fd0"
        drawn.append(f"<polyline fill='none' stroke='{color}' stroke-width='2' points='{points}'/>")
    return f"<svg width='{WIDE}' height='{HIGH}' role='img' aria-label='forecast and truth'>{''.join(drawn)}</svg>"
