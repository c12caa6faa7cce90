"""PNG pictures of a run, drawn from its `metrics.jsonl` and `speed.jsonl`: no tracker needed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from weft.training.tracking import read_jsonl

Series = dict[str, tuple[list[int], list[float]]]
PICTURES = {
    "loss": ("loss",),
    "loss_by_modality": ("loss/",),
    "z_loss": ("z_loss", "router_z_loss"),
    "held_out": ("eval/loss", "eval/loss/"),
    "evaluation": ("eval/",),
    "learning_rate": ("lr",),
    "grad_norm": ("grad_norm", "grad_norm/"),
    "router": ("router/",),
    "token_share": ("token_share/",),
    "modality_use": ("use/",),
    "data_lost": ("data/",),
}


def draw(folder: Path) -> list[Path]:
    """Draw every picture for which the run has figures into `folder/plots`; returns the files."""
    rows = read_jsonl(folder / "metrics.jsonl")
    series = collect(rows)
    found = [
        _picture(folder / "plots" / f"{name}.png", _chosen(series, name, prefixes), name, "step")
        for name, prefixes in PICTURES.items()
    ]
    speed = collect(read_jsonl(folder / "speed.jsonl"))
    found.append(
        _picture(folder / "plots" / "speed.png", {k: v for k, v in speed.items() if k == "tokens_per_s"}, "speed", "step")
    )
    return [path for path in found if path is not None]


def collect(rows: list[dict[str, Any]]) -> dict[str, tuple[list[int], list[float]]]:
    """Rows -> name -> (steps, values)."""
    series: dict[str, tuple[list[int], list[float]]] = {}
    for row in rows:
        for name, value in row.items():
            if name != "step" and isinstance(value, int | float):
                steps, values = series.setdefault(name, ([], []))
                steps.append(int(row["step"]))
                values.append(float(value))
    return series


NOT = {"evaluation": ("eval/loss", "eval/z_loss", "eval/router_z_loss")}
"""Figures that stand elsewhere: a hook's answers are not drawn on the scale of losses."""


def _belongs(name: str, prefixes: tuple[str, ...]) -> bool:
    return any(name.startswith(p) if p.endswith("/") else name == p for p in prefixes)


def _chosen(series: Series, picture: str, prefixes: tuple[str, ...]) -> Series:
    """The figures of one picture; of the data's losses only those that occurred."""
    found = {k: v for k, v in series.items() if _belongs(k, prefixes) and not k.startswith(NOT.get(picture, ()))}
    return {k: v for k, v in found.items() if picture != "data_lost" or any(v[1])}


def smooth(values: list[float], window: int) -> list[float]:
    """Mean over the last `window` values."""
    out, total = [], 0.0
    for i, value in enumerate(values):
        total += value - (values[i - window] if i >= window else 0.0)
        out.append(total / min(i + 1, window))
    return out


def _picture(path: Path, series: dict[str, tuple[list[int], list[float]]], title: str, axis: str) -> Path | None:
    if not series:
        return None
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    path.parent.mkdir(parents=True, exist_ok=True)
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes, colours = figure.add_subplot(), colormaps["tab10" if len(series) <= 10 else "tab20"]
    for i, (name, (steps, values)) in enumerate(sorted(series.items())[:24]):
        window = max(1, len(values) // 50)
        line = axes.plot(
            steps,
            smooth(values, window),
            label=name,
            color=colours(i % 20),
            linewidth=1.4,
            marker="." if len(values) < 12 else "",
        )[0]
        if window > 1:
            axes.plot(steps, values, color=line.get_color(), alpha=0.2, linewidth=0.6)
    axes.set_title(title.replace("_", " "))
    axes.set_xlabel(axis)
    axes.grid(alpha=0.3)
    figure.legend(fontsize=7, loc="outside right upper")  # beside the curves: a router has twenty of them
    FigureCanvasAgg(figure).print_png(str(path))
    return path
