"""The page itself: which sections there are and what they say.

In: everything that is known about a quickstart. Out: one HTML file without scripts that loads nothing.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from string import Template
from typing import Any

from weft.benchmarks.world import material
from weft.benchmarks.world import report_inside as inside
from weft.benchmarks.world import report_samples as samples
from weft.benchmarks.world.digits import WORDS
from weft.benchmarks.world.evaluate import Result
from weft.benchmarks.world.report_charts import curve, number, stacked
from weft.benchmarks.world.report_media import esc
from weft.benchmarks.world.report_table import grouped, table
from weft.benchmarks.world.report_verdicts import Scores, Verdict
from weft.tokenizers.inspect import COLOURS
from weft.training.plots import collect
from weft.training.tracking import read_jsonl


@dataclass(frozen=True)
class Facts:
    """What the page is about."""

    root: Path
    results: Mapping[str, Result]
    found: Mapping[str, Verdict]
    scores: Scores
    figures: Mapping[str, Any]
    """What report.json holds."""
    model: Any

    @property
    def world(self) -> Path:
        """Where the sample world lies."""
        return self.root / "world"


def page(facts: Facts) -> str:
    """The whole page."""
    template = Template(Path(__file__).with_name("report.html").read_text(encoding="utf-8"))
    parts = [
        ("results", "Results", RESULTS_NOTE, table(facts.results, facts.found, facts.scores)),
        ("samples", "Look and listen", SAMPLES_NOTE, galleries(facts)),
        ("missing", "A modality missing", "", without(facts)),
        ("why", "What mattered", WHY_NOTE, inside.explained(facts.model, facts.world)),
        ("learning", "How it learned", LEARNING_NOTE, learning(facts)),
        ("experts", "Who works for whom", EXPERTS_NOTE, experts(facts)),
        ("time", "Where the time went", "", times(facts)),
        ("again", "Do it again", "", again(facts)),
    ]
    shown = [part for part in parts if part[3]]
    sections = [f'<section id="{k}"><h2>{title}</h2>{_note(note)}{body}</section>' for k, title, note, body in shown]
    return template.substitute(
        title="One small model that reads, listens, watches, speaks, draws, searches and acts",
        lead=lead(facts),
        facts=headline(facts),
        nav="".join(f'<a href="#{k}">{title}</a>' for k, title, _, _ in shown),
        sections="\n".join(sections),
        foot="Made by <code>weft quickstart</code>. This file is complete: it runs no script and loads nothing.",
    )


RESULTS_NOTE = (
    "Held-out data: scans, voices and accents, recordings and environment seeds that training never saw. One set of weights "
    "answers every row through the public interface; next to it stands a method built for that row alone."
)
SAMPLES_NOTE = "Evenly spread over the test documents, none picked by hand. Green: right. Red: wrong, and shown all the same."
WHY_NOTE = (
    "For three test documents: by how many nats the model's own answer becomes less likely without each segment, and each "
    "segment's share of gradient times input. The darker a token of the answer, the surer the model was."
)
LEARNING_NOTE = "Training loss in nats per token, by modality, over optimizer steps: smoothed, with the raw values behind."
EXPERTS_NOTE = (
    "Share of each modality's tokens that goes to each routed expert, in percent, counted on held-out documents of every "
    "source. An even row uses all experts alike; rows that differ show experts that specialised."
)


def _note(text: str) -> str:
    return f'<p class="note">{text}</p>' if text else ""


def lead(facts: Facts) -> str:
    """What was done, in two sentences."""
    minutes = sum(facts.figures["seconds"].values()) / 60
    about = facts.figures["machine"]
    where = about["gpu"] or f"{about['threads']} thread{'s' if about['threads'] != 1 else ''} of {about['cpu'] or 'a CPU'}"
    return (
        f"Trained from nothing on a sample world of text, images, video, audio, sensors and actions, and examined on "
        f"{len(facts.results)} tasks, in {minutes:.0f} minutes on {esc(where)}."
    )


def headline(facts: Facts) -> str:
    """The figures to remember."""
    found, figures = facts.found.values(), facts.figures
    judged = [v for v in found if v.passed is not None]
    boxes = [
        (f"{sum(bool(v.passed) for v in judged)} of {len(judged)}", "tasks hold their must"),
        (f"{sum(v.reached for v in found)} of {sum(v.aim is not None for v in found)}", "reach their aim"),
        (f"{figures['parameters'] / 1e6:.2f} M", f"parameters, {figures['active_parameters'] / 1e6:.2f} M active per token"),
        (number(figures["tokens_per_second"]), "tokens a second while training"),
        (f"{figures['seconds'].get('training', 0) / 60:.1f} min", "of training"),
        (f"{sum(figures['seconds'].values()) / 60:.1f} min", "for everything"),
    ]
    return "".join(f"<div><b>{value}</b><span>{word}</span></div>" for value, word in boxes)


def galleries(facts: Facts) -> str:
    """Samples of every task, in the order of the table."""
    cards = []
    for heading, names in grouped(facts.results).items():
        made = [samples.gallery(facts.results[name], facts.world) for name in names]
        small = heading in ("Acting", "Finding")
        cards.append(f'<div class="grid two">{"".join(made)}</div>' if small and len(names) > 1 else "".join(made))
    return "".join(cards)


def without(facts: Facts) -> str:
    """Every task that takes a modality away."""
    return "".join(samples.missing(r, facts.world) for r in facts.results.values() if r.task.drop)


def learning(facts: Facts) -> str:
    """Loss per modality, and held-out loss where it was taken."""
    series = collect(read_jsonl(facts.root / "run" / "metrics.jsonl"))
    cards = []
    for name, colour in {**COLOURS, "all": "var(--ink)"}.items():
        key, lines = "loss" if name == "all" else f"loss/{name}", {}
        if key in series:
            lines["training"] = (*series[key], colour)
        if f"eval/{key}" in series:
            lines["held out"] = (*series[f"eval/{key}"], "var(--bad)")
        chart = curve(lines, floor=0.0)
        if chart:
            dot = f'<i class="dot" style="background:{colour}"></i>'
            cards.append(f'<article class="card"><h3>{dot}{name}</h3>{chart}</article>')
    return f'<div class="grid">{"".join(cards)}</div>' if cards else ""


def experts(facts: Facts) -> str:
    """Routing of the trained model."""
    maps = inside.routed(inside.router_load(facts.model, facts.world))
    return f'<article class="card">{maps}</article>' if maps else ""


def times(facts: Facts) -> str:
    """Stages, tasks of the evaluation, throughput over the training."""
    stages = {k: float(v) for k, v in facts.figures["seconds"].items()}
    tasks = {name: r.seconds for name, r in sorted(facts.results.items(), key=lambda item: -item[1].seconds)[:8]}
    series = collect(read_jsonl(facts.root / "run" / "speed.jsonl")).get("tokens_per_s")
    cards = [f'<article class="card"><h3>Stages</h3><p class="note">Seconds of wall clock.</p>{stacked(stages)}</article>']
    more = [f'<article class="card"><h3>Evaluation</h3><p class="note">The longest tasks.</p>{stacked(tasks)}</article>']
    if series:
        chart = curve({"tokens a second": (series[0][1:], series[1][1:], "#2a9d8f")}, floor=0.0, width=520, height=130)
        if chart:
            more.append(
                f'<article class="card"><h3>Throughput</h3><p class="note">Tokens a second, over steps.</p>{chart}</article>'
            )
    return "".join(cards) + f'<div class="grid two">{"".join(more)}</div>'


def again(facts: Facts) -> str:
    """Commands, versions, machine."""
    commands = "\n".join(esc(line) for line in repeat(facts.root))
    listed = [_list("Machine", facts.figures["machine"]), _list("Versions", facts.figures["versions"])]
    return f'<article class="card"><pre>{commands}</pre><div class="grid two">{"".join(listed)}</div></article>'


def _list(title: str, values: Mapping[str, Any]) -> str:
    rows = "".join(f"<dt>{esc(k).replace('_', ' ')}</dt><dd>{esc(v)}</dd>" for k, v in values.items() if v is not None)
    return f"<div><h3>{title}</h3><dl>{rows}</dl></div>"


def repeat(root: Path) -> list[str]:
    """The commands that make this folder again and use what is in it."""
    path = root / "quickstart.json"
    asked = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    flags = {"minutes": "minutes", "scale": "scale", "seed": "seed", "max_steps": "steps", "limit": "limit", "device": "device"}
    skipped = "minutes" if asked.get("max_steps") else "max_steps"
    given = [f"--{flag} {asked[key]}" for key, flag in flags.items() if key != skipped and asked.get(key) is not None]
    inside_here = root.is_absolute() and root.is_relative_to(Path.cwd())
    where = root.relative_to(Path.cwd()) if inside_here else root
    scan = material.segment(material.lines(root / "world", "digit_image", "test")[0], "image")
    return [
        "# the same again, in another folder",
        " ".join(["weft quickstart --out runs/again", *given]),
        "# only the data",
        f"weft sample-world worlds/again --scale {asked.get('scale', 1.0)} --seed {asked.get('seed', 0)}",
        "# use the model",
        f'weft generate {where}/run "draw seven" --produce image --grid 4x4',
        f'weft predict {where}/run {where}/world/{scan} "digit?" --choices {",".join(WORDS)}',
    ]
