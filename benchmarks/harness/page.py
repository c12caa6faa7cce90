"""One self-contained page that puts several models side by side, with the best and worst samples of each task.

In: folders that the runner wrote. Out: an HTML file; pictures and sounds are inside it, nothing is loaded from anywhere.
"""

from __future__ import annotations

import html
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from weft.benchmarks.harness.cards import medium, sample
from weft.benchmarks.harness.measures import measure
from weft.benchmarks.harness.names import slug
from weft.benchmarks.harness.record_file import read_records
from weft.benchmarks.harness.table import COST, cost, figure, rows

STYLE = """
:root{--ink:#1d2433;--soft:#5b6577;--line:#dfe3ea;--back:#fff;--card:#f7f8fa;--good:#2f7d5d;--bad:#c2523a;--link:#2458b8}
@media(prefers-color-scheme:dark){:root{--ink:#e3e7ee;--soft:#9aa5b5;--line:#38404d;--back:#14171d;--card:#1d222b;--good:#58b98f;
--bad:#e0795f;--link:#8ab0ff}}
body{font:15px/1.5 system-ui,sans-serif;margin:2rem auto;max-width:72rem;padding:0 1rem;color:var(--ink);background:var(--back)}
h1{margin-bottom:.3rem}h2{margin:2.6rem 0 .1rem;padding-top:.8rem;border-top:1px solid var(--line);font-size:1.25rem}h3{margin:
1.1rem 0 .3rem;font-size:1rem;color:var(--soft)}p{margin:.35rem 0}a{color:var(--link);text-decoration:none}
.scroll{overflow-x:auto}table{border-collapse:collapse;margin:.6rem 0;font-variant-numeric:tabular-nums}
td,th{padding:.28rem .8rem .28rem 0;text-align:left;vertical-align:top;white-space:nowrap}
tr.task td,thead th{border-top:1px solid var(--line)}
th,small,.soft{color:var(--soft);font-weight:500}.bad{color:var(--bad)}
.cards{display:grid;grid-template-columns:repeat(auto-fill,minmax(15rem,1fr));gap:.7rem;margin:.4rem 0 1rem}
.card{background:var(--card);border-radius:.45rem;border-top:3px solid var(--good);padding:.55rem .75rem;overflow-wrap:anywhere}
.worst .card{border-color:var(--bad)}.card p{margin:.15rem 0}.pair{display:flex;flex-wrap:wrap;
gap:.8rem;margin-top:.4rem}figure{margin:0}
figcaption{color:var(--soft);font-size:.8rem}img{image-rendering:pixelated;height:96px;max-width:100%;background:#888}img.wide{height:auto;width:100%}
audio{width:13rem;height:2.2rem}summary{cursor:pointer;color:var(--soft)}
"""


def compare(folders: Mapping[str, Path], path: str | Path) -> Path:
    """Write the page for models by label."""
    results = {label: json.loads((folder / "results.json").read_text(encoding="utf-8")) for label, folder in folders.items()}
    parts = [
        "<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>",
        f"<title>weft evaluation</title><style>{STYLE}</style><h1>Evaluation</h1>",
        _about(results),
        _table(results),
    ]
    for task in dict.fromkeys(name for found in results.values() for name in found["tasks"]):
        parts.append(_heading(task, next(r["tasks"][task] for r in results.values() if task in r["tasks"])))
        for label, found in results.items():
            if task in found["tasks"]:
                parts += [f"<h3>{html.escape(label)}</h3>"] if len(results) > 1 else []
                parts.append(_task(found["tasks"][task], folders[label] / slug(task)))
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(parts) + "</html>\n", encoding="utf-8")
    return path


def _about(results: Mapping[str, Any]) -> str:
    lines = [
        f"<tr><td>{html.escape(label)}<td>{html.escape(r['model'])}<td class=soft>{html.escape(r['weights'][:16])}"
        f"<td>{r['seed']}</tr>"
        for label, r in results.items()
    ]
    return f"<div class=scroll><table><tr><th>name<th>checkpoint<th>weights<th>seed</tr>{''.join(lines)}</table></div>"


def _table(results: Mapping[str, Any]) -> str:
    """Every metric of every task: a column per model, and what a figure has to be compared with."""
    body, before = [], None
    for task, metric, cells in rows(results):
        known = [found["tasks"].get(task, {}) for found in results.values()]
        values = "".join(f"<td>{_figure(cells.get(label, ''))}" for label in results)
        beside = ", ".join(f"{name} {value}" for name, value in cells.items() if name not in results)
        failed = "/".join(str(k.get("failed", "-")) for k in known) if task != before else ""
        mark = " class=bad" if failed.strip("0/-") else ""
        link = f"<a href='#{slug(task)}'>{html.escape(task)}</a>" if task != before else ""
        about = measure(metric)
        arrow = f"&rarr; {about.target:g}" if about.target is not None else "&uarr;" if about.higher else "&darr;"
        body.append(
            f"<tr{' class=task' if link else ''}><td>{link}<td class=soft>{html.escape(metric)} {arrow}{values}"
            f"<td class=soft>{html.escape(beside)}<td{mark}>{failed}</tr>"
        )
        before = task
    head = "".join(f"<th>{html.escape(label)}" for label in results)
    return (
        f"<div class=scroll><table><thead><tr><th>task<th>metric{head}<th>to compare with<th>failed</thead>{''.join(body)}"
        "</table></div><p><small>In brackets: 95 % intervals. An arrow says which way is better.</small></p>"
    )


def _figure(told: str) -> str:
    """A figure, its interval in a softer tone."""
    value, _, rest = html.escape(told).partition(" ")
    return f"{value} <small>{rest}</small>" if rest.startswith("[") else html.escape(told)


def _heading(task: str, about: Mapping[str, Any]) -> str:
    asked = [f"answer: {about['answer']}"]
    asked += [f"{about['shots']} demonstrations"] if about.get("shots") else []
    asked += [f"{about['samples']} samples"] if "samples" in about else []
    return (
        f"<h2 id='{slug(task)}'>{html.escape(task)}</h2><p>{html.escape(about.get('about', ''))} "
        f"<small>({html.escape(', '.join(asked))})</small></p>"
    )


def _task(found: Mapping[str, Any], folder: Path) -> str:
    """What one model did in one task."""
    if found.get("not_applicable"):
        return f"<p>{html.escape(found['not_applicable'])}</p>"
    told = [f"<b>{html.escape(name)}</b> {_figure(figure(about))}" for name, about in found["metrics"].items()]
    parts = [f"<p>{' &ensp; '.join(told)}</p>"]
    for reason, count in found.get("failures", {}).items():
        parts.append(f"<p class=bad>{count} failed: {html.escape(reason)}</p>")
    for kind in ("missing", "corrupt"):
        if found.get(kind):
            parts.append(_variants(kind, found))
    for column, gap in found.get("slices", {}).items():
        parts.append(_slices(column, gap))
    for name, file in found.get("strips", {}).items():
        parts.append(f"<figure><figcaption>{name} episode</figcaption>{medium(folder / 'media' / file, 'wide')}</figure>")
    if took := cost(found):
        parts.append(f"<p><small>{', '.join(f'{name} {value}' for name, value in zip(COST, took))}</small></p>")
    return "".join(parts) + _samples(found, folder)


def _variants(kind: str, found: Mapping[str, Any]) -> str:
    """The figures as inputs are removed or spoilt."""
    lines = []
    for name, about in {"whole": found, **found[kind]}.items():
        cells = "".join(f"<td>{_figure(figure(f))}" for f in about["metrics"].values())
        lines.append(f"<tr><td>{html.escape(name)}{cells}<td>{about['failed']}</tr>")
    heads = "".join(f"<th>{html.escape(m)}" for m in found["metrics"])
    return f"<div class=scroll><table><tr><th>{kind}{heads}<th>failed</tr>{''.join(lines)}</table></div>"


def _slices(column: str, gap: Mapping[str, Any]) -> str:
    """Best and worst value of a metadata column, and every one of them."""
    if "gap" not in gap:
        return f"<p><small>by {html.escape(column)}: {html.escape(gap['note'])}</small></p>"
    head = f"{gap['metric']} by {column}: {gap['best']} is best, {gap['worst']} worst, gap {figure(gap['gap'])}"
    lines = "".join(
        f"<tr><td>{html.escape(name)}<td>{_figure(figure(about))}<td>{about['n']}" for name, about in gap["slices"].items()
    )
    return (
        f"<details><summary>{html.escape(head)}</summary><table><tr><th>{html.escape(column)}<th>{html.escape(gap['metric'])}"
        f"<th>samples{lines}</table></details>"
    )


def _samples(found: Mapping[str, Any], folder: Path) -> str:
    """Cards of the best and of the worst samples."""
    records = read_records(folder / str(found["records"])) if found.get("shown") else {}
    parts = []
    for kind, keys in found.get("shown", {}).items():
        cards = "".join(sample(records[key], folder, found.get("asked", {}).get(key)) for key in keys if key in records)
        if cards:
            parts.append(f"<p><small>{kind}</small></p><div class='cards {kind}'>{cards}</div>")
    return "".join(parts)
