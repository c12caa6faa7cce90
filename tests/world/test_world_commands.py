"""`weft sample-world` and `weft quickstart` as a person meets them: options, progress, what is printed at the end."""

from __future__ import annotations

import inspect
import json
from pathlib import Path

import pytest

from weft.benchmarks.world.quickstart import Quickstart, QuickstartError, short
from weft.cli import main
from weft.commands.progress import EVERY_S, Live, Plain, clock
from weft.commands.world import expected, print_results, quickstart


class Clock:
    """Time that passes when it is told to."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.mark.parametrize("command", ["quickstart", "sample-world"])
def test_help_explains_every_option(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    main([command, "--help"])
    text = capsys.readouterr().out
    assert "scale" in text and "of every random draw" in text
    if command == "quickstart":
        assert all(f"--{name}" in text for name in inspect.signature(quickstart).parameters)


def test_sample_world_prints_what_it_made(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["sample-world", str(world), "--scale", "0.02"])
    text = capsys.readouterr().out
    sources = json.loads((world / "world.json").read_text())["sources"]
    assert all(name in text for name in sources) and str(world / "README.md") in text and "100 %" in text


def test_a_wrong_scale_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["sample-world", str(tmp_path / "w"), "--scale", "3"])
    assert stop.value.code == 2 and "scale 3" in capsys.readouterr().err


def test_plain_progress_names_the_stage_and_the_time_left(capsys: pytest.CaptureFixture[str]) -> None:
    now = Clock()
    stages = Plain({"world": 20.0, "training": 100.0}, now)
    assert stages.left_s() == 120
    stages("world", 0.0)
    now.now = 1.0
    stages("world", 0.1, "digits")
    now.now = EVERY_S + 1
    stages("world", 0.5, "speech")
    now.now = 20.0
    stages.beat()
    now.now = 2 * EVERY_S + 1.5
    stages.beat()
    stages("world", 1.0, "done")
    stages("world", 1.0, "20 s")
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines] == ["world"] * 4, (
        "what comes too soon is not printed, a long silence and the end are"
    )
    assert (
        "speech" in lines[1]
        and "50 %" in lines[1]
        and lines[2].startswith("   0:2")
        and lines[3].endswith("about 1:40 left  20 s")
    )


def test_the_time_left_follows_what_is_measured() -> None:
    now = Clock()
    stages = Plain({"training": 100.0}, now)
    stages("training", 0.0)
    now.now = 100.0
    stages("training", 0.5)
    slow = stages.left_s()
    assert 25 < slow <= 100
    now.now = 199.0
    stages("training", 0.99)
    assert 1 < stages.left_s() < 3
    stages("training", 1.0, "199 s")
    assert stages.left_s() == 0
    stages("training", 0.2, "again")
    assert stages.left_s() > 0, "a stage that is done again is not over"


def test_the_live_view_shows_every_stage() -> None:
    from rich.console import Console

    live = Live({"world": 5.0, "training": 60.0}, "weft quickstart")
    live("world", 1.0, "done before")
    live("training", 0.25, "loss 1.234")
    console = Console(width=100, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(live.render())
    text = console.export_text()
    console.file.close()
    assert all(word in text for word in ("world", "training", "done before", "loss 1.234", "left", "weft quickstart"))


def test_stages_are_expected_in_the_order_of_the_work() -> None:
    full, small = expected(Quickstart()), expected(Quickstart(scale=0.1, max_steps=10, limit=5))
    assert list(full) == list(small) == ["world", "shards", "tokenizers", "streams", "training", "specialists", "evaluation"]
    assert full["training"] == 60 * Quickstart().minutes and small["training"] < 10 and sum(small.values()) < sum(full.values())


def test_a_short_quickstart_takes_no_other_size(tmp_path: Path) -> None:
    with pytest.raises(QuickstartError, match="leave out --minutes"):
        quickstart(str(tmp_path / "q"), short=True, minutes=5.0)
    assert not (tmp_path / "q").exists()
    assert sum(expected(short()).values()) < 200 < sum(expected(Quickstart()).values())


def test_the_table_prints_every_task_and_the_machine(capsys: pytest.CaptureFixture[str]) -> None:
    row = {"value": 0.97, "interval": [0.95, 0.99], "must": 0.95, "aim": 0.98, "specialist": None, "passed": True}
    lost = {**row, "value": 12.5, "passed": False}
    machine = {"cpu": "A Processor", "threads": 2, "gpu": None}
    figures = {"tasks": {"image -> word": row, "Pendulum-v1": lost}, "seconds": {"world": 3.2, "training": 660.0}}
    print_results({**figures, "tokens_per_second": 5123.4, "parameters": 5_700_000, "machine": machine})
    text = capsys.readouterr().out
    for word in (
        "image -> word",
        "0.970",
        "0.95 to 0.99",
        "held",
        "12.5",
        "below",
        "5.70 M",
        "A Processor",
        "663 s",
        "5,123",
        "1 of 2 tasks",
        "environments: 12.5",
    ):
        assert word in text


def test_clock_counts_hours() -> None:
    assert (clock(0), clock(61), clock(3723)) == ("0:00", "1:01", "1:02:03")
