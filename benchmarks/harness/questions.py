"""A document becomes a question: prompt segments, the reference, the choices; demonstrations before it.

In: a task, a sample, what is removed or spoilt. Out: `Question`. Only the sample itself and the training pool are looked at,
so no question can contain another test document's answer.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from weft.benchmarks.harness.corrupt import Corruption, corrupt
from weft.benchmarks.harness.samples import Sample
from weft.benchmarks.harness.task import Part, Task, TaskError
from weft.tokenizers.segment import Document, Segment, Sensor, Text

SLOT = re.compile(r"\{([\w.]+)\}")


@dataclass(frozen=True)
class Variant:
    """The question as it is, or with modalities removed, or with one spoilt."""

    name: str = "whole"
    drop: tuple[str, ...] = ()
    corruption: Corruption | None = None


@dataclass(frozen=True)
class Question:
    """One sample, ready to be asked."""

    key: str
    metadata: Mapping[str, Any]
    pair: str | None
    prompt: tuple[Segment, ...]
    reference: Any
    """Words, a list of accepted words, or the target segments of a medium."""
    choices: tuple[str, ...] = ()


def lookup(metadata: Mapping[str, Any], path: str) -> Any:
    """`label`, `label.0` or `label.length` of a document's metadata."""
    value: Any = metadata
    for step in path.split("."):
        try:
            if step == "length" and not (isinstance(value, Mapping) and step in value):
                value = len(value)
            else:
                value = value[step] if isinstance(value, Mapping) else value[int(step)]
        except (KeyError, IndexError, TypeError, ValueError):
            raise TaskError(
                f"the document's metadata has no {path!r}; it has {', '.join(map(str, metadata)) or 'nothing'}"
            ) from None
    return value


def words(template: str, metadata: Mapping[str, Any]) -> str:
    """`{name}` replaced by metadata; nothing else is interpreted."""
    return SLOT.sub(lambda match: str(lookup(metadata, match[1])), template)


def observed(document: Document) -> list[Segment]:
    """What is shown."""
    return [segment for segment in document.segments if segment.role != "target"]


def prompt_of(parts: Sequence[Part], shown: Sequence[Segment], metadata: Mapping[str, Any]) -> list[Segment]:
    """The items of a prompt in order."""
    out: list[Segment] = []
    for part in parts:
        if part.text is not None:
            out.append(Text(words(part.text, metadata)))
        else:
            out += [segment for segment in shown if part.observed in ("all", segment.modality)]
    return out


def reference_of(task: Task, document: Document, metadata: Mapping[str, Any]) -> Any:
    """What is right. Raises `TaskError` for a document that does not say."""
    if task.reference.metadata is not None:
        value = lookup(metadata, task.reference.metadata)
        table = task.reference.map
        named = [_named(table, item) for item in value] if isinstance(value, list | tuple) else _named(table, value)
        return named
    targets = [segment for segment in document.segments if segment.role == "target"]
    if task.answer in ("text", "choices"):
        said = [segment.text for segment in targets if isinstance(segment, Text)]
        if not said:
            raise TaskError("the document has no target text; name the answer by reference: {metadata: NAME}")
        return "".join(said)
    if task.answer == "bits" and not targets:
        raise TaskError("the document has no target segments to score")
    return tuple(targets)


def _named(table: Mapping[Any, str], value: Any) -> str:
    if not table:
        return str(value)
    if value not in table:
        raise TaskError(f"reference.map has no entry for {value!r}; it has {', '.join(map(str, table))}")
    return table[value]


def choices_of(task: Task, metadata: Mapping[str, Any]) -> tuple[str, ...]:
    """The legal answers of one document."""
    if isinstance(task.choices, str):
        return tuple(str(item) for item in lookup(metadata, task.choices.removeprefix("metadata.")))
    return task.choices


def question(task: Task, sample: Sample, variant: Variant, seed: int, shots: Sequence[Segment] = ()) -> Question:
    """Read a sample and ask it. Raises what reading raises."""
    document = sample.load()
    shown, reference = observed(document), None
    if task.forecast is not None:
        shown, reference = _split(task, document)
    elif task.answer not in ("retrieval",):
        reference = reference_of(task, document, sample.metadata)
    if variant.drop:
        shown = [segment for segment in shown if segment.modality not in variant.drop]
    if variant.corruption is not None:
        rng = np.random.default_rng(list(hashlib.sha256(f"{seed}/{sample.key}".encode()).digest()[:8]))
        shown = [corrupt(segment, variant.corruption, rng) for segment in shown]
    prompt = prompt_of(task.prompt, shown, sample.metadata)
    return Question(sample.key, sample.metadata, sample.pair, (*shots, *prompt), reference, choices_of(task, sample.metadata))


def _split(task: Task, document: Document) -> tuple[list[Segment], Segment]:
    """Past and future of a forecast: the target segment, or the last readings of the sensor that is asked about."""
    assert task.forecast is not None
    ahead, kind = task.forecast.readings, task.forecast.kind
    sensors = [s for s in document.segments if isinstance(s, Sensor) and s.kind == kind]
    if not sensors:
        raise TaskError(f"the document has no sensor of kind {kind!r}")
    future = [s for s in sensors if s.role == "target"]
    if future:
        return observed(document), replace(future[0], values=np.asarray(future[0].values, float)[:ahead])
    last = sensors[-1]
    values = np.asarray(last.values, float)
    if len(values) <= ahead:
        raise TaskError(f"sensor {kind!r} has {len(values)} readings, forecasting {ahead} needs more")
    times = None if last.times is None else tuple(last.times)[:-ahead]
    past = replace(last, values=values[:-ahead], times=times)
    others = [s for s in observed(document) if s is not last]
    return [*others, past], replace(last, values=values[-ahead:], times=None, start=None)


def demonstration(task: Task, sample: Sample) -> list[Segment]:
    """A document of the pool with its answer, as it stands before a question."""
    document = sample.load()
    if task.forecast is not None:
        past, future = _split(task, document)
        return [*prompt_of(task.prompt, past, sample.metadata), replace(future, role="observed")]
    right = reference_of(task, document, sample.metadata)
    shown = prompt_of(task.prompt, observed(document), sample.metadata)
    if isinstance(right, tuple):
        return [*shown, *(replace(segment, role="observed") for segment in right)]
    return [*shown, Text(right[0] if isinstance(right, list) else right)]


Picker = Callable[[Sample], list[Segment]]


def random_picker(task: Task, pool: Sequence[Sample], shots: int, seed: int) -> Picker:
    """Demonstrations drawn per question by (seed, key of the question): no draw depends on another."""

    def pick(sample: Sample) -> list[Segment]:
        if not shots:
            return []
        rng = np.random.default_rng(list(hashlib.sha256(f"shots/{seed}/{sample.key}".encode()).digest()[:16]))
        out: list[Segment] = []
        found = 0
        for at in rng.permutation(len(pool)):
            if pool[at].digest == sample.digest or pool[at].key == sample.key:
                continue
            out += demonstration(task, pool[at])
            found += 1
            if found == shots:
                return out
        raise TaskError(f"{shots} demonstrations are asked for, the training documents hold {found}")

    return pick


def similar_picker(task: Task, pool: Sequence[Sample], shots: int, embed: Callable[[list[Any]], np.ndarray]) -> Picker:
    """Demonstrations whose prompts lie nearest to the question's, the nearest one last (RICES, as in Flamingo's evaluation)."""
    shown = [prompt_of(task.prompt, observed(s.load()), s.metadata) for s in pool]
    vectors = embed(shown) if shown else np.zeros((0, 1), np.float32)

    def pick(sample: Sample) -> list[Segment]:
        mine = embed([prompt_of(task.prompt, observed(sample.load()), sample.metadata)])[0]
        order = [
            i
            for i in np.argsort(-(vectors @ mine), kind="stable")
            if pool[i].key != sample.key and pool[i].digest != sample.digest
        ]
        if len(order) < shots:
            raise TaskError(f"{shots} demonstrations are asked for, the training documents hold {len(order)}")
        return [segment for i in reversed(order[:shots]) for segment in demonstration(task, pool[i])]

    return pick
