"""The four environments drawn from their observations, as a strip of figures and as curves.

In: observations [n C] and actions of one episode. Out: inline SVG. Geometry as in gymnasium's own renderers.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from weft.benchmarks.world.control import Plant
from weft.benchmarks.world.report_media import esc, polyline
from weft.tokenizers.inspect import COLOURS

WIDTH, HEIGHT = 96, 84
INK, SOFT = "var(--ink)", "color-mix(in srgb, var(--soft) 55%, transparent)"
WARM, COOL = COLOURS["image"], COLOURS["sensor"]
CHANNELS = (COOL, WARM, COLOURS["audio"], COLOURS["video"], "#a3902f", COLOURS["text"])


def _rod(x0: float, y0: float, x1: float, y1: float, colour: str, width: float = 5) -> str:
    ends = f'x1="{x0:.1f}" y1="{y0:.1f}" x2="{x1:.1f}" y2="{y1:.1f}"'
    return f'<line {ends} stroke="{colour}" stroke-width="{width}" stroke-linecap="round"/>'


def _joint(x: float, y: float, r: float = 3.2) -> str:
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{r}" fill="{INK}"/>'


def cartpole(o: np.ndarray) -> str:
    """Cart on a rail of 4.8 m, pole upright at angle 0."""
    x, y, angle = WIDTH / 2 + float(o[0]) / 2.4 * (WIDTH / 2 - 12), 62.0, float(o[2])
    rail = f'<line x1="4" x2="{WIDTH - 4}" y1="70" y2="70" stroke="{SOFT}" stroke-width="2"/>'
    cart = f'<rect x="{x - 11:.1f}" y="{y - 4}" width="22" height="11" rx="3" fill="{INK}"/>'
    return rail + cart + _rod(x, y - 4, x + 44 * np.sin(angle), y - 4 - 44 * np.cos(angle), WARM)


def pendulum(o: np.ndarray) -> str:
    """Rod upright at angle 0; positive angles turn it to the left."""
    x, y = WIDTH / 2, HEIGHT / 2
    ring = f'<circle cx="{x}" cy="{y}" r="34" fill="none" stroke="{SOFT}" stroke-dasharray="1 4"/>'
    return ring + _rod(x, y, x - 33 * float(o[1]), y - 33 * float(o[0]), WARM, 6) + _joint(x, y)


def mountain_car(o: np.ndarray) -> str:
    """Car in a valley, flag at 0.45."""

    def at(position: float) -> tuple[float, float]:
        return 5 + (position + 1.2) / 1.8 * (WIDTH - 10), 74 - 46 * (0.45 * np.sin(3 * position) + 0.55)

    hill = [at(p) for p in np.linspace(-1.2, 0.6, 40)]
    (fx, fy), (x, y) = at(0.45), at(float(o[0]))
    flag = _rod(fx, fy, fx, fy - 17, INK, 1.4) + f'<path d="M{fx:.1f} {fy - 17:.1f}l9 3.5-9 3.5z" fill="{COLOURS["audio"]}"/>'
    return (
        polyline([p[0] for p in hill], [p[1] for p in hill], SOFT)
        + flag
        + f'<circle cx="{x:.1f}" cy="{y - 5:.1f}" r="5" fill="{WARM}"/>'
    )


def acrobot(o: np.ndarray) -> str:
    """Two links hanging down at angles 0; the line is the height to reach."""
    x, y, length = WIDTH / 2, HEIGHT / 2 + 2, 19.0
    first, second = np.arctan2(o[1], o[0]), np.arctan2(o[3], o[2])
    ex, ey = x + length * np.sin(first), y + length * np.cos(first)
    tx, ty = ex + length * np.sin(first + second), ey + length * np.cos(first + second)
    ends = f'x1="8" x2="{WIDTH - 8}" y1="{y - length}" y2="{y - length}"'
    goal = f'<line {ends} stroke="{COLOURS["audio"]}" stroke-dasharray="3 3"/>'
    return goal + _rod(x, y, ex, ey, COOL) + _rod(ex, ey, tx, ty, WARM) + _joint(x, y) + _joint(ex, ey, 2.4)


FIGURES: dict[str, Callable[[np.ndarray], str]] = {
    "CartPole-v1": cartpole,
    "Pendulum-v1": pendulum,
    "MountainCarContinuous-v0": mountain_car,
    "Acrobot-v1": acrobot,
}


def strip(name: str, observations: np.ndarray, step_s: float, count: int = 10) -> str:
    """Up to `count` moments of an episode, evenly spread, the first and the last included."""
    chosen = np.unique(np.linspace(0, len(observations) - 1, min(count, len(observations))).round().astype(int))
    boxes = []
    for i in chosen:
        when = f'<text x="{WIDTH / 2}" y="{HEIGHT + 12}" class="axis" text-anchor="middle">{i * step_s:.1f} s</text>'
        boxes.append(f'<svg viewBox="0 0 {WIDTH} {HEIGHT + 16}" class="moment">{FIGURES[name](observations[i])}{when}</svg>')
    return f'<div class="moments">{"".join(boxes)}</div>'


def curves(plant: Plant, observations: np.ndarray, actions: np.ndarray | None, width: int = 560) -> str:
    """Every channel over time in its own range, the actions as steps below."""
    n, height, left = len(observations), 84, 4
    xs = np.linspace(left, width - 4, n)
    lines, legend = [], []
    for c, channel in enumerate(plant.channels):
        values = observations[:, c].astype(np.float64)
        low, high = values.min(), values.max()
        level = (values - low) / (high - low) if high > low else np.full(n, 0.5)
        lines.append(polyline(xs.tolist(), (height - 6 - level * (height - 14)).tolist(), CHANNELS[c]))
        about = f"{channel} {low:.2g} to {high:.2g} {plant.units[c] if plant.units[c] != '1' else ''}".strip()
        legend.append(f'<span><i style="background:{CHANNELS[c]}"></i>{esc(about)}</span>')
    bottom = height
    if actions is not None and len(actions):
        values = np.asarray(actions, np.float64).reshape(len(actions), -1)[:, 0]
        low, high = (0.0, float(plant.choices - 1)) if plant.choices else (plant.low, plant.high)
        level = np.clip((values - low) / (high - low), 0, 1)
        at = np.linspace(left, width - 4, len(values) + 1)
        steps = "".join(
            f"{'M' if i == 0 else 'L'}{at[i]:.1f} {height + 24 - 20 * v:.1f}H{at[i + 1]:.1f}" for i, v in enumerate(level)
        )
        lines.append(f'<path d="{steps}" fill="none" stroke="{COLOURS["action"]}" stroke-width="1.2"/>')
        legend.append(f'<span><i style="background:{COLOURS["action"]}"></i>action</span>')
        bottom += 28
    body = "".join(lines)
    return f'<svg viewBox="0 0 {width} {bottom}" class="wide">{body}</svg><div class="legend">{"".join(legend)}</div>'
