"""A task: which data, what is asked, what counts as the answer, what is measured. Data only.

In: YAML files, each with one task or a list `tasks:`. Out: `Task`s. A prompt is built from a document: its observed segments,
and words in which `{name}` stands for a metadata entry; the reference is its target segments, or a metadata entry, mapped by
a table where the answer is worded otherwise. Keys: docs/benchmarks.md.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_args

from weft.benchmarks.harness.measures import MEASURES
from weft.benchmarks.harness.yaml_lines import Node, TaskError, build, read_yaml
from weft.inference.request import FIELDS
from weft.inference.sampling import Sampling

Answer = Literal["text", "choices", "image", "audio", "forecast", "retrieval", "control", "bits"]
ANSWERS: tuple[str, ...] = get_args(Answer)
Baseline = Literal["chance", "majority", "persistence", "specialist"]
Modality = Literal["all", "text", "image", "video", "audio", "sensor", "action"]
BASELINES: dict[str, tuple[str, ...]] = {
    "chance": ("choices", "retrieval", "control"),
    "majority": ("text", "choices"),
    "persistence": ("forecast",),
    "specialist": ("text", "choices"),
}
"""Which answers a baseline can give."""
SUITES = Path(__file__).parent / "suites"


@dataclass(frozen=True)
class Data:
    """Where documents are. Relative paths count from the folder that the runner is given, else from the task file."""

    manifest: str | None = None
    """A .jsonl of documents."""
    shards: str | None = None
    """A folder of prepared shards."""
    split: str = "test"
    """Split of `shards`."""
    train: str | None = None
    """Manifest, or folder of shards, with the documents of demonstrations, of the majority and of the specialist."""
    gallery: str | None = None
    """Manifest of what is searched; documents are relevant where `pair` agrees."""
    environment: str | None = None
    """A gymnasium id, `module:Name-v0` to import what registers it."""
    make: dict[str, Any] = field(default_factory=dict)
    """Keywords of `gymnasium.make`."""

    def __post_init__(self) -> None:
        given = [name for name in ("manifest", "shards", "environment") if getattr(self, name)]
        if len(given) != 1:
            raise TaskError(f"data needs exactly one of manifest, shards and environment, got {' and '.join(given) or 'none'}")


@dataclass(frozen=True)
class Part:
    """One item of a prompt: observed segments of a modality (or all), or words."""

    observed: Modality | None = None
    text: str | None = None

    def __post_init__(self) -> None:
        if (self.observed is None) == (self.text is None):
            raise TaskError("a prompt item is either {observed: MODALITY or all} or {text: WORDS}")


@dataclass(frozen=True)
class Reference:
    """The right answer: the target segments, or a metadata entry such as `label`, `label.0` or `label.length`."""

    metadata: str | None = None
    map: dict[Any, str] = field(default_factory=dict)
    """What an entry is called in the answer."""


@dataclass(frozen=True)
class Control:
    """How an environment is written, and how long and against what it is played."""

    kind: str
    """Sensor kind of the observations."""
    rate_hz: float
    instruction: str | None = None
    """Said before the episode; `{mission}` stands for that entry of its first observation."""
    observe: str = "state"
    """`state`: numbers. `frame`: the observation is a picture. `pixels`: the rendered frame. `key:A+B`: entries of a dict.
    `pixels:A`: an entry as a picture."""
    frame: tuple[int, ...] = ()
    """[height, width] to which pictures are brought; empty: as they come."""
    episodes: int = 50
    max_steps: int = 1000
    first_seed: int = 200_000
    random: float | None = None
    expert: float | None = None
    scale: str | None = None
    """`FILE` or `FILE#key/key`: a JSON object with the returns `random` and `expert`, instead of the two above."""
    history: int | None = None
    """Observations that a policy sees, itself included; None: all of the episode."""

    def __post_init__(self) -> None:
        if self.episodes < 1 or self.max_steps < 1 or not 0 < self.rate_hz < float("inf") or self.history == 0:
            raise TaskError("control needs episodes, max_steps, rate_hz and history above zero")
        if self.first_seed < 0 or (self.history is not None and self.history < 0):
            raise TaskError("control.first_seed and control.history are never negative")
        if self.frame and (len(self.frame) != 2 or min(self.frame) < 1):
            raise TaskError(f"control.frame is {list(self.frame)}; write [height, width] in pixels")
        if (self.random is None) != (self.expert is None):
            raise TaskError("control needs both random and expert returns, or neither")


@dataclass(frozen=True)
class Ahead:
    """Forecasting: the last `readings` of the sensor `kind` are hidden, or the target segment is the future."""

    readings: int
    kind: str
    samples: int = 16

    def __post_init__(self) -> None:
        if self.readings < 1 or self.samples < 2:
            raise TaskError("forecast needs readings >= 1 and samples >= 2")


@dataclass(frozen=True)
class Consistency:
    """What is asked about a generated medium: the answer must be the reference words."""

    question: str
    choices: tuple[str, ...] = ()
    """Ranked by likelihood; without them the answer is written."""


@dataclass(frozen=True)
class Task:
    """One row of a table."""

    name: str
    data: Data
    answer: Answer
    metrics: tuple[str, ...]
    about: str = ""
    prompt: tuple[Part, ...] = (Part(observed="all"),)
    reference: Reference = field(default_factory=Reference)
    choices: tuple[str, ...] | str = ()
    """A list for all documents, or `metadata.NAME` for a list of each document's own."""
    shots: int = 0
    """Demonstrations from `data.train` before the question."""
    pick: Literal["random", "similar"] = "random"
    """How demonstrations are chosen; `similar` by the model's own embeddings."""
    first: tuple[Modality, ...] = ()
    """What is produced before the answer: `[text]` where words come before a picture. It is kept, not scored."""
    produce: dict[str, Any] = field(default_factory=dict)
    """Options of `generate`."""
    control: Control | None = None
    forecast: Ahead | None = None
    judge: str | None = None
    """Manifest on which a specialist is trained that names what generated media show (metric `judged`)."""
    consistency: Consistency | None = None
    within_s: float = 0.1
    """Tolerance of metric `temporal`; `temporal:250` states its own, in milliseconds."""
    baselines: tuple[Baseline, ...] = ()
    slices: tuple[str, ...] = ()
    """Metadata columns; the gap between best and worst is reported."""

    def __post_init__(self) -> None:
        if not self.metrics:
            raise TaskError("metrics is empty; name at least one")
        for metric in self.metrics:
            name = metric.split(":")[0]
            if name not in MEASURES:
                raise TaskError(f"there is no metric {metric!r}; for {self.answer} there are {', '.join(legal(self.answer))}")
            if self.answer not in MEASURES[name].answers:
                raise TaskError(f"metric {metric!r} does not fit answer {self.answer!r}; use {', '.join(legal(self.answer))}")
            _check_detail(metric)
        for baseline in self.baselines:
            if self.answer not in BASELINES[baseline]:
                fit = ", ".join(name for name, answers in BASELINES.items() if self.answer in answers) or "none"
                raise TaskError(f"baseline {baseline!r} does not fit answer {self.answer!r}; use {fit}")
        needs = {
            "choices": (self.answer == "choices", bool(self.choices)),
            "control": (self.answer == "control", self.control is not None),
            "data.environment": (self.answer == "control", self.data.environment is not None),
            "forecast": (self.answer == "forecast", self.forecast is not None),
            "data.gallery": (self.answer == "retrieval", self.data.gallery is not None),
            "data.train": (
                self.shots > 0 or bool({"majority", "specialist"} & set(self.baselines)),
                self.data.train is not None,
            ),
            "judge": ("judged" in self.metrics, self.judge is not None),
            "consistency": ("consistency" in self.metrics, self.consistency is not None),
        }
        for key, (needed, there) in needs.items():
            if needed and not there:
                raise TaskError(f"task {self.name!r} needs {key}; add it")
            if there and not needed and key != "data.train":
                raise TaskError(
                    f"{key} says nothing about answer {self.answer!r} with metrics {', '.join(self.metrics)}; drop it"
                )
        if self.shots < 0 or not self.within_s > 0:
            raise TaskError(f"shots is {self.shots}, within_s {self.within_s}; they must be 0 or more, and above 0")
        self._check_choices()
        self._check_produce()

    def _check_choices(self) -> None:
        """Every answer that the file itself calls right must be one that can be given."""
        if self.reference.map and self.reference.metadata is None:
            raise TaskError("reference.map renames a metadata entry; name it by reference.metadata")
        if isinstance(self.choices, str):
            if not self.choices.startswith("metadata."):
                raise TaskError(f"choices is {self.choices!r}; give a list, or metadata.NAME")
            return
        if len(set(self.choices)) < len(self.choices):
            raise TaskError(f"choices has {max(self.choices, key=self.choices.count)!r} twice; keep one")
        strange = [said for said in self.reference.map.values() if self.choices and said not in self.choices]
        if strange:
            raise TaskError(f"reference.map leads to {strange[0]!r}, which is not in choices ({', '.join(self.choices)})")

    def _check_produce(self) -> None:
        """`first` and the options of `generate`: a misspelt one would fail every sample."""
        drawn = self.answer in ("text", "image", "audio", "forecast")
        if self.first and (not drawn or self.answer == "forecast" or set(self.first) & {"all", "action", self.answer}):
            raise TaskError(f"first is {list(self.first)}; name other modalities that are produced before text, image or audio")
        known = {f.name for f in fields(Sampling)} - {"seed"}
        if self.answer == "forecast":
            known |= {"rate_hz", "quantiles"}
        else:
            known |= {"stop"} | {n for made in (*self.first, self.answer) for n in FIELDS.get(made, ())} - {"edit", "keep"}
        wrong = [name for name in self.produce if not drawn or name not in known]
        if wrong:
            have = ", ".join(sorted(known)) if drawn else "none"
            raise TaskError(f"produce has no option {wrong[0]!r} for answer {self.answer!r}; it has {have}")

    def digest(self) -> str:
        """SHA-256 of everything that the task says."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True, default=str).encode()).hexdigest()


def _check_detail(metric: str) -> None:
    """What stands behind the colon of a metric: milliseconds of `temporal`, a modality of `perplexity`."""
    name, _, detail = metric.partition(":")
    if not detail:
        return
    if name == "temporal" and detail.isdigit() and int(detail) > 0:
        return
    if name == "perplexity" and detail in get_args(Modality)[1:]:
        return
    raise TaskError(f"metric {metric!r} is unknown; write temporal:MILLISECONDS or perplexity:MODALITY, or {name!r} alone")


def legal(answer: str) -> list[str]:
    """Metrics of an answer kind."""
    return [name for name, measure in MEASURES.items() if answer in measure.answers]


def load_tasks(path: str | Path) -> list[Task]:
    """The tasks of one file, or of every .yaml of a folder, in the order of names of files."""
    path = Path(path)
    if path.is_dir():
        found = [task for file in sorted(path.glob("*.yaml")) for task in load_tasks(file)]
        if not found:
            raise TaskError(f"{path} holds no .yaml task file")
        return _distinct(found, str(path))
    root = read_yaml(path)
    if isinstance(root.value, dict) and set(root.value) == {"tasks"}:
        listed = root.value["tasks"]
        if not isinstance(listed.value, list):
            raise listed.error("tasks must be a list of tasks")
        return _distinct([build(Task, node, "task") for node in listed.value], str(path))
    return [build(Task, root, "task")]


def _distinct(tasks: list[Task], where: str) -> list[Task]:
    names = [task.name for task in tasks]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise TaskError(f"{where}: two tasks are called {twice[0]!r}; rename one")
    return tasks


def find_tasks(names: str | Sequence[str]) -> list[tuple[Task, Path]]:
    """Tasks and the folder their paths count from, for paths, suites of this package, and `suite/task` names."""
    asked = [n for n in (names.split(",") if isinstance(names, str) else names) if n]
    found: list[tuple[Task, Path]] = []
    for name in asked:
        path = Path(name)
        if path.exists():
            found += [(task, path if path.is_dir() else path.parent) for task in load_tasks(path)]
            continue
        suite, _, one = name.partition("/")
        folder = SUITES / suite.replace("-", "_")
        if not folder.is_dir():
            have = ", ".join(sorted(p.name.replace("_", "-") for p in SUITES.iterdir() if p.is_dir()))
            raise TaskError(f"{name!r} is no task file and no suite; suites are {have}, a single task is SUITE/NAME")
        tasks = [task for task in load_tasks(folder) if not one or task.name == one]
        if not tasks:
            have = ", ".join(task.name for task in load_tasks(folder))
            raise TaskError(f"suite {suite!r} has no task {one!r}; it has {have}")
        found += [(task, Path()) for task in tasks]
    if not found:
        raise TaskError("no tasks are named; give task files or suites, for example --tasks generalist-mini")
    _distinct([task for task, _ in found], "--tasks")
    return found


__all__ = ["Node", "Task", "TaskError", "find_tasks", "load_tasks"]
