"""The suite of the repository asks what a built world can answer."""

from __future__ import annotations

from pathlib import Path

import pytest

from weft.benchmarks.harness.control import returns_scale
from weft.benchmarks.harness.environments import make_env
from weft.benchmarks.harness.questions import Variant, demonstration, question, random_picker
from weft.benchmarks.harness.samples import task_data
from weft.benchmarks.harness.task import find_tasks
from weft.benchmarks.world.build import build_world
from weft.benchmarks.world.documents import QUESTIONS

TASKS = [task for task, _ in find_tasks("generalist-mini")]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_world(tmp_path_factory.mktemp("world"), scale=0.02)


@pytest.mark.parametrize("task", TASKS, ids=[task.name for task in TASKS])
def test_every_document_gives_a_question_with_a_legal_answer(task, world: Path) -> None:  # type: ignore[no-untyped-def]
    data = task_data(task, world, limit=40)
    pick = random_picker(task, data.pool, task.shots, seed=0)
    if task.answer == "control":
        make_env(task).close()
        scale = returns_scale(task, world)
        assert scale and scale["expert"] > scale["random"] and (not task.shots or pick(data.pool[0]))
        return
    assert data.samples and all(demonstration(task, sample) for sample in data.pool[:5])
    for sample in data.samples:
        shots = pick(sample)
        q = question(task, sample, Variant(), 0, shots)
        assert bool(shots) == bool(task.shots) and (q.prompt or task.answer == "bits")
        if task.answer == "choices":
            assert q.reference in q.choices, (q.reference, q.choices)
        if task.answer == "retrieval":
            assert q.pair and all(other.pair for other in data.gallery)


def test_at_least_ten_tasks_are_asked_in_words_that_no_training_document_holds() -> None:
    trained = {wording for wordings in QUESTIONS.values() for wording in wordings}
    new = [task for task in TASKS if task.name.startswith("new-") and task.shots]
    unseen = [task for task in new if {part.text for part in task.prompt if part.text} - trained]
    assert len(unseen) >= 10 and all(task.choices and task.data.train for task in unseen)
