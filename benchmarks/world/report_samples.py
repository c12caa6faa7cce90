"""What the model was asked and what it said, to look at and to listen to: one gallery per task.

In: `Result`s with their samples, the world's folder. Out: HTML. Wrong answers are shown as they came, marked red.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from weft.benchmarks.world import material
from weft.benchmarks.world import report_media as media
from weft.benchmarks.world import report_plants as plants
from weft.benchmarks.world.control import PLANTS
from weft.benchmarks.world.digits import NUMBERS, WORDS
from weft.benchmarks.world.evaluate import Result
from weft.benchmarks.world.report_charts import bar, heat, number
from weft.benchmarks.world.report_media import esc, tile, tiles
from weft.tokenizers.inspect import COLOURS

SOUNDS = 8
"""Sounds per gallery: they are what makes the page large."""


def gallery(result: Result, world: Path) -> str:
    """The samples of one task as a card; empty where there are none."""
    inside = GALLERIES[result.task.kind](result, world)
    if not inside:
        return ""
    note = NOTES.get(result.task.name) or NOTES.get(result.task.kind, "")
    return f'<article class="card"><h3>{esc(result.task.name)}</h3><p class="note">{note}</p>{inside}</article>'


NOTES = {
    "image -> word": "Held-out scans of 8 x 8 pixels, and the word that the model wrote.",
    "speech -> word": "Voices and accents that it never heard (synthetic speech).",
    "speech -> words": "Strings of digits by unheard voices; below, the words that the model wrote.",
    "video -> digit and direction": "A digit on the move; the frames below are what the model saw.",
    "image + speech -> sum": "One number is seen, the other heard; neither alone is enough.",
    "motor: fault": "Current, vibration and temperature of a simulated motor, and the fault that the model named.",
    "image": "Drawn from a word, token by token; the caption names what was asked for.",
    "rest": "The upper half was given. Left: completed by the model. Right: the scan.",
    "speech": "Generated codes, decoded to a waveform; the caption names the word that was asked for.",
    "control": "The first test episode: the model reads the sensors and acts; every figure is one moment.",
    "forecast": "Past readings, then the truth (dashed), the median of the model's samples and its 90 % band.",
    "retrieval": "Row finds column: share of queries whose nearest neighbour is of the same class, in percent.",
}


def _texts(result: Result, world: Path) -> str:
    made = []
    heard = any("audio" in p for s in result.samples for p in s["prompt"]["segments"])
    for sample in result.samples[: SOUNDS if heard else None]:
        said = esc(sample["said"] or "(nothing)")
        wanted = "" if sample["right"] else f"<small>right: {esc(truth(sample['label']))}</small>"
        made.append(tile(media.line(sample["prompt"], world), f"{said}{wanted}", sample["right"]))
    return tiles(made, "sounds" if heard else "") if made else ""


def truth(label: Any) -> str:
    """A label in words."""
    if isinstance(label, list):
        return " ".join(WORDS[part] if isinstance(part, int) else str(part) for part in label)
    return NUMBERS[label] if isinstance(label, int) else str(label)


def _judged(sample: Mapping[str, Any]) -> str:
    seen = "" if sample["judged"] == sample["label"] else f"<small>judged: {WORDS[sample['judged']]}</small>"
    return f"{WORDS[sample['label']]}{seen}"


def _images(result: Result, world: Path) -> str:
    return tiles(tile(media.picture(s["made"], 96), _judged(s), s["judged"] == s["label"]) for s in result.samples)


def _rests(result: Result, world: Path) -> str:
    made = []
    for s in result.samples:
        pair = "".join(f'<span class="half">{media.picture(s[k], 80)}</span>' for k in ("made", "truth") if k in s)
        made.append(tile(f'<div class="pair">{pair}</div>', _judged(s), s["judged"] == s["label"]))
    return tiles(made)


def _speech(result: Result, world: Path) -> str:
    made = []
    for s in result.samples[:SOUNDS]:
        clip = media.sound(np.asarray(s["made"].samples, np.float32).reshape(-1), int(s["made"].rate_hz))
        made.append(tile(clip, _judged(s), s["judged"] == s["label"]))
    return tiles(made, "sounds")


def _retrieval(result: Result, world: Path) -> str:
    names = [source.removeprefix("pair_") for source in result.task.sources]
    cells = [[result.parts.get(f"{a} -> {b}") for b in names] for a in names]
    colours = [COLOURS["audio" if n == "speech" else n] for n in names]
    return heat(names, names, cells, colours)


def _control(result: Result, world: Path) -> str:
    plant, made = PLANTS[result.task.sources[0]], []
    for s in result.samples:
        rows = np.asarray(s["observations"], np.float64).reshape(len(s["observations"]), -1)
        actions = s.get("actions")
        known = ", ".join(f"{k} {number(result.parts[k])}" for k in ("random", "expert") if k in result.parts)
        about = f"return {number(s['return'])} in {len(rows)} steps of {plant.step_s:.3g} s ({known})"
        curves = plants.curves(plant, rows, None if actions is None else np.asarray(actions))
        made.append(f'{plants.strip(plant.name, rows, plant.step_s)}{curves}<p class="hint">{esc(about)}</p>')
    return "".join(made)


def _forecast(result: Result, world: Path) -> str:
    return tiles((tile(forecast_figure(s), "") for s in result.samples[:9]), "broad")


def forecast_figure(sample: Mapping[str, Any], width: int = 236, height: int = 96) -> str:
    """Past, truth, median and band of one forecast."""
    past, true, median = (np.asarray(sample[k], np.float64).reshape(-1) for k in ("past", "truth", "median"))
    low, high = (np.asarray(sample[k], np.float64).reshape(-1) for k in ("low", "high"))
    every = np.concatenate([past, true, median, low, high])
    bottom, top, total = every.min(), max(every.max(), every.min() + 1e-9), len(past) + len(true)

    def x(i: int) -> float:
        return 4 + (width - 8) * i / (total - 1)

    def y(v: float) -> float:
        return float(6 + (height - 12) * (top - v) / (top - bottom))

    ahead = [x(len(past) + i) for i in range(len(true))]
    edge = [*zip(ahead, map(y, high)), *reversed(list(zip(ahead, map(y, low))))]
    band = f'<polygon points="{" ".join(f"{a:.1f},{b:.1f}" for a, b in edge)}" fill="{COLOURS["image"]}" opacity=".22"/>'
    now = f'<line x1="{x(len(past) - 1):.1f}" x2="{x(len(past) - 1):.1f}" y1="2" y2="{height - 2}" class="rule"/>'
    link = [x(len(past) - 1)]
    lines = [
        media.polyline([x(i) for i in range(len(past))], [y(v) for v in past], COLOURS["sensor"]),
        media.polyline(link + ahead, [y(v) for v in (past[-1], *true)], "var(--soft)", 'stroke-dasharray="3 3"'),
        media.polyline(link + ahead, [y(v) for v in (past[-1], *median)], COLOURS["image"]),
    ]
    return f'<svg viewBox="0 0 {width} {height}" width="{width}" height="{height}">{now}{band}{"".join(lines)}</svg>'


def _nothing(result: Result, world: Path) -> str:
    return ""


GALLERIES: dict[str, Callable[[Result, Path], str]] = {
    "text": _texts,
    "image": _images,
    "rest": _rests,
    "speech": _speech,
    "retrieval": _retrieval,
    "control": _control,
    "forecast": _forecast,
    "bits": _nothing,
}


def missing(result: Result, world: Path) -> str:
    """What stays right when one of two modalities that say the same is taken away."""
    bars = [bar(float(v), number(float(v), True), _missing_colour(k), k) for k, v in result.parts.items()]
    rows = material.lines(world, result.task.sources[0], "test")[:1]
    shown = "".join(f'<div class="ask">{media.line(row, world)}</div>' for row in rows)
    note = "The picture and the voice name the same digit. Share of right answers with both, and with either one taken away."
    return (
        f'<article class="card"><p class="note">{note}</p><div class="split">{shown}<div>{"".join(bars)}</div></div></article>'
    )


def _missing_colour(name: str) -> str:
    kept = {"image removed": "audio", "audio removed": "image"}.get(name)
    return COLOURS[kept] if kept else "var(--ink)"
