"""One self-contained page that puts several models side by side, with the best and worst samples of each task.

In: folders that the runner wrote. Out: an HTML file; pictures and sounds are inside it, nothing is loaded from anywhere.
"""

from __future__ import annotations

import base64
import html
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from weft.benchmarks.harness.names import slug
from weft.benchmarks.harness.table import COST, cost, figure, rows

SHOWN = 4
"""Best and worst samples of each task and model."""
STYLE = """
body{font:15px/1.5 system-ui,sans-serif;margin:2rem auto;max-width:72rem;padding:0 1rem;color:#1d2433;background:#fff}
table{border-collapse:collapse;margin:.6rem 0;font-variant-numeric:tabular-nums}td,th{border-bottom:1px solid #d8dde6;
padding:.25rem .7rem;text-align:left;vertical-align:top}th{background:#f3f5f8}h2{margin-top:2.2rem}.worst{border-left:4px solid
#c8553d}.best{border-left:4px solid #3d8c6c}.sample{display:inline-block;margin:.3rem;padding:.4rem .6rem;background:#f7f8fa;
max-width:20rem;vertical-align:top;overflow-wrap:anywhere}img{image-rendering:pixelated;min-width:72px;max-width:100%}
small{color:#5b6577}.wide{max-width:100%}
@media(prefers-color-scheme:dark){body{background:#14171d;color:#e3e7ee}th{background:#222833}.sample{background:#1d222b}
td,th{border-color:#38404d}small{color:#9aa5b5}}
"""


def compare(folders: Mapping[str, Path], path: str | Path) -> Path:
    """Write the page for models by label."""
    results = {label: json.loads((folder / "results.json").read_text(encoding="utf-8")) for label, folder in folders.items()}
    parts = [f"<!doctype html><html lang=en><meta charset=utf-8><title>weft evaluation</title><style>{STYLE}</style>"]
    parts += ["<h1>Evaluation</h1>", _about(results), _table(results)]
    for task in dict.fromkeys(name for found in results.values() for name in found["tasks"]):
        about = next((r["tasks"][task]["about"] for r in results.values() if task in r["tasks"]), "")
        parts.append(f"<h2>{html.escape(task)}</h2><p>{html.escape(about)}</p>")
        for label, found in results.items():
            if task in found["tasks"]:
                parts.append(_task(label, found["tasks"][task], folders[label] / slug(task)))
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(parts) + "</html>\n", encoding="utf-8")
    return path


def _about(results: Mapping[str, Any]) -> str:
    lines = [
        f"<tr><td>{html.escape(label)}</td><td>{html.escape(r['model'])}</td><td><small>{html.escape(r['weights'][:16])}</small></td>"
        f"<td>{r['seed']}</td></tr>"
        for label, r in results.items()
    ]
    return f"<table><tr><th>name<th>checkpoint<th>weights<th>seed</tr>{''.join(lines)}</table>"


def _table(results: Mapping[str, Any]) -> str:
    listed = rows(results)
    columns = list(dict.fromkeys([*results, *(c for _, _, cells in listed for c in cells)]))
    head = "".join(f"<th>{html.escape(c)}" for c in columns)
    body = []
    for task, metric, cells in listed:
        values = "".join(f"<td>{html.escape(cells.get(c, ''))}" for c in columns)
        failed = "/".join(str(r["tasks"].get(task, {}).get("failed", "-")) for r in results.values())
        body.append(f"<tr><td>{html.escape(task)}<td>{html.escape(metric)}{values}<td>{failed}</tr>")
    return f"<table><tr><th>task<th>metric{head}<th>failed</tr>{''.join(body)}</table>"


def _task(label: str, found: Mapping[str, Any], folder: Path) -> str:
    parts = [f"<h3>{html.escape(label)}</h3>"]
    if found.get("not_applicable"):
        return parts[0] + f"<p>{html.escape(found['not_applicable'])}</p>"
    for kind in ("missing", "corrupt"):
        if found.get(kind):
            lines = "".join(_variant(name, about) for name, about in {"whole": found, **found[kind]}.items())
            heads = "".join(f"<th>{html.escape(m)}" for m in found["metrics"])
            parts.append(f"<table><tr><th>{kind}{heads}<th>failed</tr>{lines}</table>")
    if told := cost(found):
        parts.append(f"<p><small>{', '.join(f'{name} {value}' for name, value in zip(COST, told))}</small></p>")
    for column, gap in found.get("slices", {}).items():
        parts.append(_slices(column, gap))
    for reason, count in found.get("failures", {}).items():
        parts.append(f"<p>{count} failed: {html.escape(reason)}</p>")
    for name, file in found.get("strips", {}).items():
        parts.append(f"<p class='{name}'>{name} episode<br>{_media(folder / 'media' / file, 'wide')}</p>")
    return "".join(parts) + _samples(found, folder)


def _slices(column: str, gap: Mapping[str, Any]) -> str:
    """Best and worst value of a metadata column, and every one of them."""
    if "gap" not in gap:
        return f"<p>by {html.escape(column)}: {html.escape(gap['note'])}</p>"
    head = f"{gap['metric']} by {column}: {gap['worst']} is worst, {gap['best']} best, gap {figure(gap['gap'])}"
    lines = "".join(
        f"<tr><td>{html.escape(name)}<td>{html.escape(figure(about))}<td>{about['n']}" for name, about in gap["slices"].items()
    )
    return (
        f"<details><summary>{html.escape(head)}</summary><table><tr><th>{html.escape(column)}<th>{html.escape(gap['metric'])}"
        f"<th>samples{lines}</table></details>"
    )


def _variant(name: str, about: Mapping[str, Any]) -> str:
    cells = "".join(f"<td>{html.escape(figure(f))}" for f in about["metrics"].values())
    return f"<tr><td>{html.escape(name)}{cells}<td>{about['failed']}</tr>"


def goodness(record: Mapping[str, Any], metrics: Mapping[str, Any]) -> float:
    """How good a sample is by itself, for choosing what to show: failed below all, then by the first score on record."""
    if record.get("failed"):
        return float("-inf")
    for name, about in metrics.items():
        value = record.get("scores", {}).get(name)
        if value is not None:
            value = value[0] / max(value[1], 1e-12) if isinstance(value, list) else value
            return float(value) if about["higher_is_better"] else -float(value)
    right = record.get("reference")
    said = str(record.get("answer", "")).strip().lower()
    hit = said in [str(r).strip().lower() for r in (right if isinstance(right, list) else [right])]
    return float(hit) + 0.5 * float(record.get("confidence", 0.0)) * (1 if hit else -1)


def _samples(found: Mapping[str, Any], folder: Path) -> str:
    file = folder / str(found.get("records", ""))
    if not file.is_file():
        return ""
    records = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    order = sorted(records, key=lambda r: (-goodness(r, found["metrics"]), r["key"]))
    best, worst = order[:SHOWN], order[SHOWN:][-SHOWN:]
    return "".join(
        f"<p>{''.join(_sample(r, name, folder) for r in some)}</p>" for name, some in (("best", best), ("worst", worst)) if some
    )


def _sample(record: Mapping[str, Any], kind: str, folder: Path) -> str:
    lines = [f"<small>{html.escape(str(record['key']))}</small>"]
    if record.get("failed"):
        lines.append(html.escape(record["failed"]))
    for name in ("answer", "reference", "judged"):
        value = record.get(name)
        if isinstance(value, str | list):
            lines.append(f"{name}: {html.escape(str(value))}")
    for name, value in record.get("scores", {}).items():
        shown = value[0] / max(value[1], 1e-12) if isinstance(value, list) else value
        lines.append(f"{html.escape(name)} {shown:.3g}")
    if isinstance(record.get("answer"), dict):
        lines.append(_curves(record["answer"]))
    for said, name in (("made", "media"), ("true", "true_media")):
        if record.get(name):
            lines.append(f"<small>{said}</small> {_media(folder / 'media' / 'whole' / record[name])}")
    return f"<span class='sample {kind}'>{'<br>'.join(lines)}</span>"


def _media(path: Path, style: str = "") -> str:
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
        step = 180 / max(len(line) - 1, 1)
        points = " ".join(f"{i * step:.1f},{58 - 54 * (v - low) / span:.1f}" for i, v in enumerate(line))
        color = "#5b6577" if name == "truth" else "#2f6fd0"
        drawn.append(f"<polyline fill='none' stroke='{color}' stroke-width='2' points='{points}'/>")
    return f"<svg width='184' height='62' role='img' aria-label='truth grey, forecast blue'>{''.join(drawn)}</svg>"
