"""Charts as inline SVG: a figure with its interval, curves over steps, stacked bars, heat maps.

In: numbers. Out: HTML. Colours come from the style sheet's variables, so that the page follows a dark or a light reader.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from weft.benchmarks.world.report_media import esc, polyline
from weft.training.plots import smooth

STAGE_COLOURS = ("#7a8699", "#4f78d8", "#2a9d8f", "#e0803c", "#8d5bd0", "#d0517f", "#a3902f", "#3f9a52")


def number(value: float | None, percent: bool = False) -> str:
    """Three digits or so."""
    if value is None or not math.isfinite(value):
        return "-"
    if percent:
        return f"{100 * value:.1f} %"
    return f"{value:,.0f}" if abs(value) >= 999.5 else f"{value:.3g}"


def whisker(
    value: float,
    interval: tuple[float, float],
    ends: tuple[float, float],
    *,
    must: float | None = None,
    aim: float | None = None,
    specialist: float | None = None,
    chance: float | None = None,
    colour: str = "var(--good)",
    width: int = 300,
) -> str:
    """A dot with its interval on an axis from worst (left) to best, and what it is held against."""

    def x(v: float) -> float:
        return 8 + (width - 16) * min(1.0, max(0.0, (v - ends[0]) / (ends[1] - ends[0])))

    y, parts = 14, [f'<line x1="8" x2="{width - 8}" y1="14" y2="14" class="rule"/>']
    if must is not None and aim is not None:
        a, b = sorted((x(must), x(aim)))
        parts.append(f'<rect x="{a:.1f}" y="6" width="{max(b - a, 0.5):.1f}" height="16" fill="var(--good)" opacity=".13"/>')
    for limit, name, dash in ((chance, "chance", "1 3"), (must, "must", ""), (aim, "aim", "3 2")):
        if limit is not None:
            tip = f"<title>{name} {number(limit)}</title>"
            stroke = f'stroke="var(--soft)" stroke-width="1.3" stroke-dasharray="{dash}"'
            parts.append(f'<line x1="{x(limit):.1f}" x2="{x(limit):.1f}" y1="5" y2="23" {stroke}>{tip}</line>')
    if specialist is not None:
        at = x(specialist)
        tip = f"<title>specialist {number(specialist)}</title>"
        shape = f"M{at:.1f} 9l5 5-5 5-5-5z"
        parts.append(f'<path d="{shape}" fill="var(--card)" stroke="var(--ink)" stroke-width="1.4">{tip}</path>')
    low, high = sorted((x(interval[0]), x(interval[1])))
    parts.append(f'<line x1="{low:.1f}" x2="{high:.1f}" y1="{y}" y2="{y}" stroke="{colour}" stroke-width="4" opacity=".45"/>')
    tip = f"<title>{number(value)} [{number(interval[0])}, {number(interval[1])}]</title>"
    parts.append(f'<circle cx="{x(value):.1f}" cy="{y}" r="5.2" fill="{colour}">{tip}</circle>')
    return f'<svg class="whisker" viewBox="0 0 {width} 28" width="{width}" height="28">{"".join(parts)}</svg>'


def ticks(low: float, high: float, count: int = 4) -> list[float]:
    """Round numbers inside an interval."""
    if not high > low:
        return [low]
    raw = (high - low) / count
    power = 10 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw)
    first = math.ceil(low / step - 1e-9)
    return [k * step for k in range(first, math.floor(high / step + 1e-9) + 1)]


def curve(
    series: Mapping[str, tuple[Sequence[float], Sequence[float], str]],
    *,
    floor: float | None = None,
    width: int = 360,
    height: int = 150,
) -> str:
    """Lines name -> (x, y, colour), smoothed over a fiftieth of their points with the raw values faint behind."""
    known = {name: s for name, s in series.items() if len(s[0])}
    if not known:
        return ""
    xs = [v for s in known.values() for v in s[0]]
    smoothed = {name: smooth(list(map(float, s[1])), max(1, len(s[1]) // 50)) for name, s in known.items()}
    tops = sorted(v for s in known.values() for v in s[1])
    low, high = min(tops), tops[min(len(tops) - 1, int(0.995 * len(tops)))]
    low = low if floor is None else min(floor, low)
    high = high if high > low else low + 1.0
    x0, x1 = min(xs), max(max(xs), min(xs) + 1)

    def px(v: float) -> float:
        return 40 + (width - 48) * (v - x0) / (x1 - x0)

    def py(v: float) -> float:
        return 8 + (height - 30) * (high - min(v, high)) / (high - low)

    parts = []
    for t in ticks(low, high):
        parts.append(f'<line x1="40" x2="{width - 8}" y1="{py(t):.1f}" y2="{py(t):.1f}" class="rule"/>')
        parts.append(f'<text x="34" y="{py(t) + 4:.1f}" class="axis" text-anchor="end">{number(t)}</text>')
    for t in ticks(x0, x1):
        parts.append(f'<text x="{px(t):.1f}" y="{height - 6}" class="axis" text-anchor="middle">{t:,.0f}</text>')
    for name, (sx, sy, colour) in known.items():
        at = [px(v) for v in sx]
        if len(sx) > 60:
            keep = range(0, len(sx), max(1, len(sx) // 400))
            parts.append(polyline([at[i] for i in keep], [py(sy[i]) for i in keep], colour, 'opacity=".22"'))
        line = polyline(at, [py(v) for v in smoothed[name]], colour)
        parts.append(f"<g><title>{esc(name)}: {number(smoothed[name][-1])} at the end</title>{line}</g>")
    return f'<svg viewBox="0 0 {width} {height}" class="wide">{"".join(parts)}</svg>'


def stacked(parts: Mapping[str, float], word: str = "s") -> str:
    """One bar cut into shares, with a legend of the amounts."""
    total = sum(parts.values()) or 1.0
    bars, legend = [], []
    for i, (name, amount) in enumerate(parts.items()):
        colour = STAGE_COLOURS[i % len(STAGE_COLOURS)]
        tip = f"{esc(name)}: {number(amount)} {word}, {100 * amount / total:.0f} %"
        bars.append(f'<i style="flex:{amount / total:.5f} 0 0;background:{colour}" title="{tip}"></i>')
        legend.append(f'<span><i style="background:{colour}"></i>{esc(name)} <b>{number(amount)} {word}</b></span>')
    return f'<div class="share">{"".join(bars)}</div><div class="legend">{"".join(legend)}</div>'


def bar(share: float, text: str, colour: str, name: str = "") -> str:
    """One labelled horizontal bar; `share` of its track is filled."""
    fill = f'<i style="width:{100 * min(max(share, 0.0), 1.0):.1f}%;background:{colour}"></i>'
    return f'<div class="bar"><span>{esc(name)}</span><div class="track">{fill}</div><b>{text}</b></div>'


def heat(rows: Sequence[str], columns: Sequence[str], cells: Sequence[Sequence[float | None]], colours: Sequence[str]) -> str:
    """A table of shares in [0, 1], each row in its own colour."""
    head = "".join(f"<th>{esc(c)}</th>" for c in columns)
    body = []
    for name, values, colour in zip(rows, cells, colours):
        tds = "".join(_cell(v, colour) for v in values)
        body.append(f"<tr><th>{esc(name)}</th>{tds}</tr>")
    return f'<table class="heat"><thead><tr><th></th>{head}</tr></thead><tbody>{"".join(body)}</tbody></table>'


def _cell(value: float | None, colour: str) -> str:
    if value is None:
        return '<td class="none"></td>'
    strength = 8 + 82 * min(max(value, 0.0), 1.0)
    ink = "color:#fff" if strength > 52 else ""
    return f'<td style="background:color-mix(in srgb, {colour} {strength:.0f}%, var(--card));{ink}">{100 * value:.0f}</td>'
