"""What the one model is asked on held-out data: data, no model.

In: nothing. Out: `TASKS`, one entry per row of the quickstart's table: where its questions are, what kind of answer it
takes, how an answer is read and graded, and the figures that it must and should reach. A question's prompt is the observed
part of a test document, the right answer its metadata; nothing in here knows how a model answers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from weft.benchmarks.world.control import PLANTS
from weft.benchmarks.world.digits import NUMBERS, WORDS
from weft.benchmarks.world.motor import FAULTS
from weft.benchmarks.world.video import DIRECTIONS

Kind = Literal["text", "image", "rest", "speech", "retrieval", "control", "forecast", "bits"]
"""text: an answer in words, among `choices` where there are any. image, rest, speech: generated media, judged.
retrieval: embeddings of single segments. control: episodes. forecast: readings. bits: the score of a text."""

TEST_SEED = 200_000
"""First environment seed of the control episodes; training starts at 10,000,000."""


@dataclass(frozen=True)
class Task:
    """One row of the table."""

    name: str
    kind: Kind
    sources: tuple[str, ...]
    """Test manifests SOURCE.test.jsonl that hold the questions; control tasks name their environment instead."""
    measure: str
    must: float | None
    aim: float | None
    higher: bool = True
    """Whether a larger figure is better."""
    chance: float | None = None
    choices: tuple[str, ...] = ()
    """Every legal answer; to be ranked by likelihood, or left to the model to write."""
    read: Literal["word", "words", "motion", "sum", "name"] = "word"
    """How a written answer is understood, see `understand`."""
    specialist: str | None = None
    """Key in `specialists.SPECIALISTS`."""
    drop: tuple[str, ...] = ()
    """Modalities of which one is taken from the prompt, each in turn."""
    episodes: int = 0
    context_steps: int = 1
    """Observations (each with the action that followed) that a policy may see: the environments are Markov."""


MOTIONS = tuple(f"{word} moving {way}" for word in WORDS for way in DIRECTIONS)
TABLE = (
    Task("image -> word", "text", ("digit_image",), "accuracy", 0.95, 0.98, True, 0.1, WORDS, specialist="image -> word"),
    Task("speech -> word", "text", ("digit_speech",), "accuracy", 0.94, 0.98, True, 0.1, WORDS, specialist="speech -> word"),
    Task(
        "speech -> words",
        "text",
        ("digits_speech",),
        "word error rate",
        0.15,
        0.05,
        False,
        read="words",
        specialist="speech -> words",
    ),
    Task(
        "video -> digit and direction",
        "text",
        ("video",),
        "accuracy of both",
        0.85,
        0.95,
        chance=1 / 80,
        choices=MOTIONS,
        read="motion",
        specialist="video -> digit and direction",
    ),
    Task("image + speech -> sum", "text", ("sum",), "accuracy", 0.75, 0.92, chance=0.1, read="sum"),
    Task("word -> image", "image", ("draw",), "judged right", 0.95, 0.98, chance=0.1, specialist="word -> image"),
    Task("half image -> rest", "rest", ("half",), "judged right", 0.85, 0.93, chance=0.1, specialist="half image -> rest"),
    Task("word -> speech", "speech", ("say",), "judged right", 0.75, 0.92, chance=0.1, specialist="word -> speech"),
    Task(
        "retrieval",
        "retrieval",
        ("pair_image", "pair_speech", "pair_text"),
        "class recall at 1, the worst of six directions",
        0.85,
        0.95,
        chance=0.1,
    ),
    *(Task(name, "control", (name,), "normalised return", 90, 98, chance=0, episodes=20) for name in PLANTS),
    Task(
        "motor: forecast",
        "forecast",
        ("motor_forecast",),
        "error over persistence",
        0.8,
        0.5,
        False,
        1.0,
        specialist="motor: forecast",
    ),
    Task(
        "motor: fault",
        "text",
        ("motor_fault",),
        "accuracy",
        0.90,
        0.97,
        True,
        0.2,
        FAULTS,
        read="name",
        specialist="motor: fault",
    ),
    Task(
        "redundant image + speech",
        "text",
        ("redundant",),
        "accuracy kept with one removed",
        0.90,
        0.96,
        chance=0.1,
        choices=WORDS,
        drop=("image", "audio"),
    ),
    Task("prose", "bits", ("prose",), "bits per byte", None, None, False, 8.0, specialist="prose"),
)
"""Must of the four control tasks holds for their mean; must of prose is the better one of unigram and trigram."""

TASKS: dict[str, Task] = {task.name: task for task in TABLE}


def prompt(line: dict[str, Any], drop: str | None = None) -> dict[str, Any]:
    """The line without its answer, and without the segments of modality `drop`."""
    kept = [s for s in line["segments"] if s.get("role") == "observed" and (drop is None or drop not in s)]
    return {**line, "segments": kept}


def reference(line: dict[str, Any]) -> list[dict[str, Any]]:
    """The segments that the line's author would answer."""
    return [s for s in line["segments"] if s.get("role") == "target"]


def understand(task: Task, said: str) -> Any:
    """What a written answer means: a digit, digits, [digit, direction], a sum, a name; None where it means nothing."""
    words = said.strip().lower().split()
    if task.read == "name":
        return said.strip().lower() or None
    if task.read == "words":
        return [WORDS.index(w) for w in words if w in WORDS]
    if task.read == "sum":
        return NUMBERS.index(words[-1]) if words and words[-1] in NUMBERS else None
    if not words or words[0] not in WORDS:
        return None
    digit = WORDS.index(words[0])
    if task.read == "motion":
        return [digit, " ".join(words[2:])] if words[1:2] == ["moving"] else None
    return digit if len(words) == 1 else None


def grade(task: Task, line: dict[str, Any], said: str) -> bool:
    """Whether a written answer is right, all of it."""
    return understand(task, said) == line["metadata"]["label"]


def passed(task: Task, value: float, bound: float | None = None) -> bool:
    """Whether `value` reaches the must (or another `bound`, such as a specialist's figure)."""
    limit = task.must if bound is None else bound
    if limit is None:
        raise ValueError(f"task {task.name!r} has no must of its own; hand in the specialist's figure as bound")
    return value >= limit if task.higher else value <= limit


def recall_directions(sources: Sequence[str]) -> list[tuple[str, str]]:
    """(query source, gallery source) for every ordered pair of a retrieval task."""
    return [(a, b) for a in sources for b in sources if a != b]
