"""The main job in two to three minutes: a fraction of the world, the same code path, every task clearly above chance."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from weft.benchmarks.world.quickstart import Quickstart, QuickstartError, quickstart, short
from weft.benchmarks.world.tasks import TASKS

CONFIG = short()


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished small quickstart."""
    folder = tmp_path_factory.mktemp("quickstart")
    quickstart(folder, CONFIG)
    return folder


@pytest.mark.timeout(1200)
def test_every_task_is_clearly_better_than_chance(root: Path) -> None:
    tasks = json.loads((root / "report.json").read_text())["tasks"]
    assert set(tasks) == set(TASKS)
    control = [tasks[name]["interval"][0] for name, task in TASKS.items() if task.kind == "control"]
    assert sum(control) / len(control) > 25, f"the four environments are one row: lower ends {control}, random play is 0"
    for name, task in TASKS.items():
        low, high = tasks[name]["interval"]
        if task.chance is not None and task.kind != "control":
            better = low > task.chance if task.higher else high < task.chance
            assert better, f"{name}: {tasks[name]['value']:.3f} in [{low:.3f}, {high:.3f}], chance is {task.chance}"


def test_a_finished_quickstart_is_not_done_again(root: Path) -> None:
    before = (root / "report.json").stat().st_mtime_ns
    assert quickstart(root, CONFIG)["tasks"].keys() == TASKS.keys()
    assert (root / "report.json").stat().st_mtime_ns == before


def test_a_folder_serves_one_quickstart(root: Path) -> None:
    with pytest.raises(QuickstartError, match="other settings"):
        quickstart(root, Quickstart(scale=0.2))
