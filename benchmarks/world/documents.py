"""Every document of the sample world as a manifest line: which task, from which material, in which words.

In: `Material` (what the media stages wrote). Out: JSON objects in the manifest format, per source and split; the prompt's
segments are observed, the answer's are targets. `RECIPES` is data: how many documents, and which share of the training
tokens each source should get. `mixture` turns shares into document weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from weft.benchmarks.world.control import PLANTS, fragments
from weft.benchmarks.world.digits import NUMBERS, WORDS, spoken
from weft.benchmarks.world.motor import FAULTS, RATES_HZ, UNITS, run
from weft.benchmarks.world.prose import prose
from weft.benchmarks.world.speech import Clip
from weft.benchmarks.world.splits import share

Piece = dict[str, Any]
Line = dict[str, Any]

QUESTIONS: dict[str, tuple[str, ...]] = {
    "digit": ("digit?", "which digit is this?", "what number is it?", "name the digit."),
    "digits": ("digits?", "which digits are these?", "read the digits."),
    "words": ("words?", "what was said?"),
    "motion": ("motion?", "what moves where?", "which digit goes which way?"),
    "sum": ("sum?", "what is the sum?", "add both."),
    "draw": ("draw {}", "write the digit {}", "show me a {}"),
    "say": ("say {}", "speak the word {}", "pronounce {}"),
    "fault": ("fault?", "what is wrong with the motor?"),
}
"""The first wording is asked half of the time while training, and always in the test."""

CAPTIONS = {
    "image": ("the digit {}", "a handwritten {}", "this is a {}"),
    "speech": ("someone says {}", "a voice says {}"),
    "video": ("a {} moves {}",),
}
STEPS = {1: 0.8, 2: 0.1, 4: 0.1}
"""Steps per control document: the environments are Markov, so one step is the cheapest lesson; a few show a history."""
FORECAST = {"context": 24, "ahead": 8}
"""Readings of the motor's current."""
FAULT_S = 0.4


@dataclass
class Material:
    """Where the media lie (paths relative to the world's folder) and what they show, per split."""

    seed: int
    scale: float
    images: dict[str, list[tuple[str, int]]] = field(default_factory=dict)
    """(path, digit); in the training split the scans come first, then their distorted copies."""
    scans: dict[str, int] = field(default_factory=dict)
    """How many of `images` are undistorted scans."""
    canvases: dict[str, list[tuple[str, tuple[int, ...]]]] = field(default_factory=dict)
    halves: dict[str, list[tuple[str, str, int]]] = field(default_factory=dict)
    videos: dict[str, list[tuple[str, tuple[float, ...], int, str]]] = field(default_factory=dict)
    clips: dict[str, dict[str, list[Clip]]] = field(default_factory=dict)


def text(words: str, role: str = "observed") -> Piece:
    return {"text": words, "role": role}


def image(path: str, role: str = "observed") -> Piece:
    return {"image": path, "role": role}


def audio(path: str, role: str = "observed") -> Piece:
    return {"audio": path, "role": role}


def ask(kind: str, split: str, draw: np.random.Generator, word: str = "") -> Piece:
    """The question in one of its wordings."""
    wordings = QUESTIONS[kind]
    rank = 0 if split == "test" or draw.random() < 0.5 else int(draw.integers(len(wordings)))
    return text(wordings[rank].format(word))


def answer(words: str) -> Piece:
    return text(words, "target")


def sentence_of_sum(a: int, b: int) -> str:
    """Both numbers before their sum: what makes the task learnable from few examples."""
    return f"{WORDS[a]} plus {WORDS[b]} is {NUMBERS[a + b]}"


Made = tuple[list[Piece], dict[str, Any]]
Builder = Callable[[Material, str, int, np.random.Generator], Iterator[Made]]


def _digit_image(m: Material, split: str, count: int, draw: np.random.Generator) -> Iterator[Made]:
    for i in range(count):
        path, digit = m.images[split][i % len(m.images[split])]
        yield [image(path), ask("digit", split, draw), answer(WORDS[digit])], {"label": digit}


def _digits_image(m: Material, split: str, count: int, draw: np.random.Generator) -> Iterator[Made]:
    for i in range(count):
        path, digits = m.canvases[split][i % len(m.canvases[split])]
        yield [image(path), ask("digits", split, draw), answer(spoken(list(digits)))], {"label": list(digits)}


def _heard(kind: str, question: str) -> Builder:
    def build(m: Material, split: str, count: int, draw: np.random.Generator) -> Iterator[Made]:
        for i in range(count):
            clip = m.clips[kind][split][i % len(m.clips[kind][split])]
            label = {"label": clip.digits[0] if len(clip.digits) == 1 else list(clip.digits), "voice": clip.voice}
            yield [audio(clip.path), ask(question, split, draw), answer(clip.text)], label

    return build


def _film(m: Material, split: str, i: int) -> tuple[Piece, int, str]:
    folder, times, digit, direction = m.videos[split][i % len(m.videos[split])]
    return {"video": folder, "times_s": list(times), "role": "observed"}, digit, direction


def _video(m: Material, split: str, count: int, draw: np.random.Generator) -> Iterator[Made]:
    for i in range(count):
        film, digit, way = _film(m, split, i)
        yield [film, ask("motion", split, draw), answer(f"{WORDS[digit]} moving {way}")], {"label": [digit, way]}


def _pick(m: Material, split: str, draw: np.random.Generator, digit: int | None = None) -> tuple[str, int]:
    while True:
        path, found = m.images[split][int(draw.integers(len(m.images[split])))]
        if digit is None or found == digit:
            return path, found


def _spoken(m: Material, split: str, draw: np.random.Generator, digit: int) -> Clip:
    clips = m.clips["digit"][split]
    return clips[int(draw.integers((len(clips) - digit + 9) // 10)) * 10 + digit]  # digits come round in turn


def _sum(m: Material, split: str, count: int, draw: np.random.Generator) -> Iterator[Made]:
    for i in range(count):
        a, b = i % 10, i // 10 % 10
        seen, heard = _pick(m, split, draw, a)[0], _spoken(m, split, draw, b).path
        yield (
            [image(seen), audio(heard), ask("sum", split, draw), answer(sentence_of_sum(a, b))],
            {"label": a + b, "parts": [a, b]},
        )


def _arithmetic(m: Material, split: str, count: int, draw: np.random.Generator) -> Iterator[Made]:
    for i in range(count):
        a, b = i % 10, i // 10 % 10
        yield [text(f"{WORDS[a]} and {WORDS[b]}"), ask("sum", split, draw), answer(sentence_of_sum(a, b))], {"label": a + b}


def _draw(m: Material, split: str, count: int, draw: np.random.Generator) -> Iterator[Made]:
    for i in range(count):
        path, digit = m.images[split][i % m.scans[split]]
        yield [ask("draw", split, draw, WORDS[digit]), image(path, "target")], {"label": digit}


def _half(m: Material, split: str, count: int, draw: np.random.Generator) -> Iterator[Made]:
    """The digit's name before the rest of it, as a sum names its numbers first: what has to be known before it can be drawn."""
    for i in range(count):
        top, bottom, digit = m.halves[split][i % len(m.halves[split])]
        yield [image(top), answer(WORDS[digit]), image(bottom, "target")], {"label": digit}


def _say(m: Material, split: str, count: int, draw: np.random.Generator) -> Iterator[Made]:
    if split == "test":  # the prompts alone: what is right is judged, not compared
        yield from (([ask("say", split, draw, WORDS[i % 10])], {"label": i % 10}) for i in range(count))
        return
    for i in range(count):
        clip = m.clips["studio"]["train"][i % len(m.clips["studio"]["train"])]
        yield [ask("say", split, draw, clip.text), audio(clip.path, "target")], {"label": clip.digits[0], "voice": clip.voice}


def _alone(modality: str) -> Builder:
    def build(m: Material, split: str, count: int, draw: np.random.Generator) -> Iterator[Made]:
        for i in range(count):
            if modality == "image":
                path, digit = m.images[split][i % m.scans[split]]
                yield [image(path)], {"label": digit, "pair": f"digit-{digit}"}
            elif modality == "speech":
                clip = m.clips["digit"][split][i % len(m.clips["digit"][split])]
                yield [audio(clip.path)], {"label": clip.digits[0], "pair": f"digit-{clip.digits[0]}"}
            else:
                yield [text(WORDS[i % 10])], {"label": i % 10, "pair": f"digit-{i % 10}"}

    return build


def _pairs(m: Material, split: str, count: int, draw: np.random.Generator) -> Iterator[Made]:
    """Single segments of all three modalities in one source: what is drawn together is the same digit, often told otherwise."""
    kinds = [_alone(modality)(m, split, -(-count // 3), draw) for modality in ("image", "speech", "text")]
    for i in range(count):
        yield next(kinds[i % 3])


def _control(name: str) -> Builder:
    plant = PLANTS[name]

    def build(m: Material, split: str, count: int, draw: np.random.Generator) -> Iterator[Made]:
        first_seed = {"train": 10_000_000, "val": 5_000_000}[split] + 1_000_000 * m.seed
        for readings, labels in fragments(name, count, first_seed, STEPS):
            pieces: list[Piece] = []
            for k in range(len(readings)):
                # One segment per reading and per action, as a session receives them: no chunk can put a later reading first.
                clock = {"rate_hz": plant.rate_hz, "start_s": round(k * plant.step_s, 9)}
                names = {"kind": name, "channels": list(plant.channels), "units": list(plant.units), "role": "observed"}
                pieces.append({"sensor": [[round(float(v), 6) for v in readings[k]]], **names, **clock})
                value: list[float] = [int(labels[k][0])] if plant.choices else [round(float(v), 6) for v in labels[k]]
                pieces.append({"action": [value], "space": plant.space(), "role": "target", **clock})
            yield pieces, {"environment": name}

    return build


def _sensor(channel: str, values: np.ndarray, start_s: float | None = None, role: str = "observed") -> Piece:
    """One channel's readings. Without a start they stay in one piece, whatever else was measured at the time."""
    clock = {} if start_s is None else {"start_s": start_s}
    return {
        "sensor": [[round(float(v), 4)] for v in values],
        "rate_hz": RATES_HZ[channel],
        "channels": [channel],
        "units": [UNITS[channel]],
        "kind": f"motor {channel}",
        **clock,
        "role": role,
    }


def _forecast(m: Material, split: str, count: int, draw: np.random.Generator) -> Iterator[Made]:
    n, ahead = FORECAST["context"], FORECAST["ahead"]
    rate = RATES_HZ["current"]
    for i in range(count):
        window = run(FAULTS[i % len(FAULTS)], (n + ahead) / rate, draw)
        past, future = window.current[:n], window.current[n:]
        yield [_sensor("current", past, 0.0), _sensor("current", future, n / rate, "target")], {"fault": window.fault}


def _fault(m: Material, split: str, count: int, draw: np.random.Generator) -> Iterator[Made]:
    for i in range(count):
        window = run(FAULTS[i % len(FAULTS)], FAULT_S, draw)
        pieces = [_sensor(c, getattr(window, c)) for c in ("current", "vibration", "temperature")]
        yield [*pieces, ask("fault", split, draw), answer(window.fault)], {"label": window.fault}


def _redundant(m: Material, split: str, count: int, draw: np.random.Generator) -> Iterator[Made]:
    for i in range(count):
        digit = i % 10
        both = [image(_pick(m, split, draw, digit)[0]), audio(_spoken(m, split, draw, digit).path)]
        kept = both if split == "test" or i // 10 % 3 == 0 else [both[i // 10 % 3 - 1]]
        yield [*kept, ask("digit", split, draw), answer(WORDS[digit])], {"label": digit}


def _caption(m: Material, split: str, count: int, draw: np.random.Generator) -> Iterator[Made]:
    for i in range(count):
        kind = ("image", "speech", "video")[i % 3]
        wording = str(draw.choice(CAPTIONS[kind]))
        if kind == "image":
            path, digit = _pick(m, split, draw)
            yield [image(path), answer(wording.format(WORDS[digit]))], {"label": digit}
        elif kind == "speech":
            clip = _spoken(m, split, draw, int(draw.integers(10)))
            yield [audio(clip.path), answer(wording.format(clip.text))], {"label": clip.digits[0]}
        else:
            film, digit, way = _film(m, split, int(draw.integers(len(m.videos[split]))))
            yield [film, answer(wording.format(WORDS[digit], way))], {"label": digit}


def _prose(m: Material, split: str, count: int, draw: np.random.Generator) -> Iterator[Made]:
    yield from (([answer(piece)], {"topic": topic}) for topic, piece in prose(m.seed, m.scale)[split][:count])


@dataclass(frozen=True)
class Recipe:
    """One source: its builder, documents per split at scale 1, percent of training tokens, tokens per document (estimate)."""

    build: Builder
    train: int
    val: int
    test: int
    share: float
    tokens: float


ALL = 1_000_000
RECIPES: dict[str, Recipe] = {
    "digit_image": Recipe(_digit_image, 5200, 100, 400, 9, 28),
    "digits_image": Recipe(_digits_image, 1500, 40, 150, 2, 65),
    "digit_speech": Recipe(_heard("digit", "digit"), 4000, 100, 500, 7, 21),
    "digits_speech": Recipe(_heard("string", "digits"), 3000, 50, 200, 14, 39),
    "phrase_speech": Recipe(_heard("phrase", "words"), 400, 20, 60, 1, 25),
    "video": Recipe(_video, 2400, 40, 240, 10, 66),
    "sum": Recipe(_sum, 3000, 50, 200, 9, 49),
    "arithmetic": Recipe(_arithmetic, 400, 0, 0, 1, 22),
    "draw": Recipe(_draw, 2600, 50, 200, 3, 28),
    "half": Recipe(_half, 12000, 50, 400, 14, 30),
    "say": Recipe(_say, 640, 0, 100, 2, 19),
    "pairs": Recipe(_pairs, 3900, 0, 0, 6, 28),
    "pair_image": Recipe(_alone("image"), 0, 50, 200, 0, 22),
    "pair_speech": Recipe(_alone("speech"), 0, 50, 200, 0, 16),
    "pair_text": Recipe(_alone("text"), 0, 10, 10, 0, 4),
    "cartpole": Recipe(_control("CartPole-v1"), 3000, 50, 0, 1.5, 17),
    "pendulum": Recipe(_control("Pendulum-v1"), 10000, 50, 0, 6, 16),
    "mountain_car": Recipe(_control("MountainCarContinuous-v0"), 3000, 50, 0, 1.5, 14),
    "acrobot": Recipe(_control("Acrobot-v1"), 3000, 50, 0, 1.5, 20),
    "motor_forecast": Recipe(_forecast, 3000, 50, 200, 2, 40),
    "motor_fault": Recipe(_fault, 3000, 50, 200, 9, 95),
    "redundant": Recipe(_redundant, 3000, 50, 200, 3, 31),
    "caption": Recipe(_caption, 1200, 30, 0, 1, 37),
    "prose": Recipe(_prose, ALL, ALL, ALL, 5, 115),
}


def mixture(shares: dict[str, float] | None = None, tokens: dict[str, float] | None = None) -> dict[str, float]:
    """Weight of each source when whole documents are drawn; sums to 1. Both arguments override single recipes."""
    unknown = (set(shares or {}) | set(tokens or {})) - set(RECIPES)
    if unknown:
        raise ValueError(f"unknown sources {sorted(unknown)}; the sample world has {', '.join(RECIPES)}")
    raw = {n: (shares or {}).get(n, r.share) / (tokens or {}).get(n, r.tokens) for n, r in RECIPES.items()}
    return {name: weight / sum(raw.values()) for name, weight in raw.items()}


def documents(name: str, split: str, material: Material) -> Iterator[Line]:
    """Manifest lines of one source and split."""
    recipe = RECIPES[name]
    full = getattr(recipe, split)
    count = full if full in (0, ALL) else max(10, round(full * share(split, material.scale)))
    draw = np.random.default_rng([material.seed, 3, sorted(RECIPES).index(name), ("train", "val", "test").index(split)])
    if count == 0:
        return
    for i, (pieces, about) in enumerate(recipe.build(material, split, count, draw)):
        pair = about.pop("pair", None)
        line: Line = {"id": f"{name}/{split}/{i:05d}", "split": split, "source": name}
        if pair:
            line["pair"] = pair
        yield {**line, "metadata": about, "segments": pieces}
