"""Media as HTML that needs no other file: pictures, films, sounds, readings, whole manifest lines.

In: arrays, `Segment`s or pieces of a manifest line. Out: HTML. Everything is a data URI or inline SVG; text is escaped.
"""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from weft.benchmarks.world import material
from weft.tokenizers.inspect import COLOURS

SIDE = 84
"""Pixels of a picture's longer side on the page, about."""


def esc(value: Any) -> str:
    """Text for HTML."""
    return html.escape(str(value))


def data_uri(content: bytes, kind: str) -> str:
    """Bytes inside the page."""
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def png(pixels: np.ndarray) -> str:
    """A data URI of [H W] or [H W 1 or 3], uint8 or float in [0, 1]."""
    from PIL import Image

    array = np.asarray(pixels)
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[..., 0]
    if array.dtype.kind == "f":
        array = np.clip(np.rint(array * 255), 0, 255)
    buffer = io.BytesIO()
    Image.fromarray(array.astype(np.uint8)).save(buffer, "PNG", optimize=True)
    return data_uri(buffer.getvalue(), "image/png")


def picture(pixels: np.ndarray, side: int = SIDE, alt: str = "") -> str:
    """A picture, each pixel a whole number of screen pixels."""
    height, width = np.asarray(pixels).shape[:2]
    times = max(1, side // max(height, min(width, 4 * height)))
    size = f"width:{width * times}px;height:{height * times}px"
    return f'<img class="px" alt="{esc(alt)}" style="{size}" src="{png(pixels)}">'


def film(frames: np.ndarray, seconds: float, side: int = SIDE) -> str:
    """Frames uint8 [N H W] played in a loop by the style sheet alone, and all of them small below."""
    count, height, width = frames.shape[:3]
    times = max(1, side // max(height, width))
    sheet = png(np.concatenate(list(frames), axis=1))
    size = f"--n:{count};--w:{width * times}px;--h:{height * times}px;--s:{max(seconds, 0.3):.2f}s"
    strip = f'<img class="px strip" alt="{count} frames" src="{sheet}">'
    return f'<span class="film" style="{size};background-image:url({sheet})"></span>{strip}'


def wave(samples: np.ndarray, width: int = 168, height: int = 40) -> str:
    """The envelope of a waveform."""
    parts = np.array_split(np.abs(np.asarray(samples, np.float64).reshape(-1)), min(84, max(1, np.size(samples))))
    peaks = np.array([p.max(initial=0.0) for p in parts])
    peaks = peaks / max(peaks.max(initial=0.0), 1e-3) * (height / 2 - 2)
    xs = np.linspace(1, width - 1, len(peaks))
    points = [f"{x:.1f},{height / 2 - p:.1f}" for x, p in zip(xs, peaks)]
    points += [f"{x:.1f},{height / 2 + p:.1f}" for x, p in zip(xs[::-1], peaks[::-1])]
    shape = f'<polygon points="{" ".join(points)}" fill="{COLOURS["audio"]}" opacity=".85"/>'
    middle = f'<line x1="0" x2="{width}" y1="{height / 2}" y2="{height / 2}" class="rule"/>'
    return f'<svg class="wave" viewBox="0 0 {width} {height}" width="{width}" height="{height}">{middle}{shape}</svg>'


def sound(samples: np.ndarray, rate_hz: int) -> str:
    """A waveform to look at, and a player."""
    import soundfile

    buffer = io.BytesIO()
    soundfile.write(buffer, np.clip(np.asarray(samples, np.float32), -1, 1), rate_hz, format="WAV", subtype="PCM_16")
    uri = data_uri(buffer.getvalue(), "audio/wav")
    return f'{wave(samples)}<audio controls preload="none" src="{uri}"></audio>'


def polyline(xs: Sequence[float], ys: Sequence[float], colour: str, extra: str = "") -> str:
    """A line through points."""
    points = " ".join(f"{x:.1f},{y:.1f}" for x, y in zip(xs, ys) if np.isfinite(y))
    join = 'stroke-linejoin="round" stroke-linecap="round"'
    return f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="1.6" {join} {extra}/>'


def spark(values: np.ndarray, colour: str = COLOURS["sensor"], width: int = 168, height: int = 40) -> str:
    """Readings [N] or [N C], every channel in its own range."""
    rows = np.asarray(values, np.float64)
    rows = rows[:, None] if rows.ndim == 1 else rows
    lines = []
    for c in range(rows.shape[1]):
        low, high = np.nanmin(rows[:, c]), np.nanmax(rows[:, c])
        level = (rows[:, c] - low) / (high - low) if high > low else np.full(len(rows), 0.5)
        xs, ys = np.linspace(3, width - 3, len(rows)), height - 4 - level * (height - 8)
        if len(rows) == 1:
            lines.append(f'<circle cx="{width / 2}" cy="{ys[0]:.1f}" r="3" fill="{colour}"/>')
        else:
            lines.append(polyline(xs.tolist(), ys.tolist(), colour, f'opacity="{max(0.35, 1 - 0.25 * c):.2f}"'))
    return f'<svg viewBox="0 0 {width} {height}" width="{width}" height="{height}">{"".join(lines)}</svg>'


def piece(part: dict[str, Any], world: Path) -> str:
    """One segment of a manifest line."""
    if "text" in part:
        return f'<q class="said">{esc(part["text"])}</q>'
    if "image" in part:
        return picture(material.pixels(world, part["image"]))
    if "audio" in part:
        return sound(*material.wave(world, part["audio"]))
    if "video" in part:
        times = part.get("times_s") or [0.0, 1.0]
        return film(material.film(world, part["video"]), 1.25 * (times[-1] - times[0]))
    if "sensor" in part:
        names, rows = ", ".join(part.get("channels", ())), np.array(part["sensor"], np.float64)
        if rows.size == 1:
            unit = (part.get("units") or [""])[0]
            return f'<span class="reading"><b>{float(rows.flat[0]):.4g} {esc(unit)}</b><small>{esc(names)}</small></span>'
        return f'<span class="reading">{spark(rows)}<small>{esc(names)}</small></span>'
    return f'<span class="said">{esc(part.get("action"))}</span>'


def line(row: dict[str, Any], world: Path) -> str:
    """The observed part of a manifest line, its question left out where media stand beside it."""
    parts = [p for p in row["segments"] if p.get("role") == "observed"]
    media = [p for p in parts if "text" not in p]
    return "".join(piece(p, world) for p in media or parts)


def modality(part: dict[str, Any]) -> str:
    """Which modality a piece of a manifest line is."""
    return next(name for name in COLOURS if name in part)


def tile(inside: str, caption: str, right: bool | None = None) -> str:
    """A figure with a caption; green where right, red where wrong."""
    mark = "" if right is None else (" good" if right else " bad")
    return f'<figure class="tile{mark}">{inside}<figcaption>{caption}</figcaption></figure>'


def tiles(items: Iterable[str], kind: str = "") -> str:
    """Figures side by side."""
    return f'<div class="tiles {kind}">{"".join(items)}</div>'
