"""The data card of the sample world: where each part comes from, its licence, what is held out, what it is not good for."""

from __future__ import annotations

from typing import Any

from weft.benchmarks.world.speech import ACCENTS, VARIANTS

PARTS = (
    (
        "pictures",
        'UCI "Optical recognition of handwritten digits" (E. Alpaydin, C. Kaynak, 1998), the 1,797 scans inside scikit-learn; '
        "training copies are slightly distorted by us",
        "CC BY 4.0 (data), BSD-3-Clause (scikit-learn)",
        "by scan: 40 of each class for test, 10 for val",
    ),
    (
        "speech",
        "SYNTHETIC: espeak-ng through espeakng-loader {espeak}, 8 kHz",
        "program GPL-3.0-or-later, used as a tool; nothing of it is in the recordings",
        "by voice: the variants {variants}, and the accents {accents}",
    ),
    ("video", "the scans above, moved over a 16 x 16 canvas by us", "as the pictures", "by scan"),
    ("prose", "the topics of Python's own help (`pydoc_data.topics`), white space folded", "PSF License", "by topic"),
    (
        "control",
        "gymnasium's CartPole-v1, Pendulum-v1, MountainCarContinuous-v0, Acrobot-v1, played by our scripted experts",
        "MIT (gymnasium)",
        "by episode seed",
    ),
    ("motor", "simulated by us: current, vibration, temperature, four faults", "as weft", "by random draw"),
    ("questions, answers, captions", "written by us", "as weft", "-"),
)

CARD = """# The weft sample world

A small world in which every modality says something about another. Built by `weft sample-world` from what the installed
packages hold; nothing is downloaded. Seed {seed}, scale {scale}: building again gives the same bytes with the same versions
({versions}).

## Parts
| part | source | licence | held out |
|---|---|---|---|
{parts}

## Experts (mean return of {episodes} episodes)
| environment | random | expert |
|---|---|---|
{returns}

## Sources (documents)
| source | train | val | test | share of training tokens, % |
|---|---|---|---|---|
{sources}

## Limits
The speech comes from one formant synthesiser; its voices differ less than people do, so figures on it say nothing about human
speech. The scans come from 13 writers who appear on both sides of the split (the scans themselves do not). The motor is a
formula, not a machine. Good for teaching, testing and comparing; not for claims about the real world.
"""


def data_card(world: dict[str, Any]) -> str:
    """README.md of a built world, from its world.json."""
    versions = world["versions"]
    control = [f"| {n} | {r['random']:.1f} | {r['expert']:.1f} |" for n, r in world["control"].items()]
    sources = [
        f"| {name} | {s['documents']['train']} | {s['documents']['val']} | {s['documents']['test']} | {s['share']:g} |"
        for name, s in world["sources"].items()
    ]
    parts = "\n".join(f"| {' | '.join(part)} |" for part in PARTS)
    return CARD.format(
        seed=world["seed"],
        scale=world["scale"],
        versions=", ".join(f"{name} {number}" for name, number in versions.items()),
        parts=parts.format(
            espeak=versions["espeakng-loader"],
            variants=", ".join(VARIANTS["test"]),
            accents=" and ".join(sorted(set(ACCENTS["test"]) - set(ACCENTS["train"]))),
        ),
        episodes=next(iter(world["control"].values()))["episodes"],
        returns="\n".join(control),
        sources="\n".join(sources),
    )
