"""A `DataReport` as one HTML page: no script, no other file, everything from the data escaped.

In: the report. Out: HTML with tables, a histogram (SVG), and examples whose media are embedded up to a size limit.
"""

from __future__ import annotations

import base64
import html
import io
import re
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from weft.tokenizers.segment import Document
from weft.training.data.figures import DataReport, TokenReport
from weft.training.data.source import sniff

EMBED_BYTES = 2**20
SMALL = 96
"""Pixels: a picture below is shown enlarged."""
TYPES = {
    "png": "image/png",
    "jpg": "image/jpeg",
    "webp": "image/webp",
    "wav": "audio/wav",
    "flac": "audio/flac",
    "ogg": "audio/ogg",
    "mp4": "video/mp4",
}
NUMBER = re.compile(r"[\d,.]+%?")
COLOURS = ("#0b6e99", "#b3441e", "#3b7a3b", "#7a4b9d", "#8a6d00", "#555555")
STYLE = """
body{font:15px/1.5 system-ui,sans-serif;max-width:62rem;margin:2rem auto;padding:0 1rem;color:#222}
table{border-collapse:collapse;margin:.6rem 0 1.4rem}th,td{padding:.2rem .8rem;border-bottom:1px solid #ddd;text-align:left}
.n{text-align:right;font-variant-numeric:tabular-nums}article>div{margin:.35rem 0}
article{border:1px solid #ddd;border-radius:6px;padding:.6rem 1rem;margin:.8rem 0}
img,video{max-height:11rem;max-width:100%;vertical-align:middle;margin:0 .2rem}img.small{height:5rem;image-rendering:pixelated}
audio{vertical-align:middle;height:2.2rem}code{color:#555}.bad{color:#a00}svg{background:#fafafa}
"""


def page(report: DataReport) -> str:
    """The whole page."""
    parts = [
        f"<h1>Data report</h1><p><code>{_text(report.where)}</code>, {report.bytes / 2**20:.1f} MiB in "
        f"{sum(report.shards.values())} shards, digest <code>{_text(report.digest[:16])}</code></p>",
        *(f"<p class=bad>{_text(message)}</p>" for message in report.damaged),
        "<h2>Documents</h2>",
        _table(
            ["split", "source", "documents"],
            [(split, source or "(none)", f"{n:,}") for split, by in report.samples.items() for source, n in by.items()],
        ),
        "<h2>Content</h2>",
        _table(
            ["source", "modality", "segments", "seconds", "MiB", "cells"],
            [(s or "(none)", m, *_figures(c)) for s, by in report.content.items() for m, c in by.items()]
            + [("all", m, *_figures(c)) for m, c in report.modalities().items()],
        ),
        "<p>Cells: characters of text, pixels of images and kept frames, samples at 16 kHz, values of sensors and actions.</p>",
    ]
    if report.refused:
        rows = [(reason, f"{n:,}", report.first_refused.get(reason, "")) for reason, n in report.refused.items()]
        table = _table(["reason", "documents", "the first"], rows)
        parts += ["<h2>Left out</h2>", table, "<p>Each is named in <code>refused.jsonl</code>.</p>"]
    if report.tokens is not None:
        parts += _tokens(report.tokens)
    parts += ["<h2>Examples</h2>", *(_example(where, document) for where, document in report.examples)]
    body = "\n".join(parts)
    head = f"<head><meta charset=utf-8><title>Data report</title><style>{STYLE}</style></head>"
    return f"<!doctype html><html lang=en>{head}<body>{body}</body></html>\n"


def _text(value: Any) -> str:
    return html.escape(str(value).encode("utf-8", "replace").decode())


def _table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Columns of numbers stand at the right, words at the left."""
    cells = [[str(v) for v in row] for row in rows]
    numeric = [bool(cells) and all(NUMBER.fullmatch(row[i]) for row in cells) for i in range(len(head))]
    mark = [" class=n" if n else "" for n in numeric]
    top = "".join(f"<th{m}>{_text(h)}</th>" for m, h in zip(mark, head))
    body = "".join("<tr>" + "".join(f"<td{m}>{_text(v)}</td>" for m, v in zip(mark, row)) + "</tr>" for row in cells)
    return f"<table><tr>{top}</tr>{body}</table>"


def _figures(counts: dict[str, float]) -> tuple[str, str, str, str]:
    return (
        f"{int(counts['segments']):,}",
        f"{counts['seconds']:,.1f}",
        f"{counts['bytes'] / 2**20:,.2f}",
        f"{int(counts['cells']):,}",
    )


def _tokens(tokens: TokenReport) -> list[str]:
    lengths = np.array(tokens.lengths or (0,))
    names = ("5th percentile", "median", "95th percentile", "longest")
    marks = [f"{name} {int(v):,}" for name, v in zip(names, np.percentile(lengths, [5, 50, 95, 100]))]
    return [
        "<h2>Tokens</h2>",
        f"<p>Measured on {tokens.documents:,} documents ({tokens.unusable} unusable): mean {lengths.mean():,.1f} tokens; "
        f"{', '.join(marks)}.</p>",
        histogram(lengths),
        f"<p>Packed into rows of {tokens.row_length}: {tokens.row_waste:.2%} padding, {tokens.cut} documents cut.</p>",
        _table(["modality", "share of tokens"], [(m, f"{s:.1%}") for m, s in tokens.share.items()]),
        _table(["source", "tokens per document"], [(s or "(none)", f"{n:,.1f}") for s, n in tokens.mean_by_source.items()]),
    ]


def histogram(values: np.ndarray, bins: int = 40) -> str:
    """Counts over bins, as SVG: of equal width, or of equal ratio where the longest is more than 20 times the shortest."""
    number = min(bins, max(1, int(np.ptp(values)) + 1))
    wide = values.min() > 0 and values.max() > 20 * values.min()
    counts, edges = np.histogram(values, bins=np.geomspace(values.min(), values.max(), number + 1) if wide else number)
    width = 640 / len(counts)
    bars = ""
    for i, n in enumerate(counts):
        size = 110 * n / counts.max()
        place = f'x="{i * width:.1f}" y="{120 - size:.1f}" width="{max(width - 1, 0.5):.1f}" height="{size:.1f}"'
        bars += f'<rect {place} fill="{COLOURS[0]}"><title>{edges[i]:.0f} to {edges[i + 1]:.0f}: {n}</title></rect>'
    axis = f'<text x="0" y="138" font-size="12">{edges[0]:.0f}</text>'
    axis += (
        f'<text x="640" y="138" font-size="12" text-anchor="end">{edges[-1]:.0f} tokens{", logarithmic" if wide else ""}</text>'
    )
    axis += f'<text x="640" y="12" font-size="12" text-anchor="end">highest bar: {counts.max():,} documents</text>'
    return f'<svg viewBox="0 0 640 144" width="640" role="img" aria-label="document lengths">{bars}{axis}</svg>'


def _example(where: str, document: Document) -> str:
    body = "".join(f"<div>{_segment(s)}</div>" for s in document.segments)
    return f"<article><p><b>{_text(document.id)}</b> {_text(document.source)} <code>{_text(where)}</code></p>{body}</article>"


def _segment(segment: Any) -> str:
    role = f" <code>{segment.modality} ({segment.role})</code> "
    if segment.modality == "text":
        cut = segment.text[:2000]
        return f"{role}{_text(cut)}{' ...' if len(segment.text) > len(cut) else ''}"
    if segment.modality in ("sensor", "action"):
        names, units = (getattr(segment, key, None) or () for key in ("channels", "units"))
        return role + _curves(np.asarray(segment.values, np.float64), names, units)
    content = {"image": "pixels", "video": "frames", "audio": "samples"}[segment.modality]
    media = getattr(segment, content)
    if isinstance(media, list):
        step = max(1, len(media) // 8)
        return role + "".join(_embed(frame) for frame in media[::step][:8])
    return role + _embed(media)


def _embed(data: bytes) -> str:
    kind = TYPES.get(sniff(data) or "")
    if kind is None or len(data) > EMBED_BYTES:
        return f"({len(data):,} bytes, not embedded)"
    source = f"data:{kind};base64,{base64.b64encode(data).decode()}"
    if kind.startswith("image"):
        small = ' class="small"' if _side(data) < SMALL else ""
        return f'<img alt=""{small} src="{source}">'
    tag = kind.split("/")[0]
    return f'<{tag} controls src="{source}"></{tag}>'


def _side(data: bytes) -> int:
    """Pixels of a picture's longer side; 0 if it cannot be told."""
    import PIL.Image

    try:
        with PIL.Image.open(io.BytesIO(data)) as picture:
            return max(picture.size)
    except Exception:  # a page shows what it can
        return 0


def _curves(values: np.ndarray, names: Sequence[str], units: Sequence[str]) -> str:
    """Up to six channels over time, each over its own range, as SVG, and what each is called and spans."""
    values = values[:, None] if values.ndim == 1 else values
    readings = len(values)
    values = values[:: max(1, len(values) // 400)]
    lines, legend = [], []
    for c in range(min(values.shape[1], len(COLOURS))):
        column = values[:, c]
        seen = np.isfinite(column)
        if not seen.any():
            continue
        low, span = column[seen].min(), np.ptp(column[seen]) or 1.0
        x = np.linspace(2, 398, len(column)) if len(column) > 1 else np.array([200.0])
        points = " ".join(f"{a:.1f},{57 - 54 * (b - low) / span:.1f}" for a, b, ok in zip(x, column, seen) if ok)
        lines.append(f'<polyline points="{points}" fill="none" stroke="{COLOURS[c]}"/>')
        name = names[c] if c < len(names) else f"channel {c}"
        unit = f" {units[c]}" if c < len(units) and units[c] else ""
        legend.append(
            f'<span style="color:{COLOURS[c]}">{_text(name)} {low:.4g} to {column[seen].max():.4g}{_text(unit)}</span>'
        )
    more = f", {values.shape[1] - len(COLOURS)} more channels" if values.shape[1] > len(COLOURS) else ""
    shape = f"{readings:,} x {values.shape[1]}"
    picture = f'<svg viewBox="0 0 400 60" width="400" role="img" aria-label="{shape} values">{"".join(lines)}</svg>'
    return f"{picture} {shape}: {', '.join(legend)}{more}"
