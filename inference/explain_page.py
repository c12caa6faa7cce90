"""An explanation as one self-contained HTML page: media, bars, a heat map; nothing is fetched, no script runs."""

from __future__ import annotations

import base64
import html
import io
from typing import Any

import numpy as np

from weft.inference.files import picture
from weft.tokenizers.media.audio import read_audio
from weft.tokenizers.media.image import load_image
from weft.tokenizers.media.video import load_video
from weft.tokenizers.segment import Action, Audio, Image, Segment, Sensor, Text, Video

Explanation = Any
"""`explain.Explanation`; it draws itself with this page, so the page must not import it."""
Part = Any
"""`explain.Part`."""

COLOR = {
    "text": "#4c78a8",
    "image": "#e8833a",
    "video": "#d4563f",
    "audio": "#3a9d8f",
    "sensor": "#5a9e45",
    "action": "#9467bd",
}
FRAMES = 8
"""Frames of a video on the page, at equal distances."""
_STYLE = """
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, sans-serif; color: #1c2530; background: #f6f7f9; margin: 0; }
main { max-width: 1000px; margin: 0 auto; padding: 32px 24px 64px; }
h1 { font-size: 26px; margin: 0 0 4px; } h2 { font-size: 18px; margin: 36px 0 4px; }
p.note { color: #5a6675; margin: 0 0 14px; max-width: 72ch; }
.card { background: #fff; border: 1px solid #e1e5ea; border-radius: 10px; padding: 14px 16px; margin: 0 0 10px; }
.row { display: grid; grid-template-columns: 96px minmax(0, 1fr) 300px; gap: 16px; align-items: center; }
.tag { display: inline-block; padding: 1px 9px; border-radius: 9px; color: #fff; font-size: 12px; }
.media img { height: 84px; image-rendering: pixelated; border-radius: 4px; margin-right: 4px; }
.media audio { height: 36px; max-width: 100%; } .media { overflow-wrap: anywhere; }
.bar { display: grid; grid-template-columns: 92px 1fr 70px; gap: 8px; align-items: center; font-size: 12px; color: #5a6675; }
.track { background: #edf0f3; border-radius: 4px; height: 10px; position: relative; }
.fill { height: 10px; border-radius: 4px; } .num { text-align: right; font-variant-numeric: tabular-nums; color: #1c2530; }
table { border-collapse: separate; border-spacing: 2px; font-size: 12px; }
td.cell { width: 58px; height: 30px; text-align: center; border-radius: 4px; font-variant-numeric: tabular-nums; }
th { font-weight: 500; color: #5a6675; padding: 2px 6px; text-align: right; max-width: 130px; overflow: hidden;
  text-overflow: ellipsis; white-space: nowrap; }
thead th { text-align: center; }
.tokens span { padding: 2px 4px; margin: 1px; border-radius: 3px; display: inline-block; font-family: ui-monospace, monospace; }
.stack { display: flex; height: 18px; border-radius: 4px; overflow: hidden; flex: 1; }
.layer { display: flex; gap: 10px; align-items: center; font-size: 12px; color: #5a6675; margin: 2px 0; }
.layer b { width: 120px; font-weight: 500; }
"""


def page(explanation: Explanation) -> str:
    """The whole page."""
    body = [
        "<h1>Why this reply</h1>",
        f'<p class="note">The reply has a log-probability of {explanation.logprob:.2f} nats over '
        f"{len(explanation.tokens)} chosen tokens.</p>",
        _parts(explanation),
        _tokens(explanation),
        _attention(explanation),
        _experts(explanation),
    ]
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Why this reply</title>'
        f"<style>{_STYLE}</style></head><body><main>{''.join(body)}</main></body></html>\n"
    )


def _parts(e: Explanation) -> str:
    largest = max([abs(p.leave_one_out or 0.0) for p in e.parts] + [1e-9])
    cards: dict[str, list[str]] = {"prompt": [], "reply": []}
    for part, segment in zip(e.parts, e.segments):
        bars = "" if part.role == "reply" else _bars(part, largest)
        what = f'<div class="media">{media(segment)}</div>'
        cards[part.role].append(f'<div class="card row"><div>{_tag(part)}</div>{what}<div>{bars}</div></div>')
    note = (
        '<p class="note">Without it: by how many nats the reply becomes less likely when the segment is removed '
        "(red: it becomes more likely). Sensitivity: its share of gradient times input.</p>"
    )
    return f"<h2>Prompt</h2>{note}{''.join(cards['prompt'])}<h2>Reply</h2>{''.join(cards['reply'])}"


def _bars(part: Part, largest: float) -> str:
    bars = ""
    if part.leave_one_out is not None:
        color = "#c0392b" if part.leave_one_out < 0 else "#2f6fb0"
        bars = _bar("without it", abs(part.leave_one_out) / largest, f"{part.leave_one_out:+.2f}", color)
    share = part.gradient or 0.0
    return bars + _bar("sensitivity", share, f"{100 * share:.0f} %", "#8a94a3")


def _bar(name: str, share: float, number: str, color: str) -> str:
    fill = f'<div class="fill" style="width:{100 * min(share, 1.0):.1f}%;background:{color}"></div>'
    return f'<div class="bar"><span>{name}</span><div class="track">{fill}</div><span class="num">{number}</span></div>'


def _tag(part: Part) -> str:
    color = COLOR.get(part.modality, "#667")
    count = f"{part.tokens} token" + ("" if part.tokens == 1 else "s")
    return f'<span class="tag" style="background:{color}">{html.escape(part.modality)}</span><br><small>{count}</small>'


def _tokens(e: Explanation) -> str:
    words = []
    for word, logprob in e.tokens:
        light = 94 - 46 * float(np.exp(logprob))
        title = f"{logprob:.2f} nats, p = {np.exp(logprob):.3f}"
        ink = "#fff" if light < 62 else "#1c2530"
        words.append(f'<span title="{title}" style="background:hsl(210 55% {light:.0f}%);color:{ink}">{_visible(word)}</span>')
    note = '<p class="note">Each chosen token; the darker, the more certain the model was. Hover for numbers.</p>'
    return f'<h2>Tokens of the reply</h2>{note}<div class="card tokens">{"".join(words)}</div>'


def _visible(word: str) -> str:
    return html.escape("".join(c if c.isprintable() and c != " " else "\u00b7" for c in word)) or "&middot;"


def _attention(e: Explanation) -> str:
    names = [f"{html.escape(p.label if len(p.label) <= 18 else p.label[:17] + chr(0x2026))}" for p in e.parts] + ["&lt;doc&gt;"]
    head = "".join(f"<th>{i + 1}</th>" for i in range(len(e.parts))) + "<th>doc</th>"
    rows = []
    for i, (name, shares) in enumerate(zip(names, e.attention)):
        if i == len(e.parts):
            continue
        cells = "".join(_cell(share) for share in shares)
        rows.append(f"<tr><th>{name} &nbsp;{i + 1}</th>{cells}</tr>")
    note = (
        '<p class="note">Share of each segment\'s attention (row) that goes to each segment (column), mean over layers, heads '
        "and tokens. It shows where the model looked, not why.</p>"
    )
    table = f"<table><thead><tr><th></th>{head}</tr></thead>{''.join(rows)}</table>"
    return f'<h2>Attention between segments</h2>{note}<div class="card">{table}</div>'


def _cell(share: float) -> str:
    if share < 0.0005:
        return '<td class="cell" style="background:#f4f6f8"></td>'
    light = 96 - 52 * share**0.7
    ink = "#fff" if light < 64 else "#1c2530"
    return f'<td class="cell" style="background:hsl(210 60% {light:.0f}%);color:{ink}">{100 * share:.0f}</td>'


def _experts(e: Explanation) -> str:
    if not e.experts:
        return ""
    rows = []
    for modality, layers in e.experts.items():
        for i, shares in enumerate(layers):
            parts = "".join(_share(k, share) for k, share in enumerate(shares))
            label = f"{modality}, layer {i + 1}"
            rows.append(f'<div class="layer"><b>{html.escape(label)}</b><div class="stack">{parts}</div></div>')
    note = (
        '<p class="note">How the routed experts share the tokens of each modality; one colour is one expert of its layer.</p>'
    )
    return f'<h2>Experts</h2>{note}<div class="card">{"".join(rows)}</div>'


def _share(k: int, share: float) -> str:
    style = f"width:{100 * share:.2f}%;background:hsl({(47 * k) % 360} 45% 62%)"
    return f'<div title="expert {k}: {100 * share:.0f} %" style="{style}"></div>'


def media(segment: Segment) -> str:
    """A segment as HTML without outside references."""
    if isinstance(segment, Text):
        return html.escape(segment.text)
    try:
        if isinstance(segment, Image):
            return _image(load_image(segment.pixels))
        if isinstance(segment, Video):
            frames, _ = load_video(segment.frames)
            return "".join(map(_image, frames[:: max(-(-len(frames) // FRAMES), 1)]))
        if isinstance(segment, Audio):
            samples, rate_hz = read_audio(segment.samples, segment.rate_hz)
            return _sound(samples, round(rate_hz))
        if isinstance(segment, Sensor | Action):
            return _lines(np.asarray(segment.values, np.float64))
    except (OSError, ValueError, TypeError):  # a file that has gone since it was explained
        pass
    return html.escape(segment.name or segment.modality)


def _image(pixels: np.ndarray) -> str:
    buffer = io.BytesIO()
    picture(pixels).save(buffer, "PNG")
    return f'<img alt="" src="data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}">'


def _sound(samples: np.ndarray, rate_hz: int) -> str:
    import soundfile

    buffer = io.BytesIO()
    soundfile.write(buffer, np.clip(samples, -1, 1), rate_hz, format="WAV")
    wave = _lines(samples[:: max(len(samples) // 400, 1)][:, None])
    return f'{wave}<audio controls src="data:audio/wav;base64,{base64.b64encode(buffer.getvalue()).decode()}"></audio>'


def _lines(values: np.ndarray) -> str:
    """One line per channel, each scaled to its own range."""
    values = values[:, None] if values.ndim == 1 else values
    n, channels = values.shape
    paths = []
    for c in range(channels):
        y = values[:, c]
        low, high = np.nanmin(y, initial=np.inf), np.nanmax(y, initial=-np.inf)
        scaled = 44 - 38 * (y - low) / max(high - low, 1e-12) if high > low else np.full(n, 25.0)
        points = " ".join(f"{4 + 312 * i / max(n - 1, 1):.1f},{v:.1f}" for i, v in enumerate(scaled) if np.isfinite(v))
        color = f"hsl({(200 + 67 * c) % 360} 50% 45%)"
        if points.count(",") == 1:
            x, v = points.split(",")
            paths.append(f'<circle cx="{x}" cy="{v}" r="3" fill="{color}"/>')
        else:
            paths.append(f'<polyline points="{points}" fill="none" stroke="{color}" stroke-width="1.5"/>')
    return f'<svg viewBox="0 0 320 50" width="320" height="50">{"".join(paths)}</svg>'
