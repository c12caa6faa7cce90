"""What is spoken and by whom: digits, digit strings and phrases in many voices, whole voices and accents held out.

In: a seed. Out: `Clip`s per set and split, and their FLAC files (8 kHz mono) written by a fresh process (`voices.py`).
All of it is SYNTHETIC speech by espeak-ng (GPL-3.0; its output is free): one formant engine whose voices are parameter
variants, which is why whole accents and variants are kept for testing.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from weft.benchmarks.world.digits import NUMBERS, spoken
from weft.benchmarks.world.splits import share

ACCENTS = {
    "train": ("en-US", "en", "en-GB-x-rp", "en-GB-x-gbclan", "en-GB-x-gbcwmd"),
    "val": ("en-US-nyc", "en"),
    "test": ("en-GB-scotland", "en-029", "en-US"),
}
"""The first accents of val and test are spoken in no training clip; the last one is, by other variants."""
VARIANTS = {
    "train": (
        *("m1", "m2", "m3", "m4", "m5", "m6", "m8", "f1", "f2", "f4", "f5"),
        *(
            "Alex",
            "Alicia",
            "Andy",
            "Annie",
            "Denis",
            "adam",
            "anika",
            "belinda",
            "david",
            "edward",
            "john",
            "linda",
            "steph",
            "paul",
        ),
    ),
    "val": ("robert", "steph2"),
    "test": ("m7", "f3", "Andrea", "Michael", "ian", "victor"),
}
STUDIO = ("en-US+m3", "en-US+f2", "en-GB-x-rp+m1", "en-GB-x-rp+f4")
"""Training voices that the model learns to speak with."""
PHRASES = (
    *("yes", "no", "stop", "go", "left", "right", "up", "down", "on", "off", "turn left", "turn right"),
    *("good morning", "thank you", "start the motor", "stop the motor", "open the door", "close the door"),
    *("the motor is hot", "what is the sum"),
)
COUNTS = {
    "digit": {"train": 3000, "val": 100, "test": 500},
    "string": {"train": 2400, "val": 50, "test": 200},
    "phrase": {"train": 400, "val": 20, "test": 60},
    "studio": {"train": 320},
}


@dataclass(frozen=True)
class Clip:
    """One utterance. `path` is relative to the world's folder."""

    path: str
    voice: str
    text: str
    words_per_minute: int
    pitch: int
    digits: tuple[int, ...] = ()


def voices(split: str) -> list[str]:
    """accent+variant of a split. Val and test voices have an unseen variant, and most of them an unseen accent too."""
    return [f"{accent}+{variant}" for variant in VARIANTS[split] for accent in ACCENTS[split]]


def plan(seed: int, scale: float = 1.0) -> dict[str, dict[str, list[Clip]]]:
    """set -> split -> clips. Classes and voices come round equally often; rate, pitch and strings are drawn."""
    found: dict[str, dict[str, list[Clip]]] = {}
    for kind, counts in COUNTS.items():
        found[kind] = {}
        for number, (split, count) in enumerate(counts.items()):
            draw = np.random.default_rng([seed, 2, sorted(COUNTS).index(kind), number])
            size = max(20, round(count * share(split, scale)))
            found[kind][split] = _clips(kind, split, size, draw)
    return found


def _clips(kind: str, split: str, count: int, draw: np.random.Generator) -> list[Clip]:
    speakers = list(STUDIO) if kind == "studio" else voices(split)
    order = [speakers[i % len(speakers)] for i in range(count)]
    if kind != "studio":
        order = [order[i] for i in draw.permutation(count)]
    clips = []
    for i, voice in enumerate(order):
        digits: tuple[int, ...] = ()
        if kind == "phrase":
            sentences = (*PHRASES, *NUMBERS[10:])
            text = sentences[i % len(sentences)]
        else:
            drawn = tuple(int(d) for d in draw.integers(0, 10, 2 + i % 3))
            digits = drawn if kind == "string" else (i // len(STUDIO) % 10 if kind == "studio" else i % 10,)
            text = spoken(list(digits))
        rate, pitch = (170, 50) if kind == "studio" else (int(draw.integers(150, 211)), int(draw.integers(20, 81)))
        if kind == "studio":
            rate, pitch = int(draw.choice([165, 175])), int(draw.choice([45, 55]))
        clips.append(Clip(f"media/speech/{kind}/{split}/{i:05d}.flac", voice, text, rate, pitch, digits))
    return clips


def record(clips: list[Clip], folder: Path) -> None:
    """Write the clips' files in one fresh process. Raises OSError with its message if it fails."""
    jobs = [
        json.dumps(
            {
                "path": str(folder / clip.path),
                "voice": f"gmw/{clip.voice}",
                "text": clip.text,
                "words_per_minute": clip.words_per_minute,
                "pitch": clip.pitch,
            }
        )
        for clip in sorted(clips, key=lambda clip: (clip.voice, clip.path))
    ]
    program = Path(__file__).with_name("voices.py")
    done = subprocess.run(
        [sys.executable, "-P", str(program)], input="\n".join(jobs), capture_output=True, text=True, cwd=folder, check=False
    )
    if done.returncode != 0:
        reason = done.stderr.strip().splitlines()[-1] if done.stderr.strip() else f"exit status {done.returncode}"
        raise OSError(f"recording {len(jobs)} utterances failed: {reason}")
