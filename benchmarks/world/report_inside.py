"""What goes on inside the trained model: which segments mattered for an answer, which experts work for which modality.

In: the loaded model, the world. Out: HTML. Both are measured on held-out documents with the weights that were evaluated.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from weft.benchmarks.world import material, report_media
from weft.benchmarks.world.documents import RECIPES
from weft.benchmarks.world.report_charts import bar, heat
from weft.benchmarks.world.report_media import esc
from weft.benchmarks.world.tasks import prompt
from weft.inference.explain import Explanation
from weft.inference.feed import batch_of, part_of
from weft.tokenizers.inspect import COLOURS
from weft.tokenizers.manifest import load_document

EXAMPLES = ("sum", "redundant", "motor_fault")
"""Sources of which one test document each is explained: several segments in the prompt."""
PROBES = 8
"""Held-out documents per source whose routing is counted."""


def explained(model: Any, world: Path) -> str:
    """Leave-one-out and sensitivity of the model's own answers to some test documents."""
    cards = []
    for source in EXAMPLES:
        rows = material.lines(world, source, "test")
        row = rows[len(rows) // 3]
        asked = list(load_document(prompt(row), world).segments)
        reply = model.generate(asked, max_tokens=24)
        if reply.text:
            cards.append(card(prompt(row)["segments"], reply.text, model.explain(asked, reply), world))
    return "".join(cards)


def card(pieces: list[dict[str, Any]], said: str, found: Explanation, world: Path) -> str:
    """The segments of one prompt with what each was worth, and the answer with how sure each token was."""
    asked = [part for part in found.parts if part.role == "prompt"]
    most = max([abs(part.leave_one_out or 0.0) for part in asked] + [1e-9])
    rows = []
    for piece, part in zip(pieces, asked):
        colour, lost, share = COLOURS[part.modality], part.leave_one_out or 0.0, part.gradient or 0.0
        bars = bar(abs(lost) / most, f"{lost:+.2f} nats", colour if lost >= 0 else "var(--bad)", "without it")
        bars += bar(share, f"{100 * share:.0f} %", "var(--soft)", "sensitivity")
        name = f'<i class="dot" style="background:{colour}"></i>{part.modality}<small>{part.tokens} tokens</small>'
        shown = report_media.piece(piece, world)
        rows.append(f'<div class="why"><div class="name">{name}</div><div class="shown">{shown}</div><div>{bars}</div></div>')
    words = "".join(_token(word, logprob) for word, logprob in found.tokens)
    answer = f'<p class="answer"><span>it said</span> <q class="said">{esc(said)}</q> {words}</p>'
    return f'<article class="card">{"".join(rows)}{answer}</article>'


def _token(word: str, logprob: float) -> str:
    sure = float(np.exp(logprob))
    style = f"background:color-mix(in srgb, var(--good) {10 + 60 * sure:.0f}%, transparent)"
    visible = "".join(c if c.isprintable() and c != " " else "\u00b7" for c in word)
    return f'<i class="token" style="{style}" title="p = {sure:.3f}">{esc(visible)}</i>'


@torch.no_grad()
def router_load(model: Any, world: Path) -> dict[str, np.ndarray]:
    """modality -> float64 [routed layers, experts]: shares of its tokens' choices over held-out documents of every source."""
    streams = []
    for source in RECIPES:
        split = next((s for s in ("test", "val") if (world / f"{source}.{s}.jsonl").exists()), None)
        for row in material.lines(world, source, split)[:PROBES] if split else []:
            streams.append(model.tokenizer.encode(load_document(row, world)))
    load = model.model(batch_of([part_of(stream) for stream in streams], model.model.device)).router.load
    found = {}
    for m, name in enumerate(model.tokenizer.modalities):
        counts = load[:, m].double().cpu().numpy() if load.numel() else np.zeros((0, 0))
        if counts.sum():
            found[name] = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    return found


def routed(load: dict[str, np.ndarray]) -> str:
    """One heat map per routed layer."""
    if not load:
        return ""
    names = list(load)
    layers, experts = next(iter(load.values())).shape
    maps = []
    for layer in range(layers):
        cells = [[float(v) for v in load[name][layer]] for name in names]
        table = heat(names, [str(e + 1) for e in range(experts)], cells, [COLOURS[name] for name in names])
        maps.append(f'<figure class="map"><figcaption>routed layer {layer + 1}</figcaption>{table}</figure>')
    return f'<div class="maps">{"".join(maps)}</div>'
