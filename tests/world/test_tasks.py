"""Tasks ask what the world's test documents hold, and the documents' own answers get full marks."""

from pathlib import Path

import pytest

from weft.benchmarks.world import material
from weft.benchmarks.world.control import PLANTS
from weft.benchmarks.world.specialists import SPECIALISTS
from weft.benchmarks.world.tasks import TASKS, grade, passed, prompt, recall_directions, reference, understand


def test_every_task_has_questions_and_a_known_specialist(world: Path) -> None:
    for task in TASKS.values():
        assert task.specialist is None or task.specialist in SPECIALISTS
        for source in task.sources:
            assert source in PLANTS if task.kind == "control" else material.lines(world, source, "test")


@pytest.mark.parametrize("name", [name for name, task in TASKS.items() if task.kind == "text"])
def test_the_documents_own_answer_is_right_and_a_legal_choice(world: Path, name: str) -> None:
    task = TASKS[name]
    for line in material.lines(world, task.sources[0], "test"):
        said = reference(line)[0]["text"]
        assert grade(task, line, said) and not grade(task, line, "eleven moving nowhere")
        assert not task.choices or said in task.choices
        assert reference(prompt(line)) == [] and prompt(line)["segments"]


def test_every_choice_is_understood_as_itself_alone() -> None:
    for task in TASKS.values():
        meant = [str(understand(task, choice)) for choice in task.choices]
        assert len(set(meant)) == len(meant) and "None" not in meant


def test_a_removed_modality_is_gone_from_the_prompt(world: Path) -> None:
    for line in material.lines(world, "redundant", "test"):
        for drop in TASKS["redundant image + speech"].drop:
            kept = prompt(line, drop)["segments"]
            assert len(kept) == len(prompt(line)["segments"]) - 1 and not any(drop in s for s in kept)


def test_must_has_a_direction() -> None:
    assert passed(TASKS["image -> word"], 0.96) and not passed(TASKS["image -> word"], 0.94)
    assert passed(TASKS["speech -> words"], 0.1) and not passed(TASKS["speech -> words"], 0.2)
    assert passed(TASKS["prose"], 2.0, bound=2.5)
    with pytest.raises(ValueError, match="specialist's figure"):
        passed(TASKS["prose"], 2.0)


def test_retrieval_goes_both_ways() -> None:
    pairs = recall_directions(TASKS["retrieval"].sources)
    assert len(pairs) == 6 and all((b, a) in pairs for a, b in pairs)
