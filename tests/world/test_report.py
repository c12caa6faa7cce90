"""The report holds what was asked for, follows the rules of the musts, and opens in a real browser without any request."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from weft.benchmarks.harness.stats import Estimate
from weft.benchmarks.world import report_page
from weft.benchmarks.world.evaluate import Result, evaluate
from weft.benchmarks.world.fit import WorldTokens, fit_tokenizers
from weft.benchmarks.world.report import report, tokens_per_second
from weft.benchmarks.world.report_charts import curve, ticks, whisker
from weft.benchmarks.world.report_plants import FIGURES, strip
from weft.benchmarks.world.report_samples import gallery
from weft.benchmarks.world.report_table import GROUPS, grouped
from weft.benchmarks.world.report_verdicts import control_mean, verdicts
from weft.benchmarks.world.specialists import score_specialists
from weft.benchmarks.world.tasks import TASKS
from weft.inference.generalist import Generalist
from weft.model.presets import preset
from weft.model.transformer import Transformer

CHROMIUM = next((p for p in map(shutil.which, ("chromium", "chromium-browser", "google-chrome")) if p), None)
ASKED = ("image -> word", "image + speech -> sum", "word -> image", "half image -> rest", "word -> speech", "retrieval")
ASKED += ("CartPole-v1", "motor: forecast", "redundant image + speech", "prose")
SCORES = {
    "prose, unigram": {"name": "byte unigram", "value": 4.5},
    "prose": {"name": "byte trigram", "value": 3.0},
    "prose, 5-gram": {"name": "byte 5-gram", "value": 2.4},
    "half image -> rest": {"name": "mean of the class", "value": 0.12},
    "half image -> rest, judged": {"name": "mean of the class, judged", "value": 0.8},
}


def result(name: str, value: float, half: float = 0.0) -> Result:
    return Result(TASKS[name], Estimate(value, value - half, value + half, 20), 1.0)


def environments(*values: float) -> dict[str, Result]:
    names = [name for name, task in TASKS.items() if task.kind == "control"]
    return {name: result(name, value, 3.0) for name, value in zip(names, values, strict=True)}


@pytest.fixture(scope="module")
def quick(world: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A quickstart's folder whose model is untrained: every part of the page is real, the figures are just bad."""
    root = tmp_path_factory.mktemp("quick")
    (root / "world").symlink_to(world)
    tokenizer, _ = fit_tokenizers(world, WorldTokens(codec_steps=2, pictures=40, sounds=20))
    torch.manual_seed(0)
    sizes = {"width": 32, "layers": 2, "heads": 2, "kv_heads": 1, "head_width": 16, "window": 32, "expert_width": 16}
    vocabulary = tokenizer.vocabulary
    sizes |= {"vocab_size": len(vocabulary), "num_modalities": len(vocabulary.modalities)}
    config = preset("tiny", slices=vocabulary.slices, feature_sizes=tokenizer.feature_sizes(), **sizes)
    model = Generalist(Transformer(config), tokenizer)
    write_run(root / "run")
    scores = score_specialists(world, ["motor: forecast", "prose", "prose, unigram"])
    found = {name: {"name": score.name, "value": score.value} for name, score in scores.items()}
    (root / "specialists.json").write_text(json.dumps(found))
    results = evaluate(world, model, tasks=ASKED, limit=2)
    return root, report(root, results, {"world": 7.0, "training": 60.0, "evaluation": 11.0}, model=model)


def write_run(run: Path) -> None:
    """Rows as the training loop writes them."""
    run.mkdir()
    steps = [{"step": s, "loss": 5 / (s + 1), "loss/text": 3 / (s + 1), "loss/image": 4 / (s + 1)} for s in range(70)]
    steps.insert(5, {"step": 4, "event": "a word"})  # type: ignore[dict-item]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in steps))
    speed = [{"step": s, "tokens_per_s": 100.0 * s, "elapsed_s": float(s)} for s in range(4)]
    (run / "speed.jsonl").write_text("".join(json.dumps(row) + "\n" for row in speed))


def test_the_must_of_the_environments_holds_for_their_mean() -> None:
    held = verdicts(environments(70, 98, 99, 97), {})
    assert all(v.passed and not v.reached for v in held.values())
    assert not any(v.passed for v in verdicts(environments(60, 98, 99, 97), {}).values())
    assert all(v.reached for v in verdicts(environments(98, 98, 98, 98), {}).values())
    mean, low, high = control_mean(environments(70, 98, 99, 97))
    assert mean == pytest.approx(91) and high - mean == pytest.approx(mean - low) == pytest.approx(1.5)


def test_prose_must_stay_below_the_unigram_and_the_trigram() -> None:
    row = verdicts({"prose": result("prose", 2.9)}, SCORES)["prose"]
    assert row.passed and row.must == 3.0 and row.specialist == 3.0
    assert verdicts({"prose": result("prose", 3.0)}, SCORES)["prose"].passed is False
    assert verdicts({"prose": result("prose", 2.0)}, {})["prose"].passed is None, "nothing to hold it against"


def test_a_specialist_of_another_unit_is_not_put_beside_the_figure() -> None:
    rows = {"half image -> rest": result("half image -> rest", 0.9)}
    assert verdicts(rows, SCORES)["half image -> rest"].specialist == 0.8
    alone = {k: v for k, v in SCORES.items() if not k.endswith("judged")}
    assert verdicts(rows, alone)["half image -> rest"].specialist is None


def test_lower_is_better_where_it_should_be() -> None:
    rows = {name: result(name, value) for name, value in (("speech -> words", 0.1), ("motor: forecast", 0.9))}
    found = verdicts(rows, {})
    assert found["speech -> words"].passed and not found["speech -> words"].reached
    assert found["motor: forecast"].passed is False


def test_every_task_has_a_place_in_the_table() -> None:
    places = grouped({name: result(name, 0.5) for name in TASKS})
    assert sorted(name for names in places.values() for name in names) == sorted(TASKS)
    assert {name for names in GROUPS.values() for name in names} <= set(TASKS)


def test_the_figures_are_complete_and_written_as_returned(quick: tuple[Path, dict[str, Any]]) -> None:
    root, figures = quick
    assert json.loads((root / "report.json").read_text()) == figures
    wanted = {"tasks", "seconds", "tokens_per_second", "parameters", "active_parameters", "versions", "machine"}
    assert set(figures) == wanted and set(figures["tasks"]) == set(ASKED)
    for row in figures["tasks"].values():
        assert set(row) == {"value", "interval", "must", "aim", "specialist", "passed"}
        assert row["interval"][0] <= row["value"] <= row["interval"][1] and isinstance(row["passed"], bool)
    assert figures["active_parameters"] < figures["parameters"]
    assert figures["machine"]["cores"] >= 1 and figures["versions"]["torch"]


def test_tokens_per_second_weighs_rates_by_their_time(tmp_path: Path) -> None:
    write_run(tmp_path / "run")
    assert tokens_per_second(tmp_path / "run") == 200.0
    assert tokens_per_second(tmp_path) is None


def test_the_page_shows_all_there_is_and_names_no_other_place(quick: tuple[Path, dict[str, Any]]) -> None:
    page = (quick[0] / "report.html").read_text()
    assert not re.search(r"(?:src|href)=[\"']?(?![\"']?(?:data:|#))|url\((?!data:)|<script|@import", page)
    template = Path(report_page.__file__).with_name("report.html").read_text()
    placeholders = re.findall(r"\$\{?\w+\}?", template)
    assert placeholders and not any(name in page for name in placeholders)  # a small model may well write a lone $
    for part in ("results", "samples", "missing", "learning", "experts", "time", "again"):
        assert f'<section id="{part}">' in page
    assert "data:audio/wav" in page and "data:image/png" in page and 'class="moment"' in page
    assert page.count("<figure") == page.count("</figure>") and page.count("<svg") == page.count("</svg>")
    for name in ASKED:
        assert name.replace(">", "&gt;") in page


def test_what_a_model_says_cannot_become_markup(world: Path) -> None:
    from weft.benchmarks.world.material import lines

    prompt = lines(world, "digit_image", "test")[0]
    sample = {"prompt": prompt, "said": "<img src=//x>", "label": 3, "right": False}
    shown = gallery(replace(result("image -> word", 0.0), samples=[sample]), world)
    assert "&lt;img src=//x&gt;" in shown and "<img src=//x>" not in shown and "right: three" in shown


def test_a_better_figure_lies_further_to_the_right() -> None:
    def at(value: float, ends: tuple[float, float]) -> float:
        return float(re.search(r'<circle cx="([\d.]+)"', whisker(value, (value, value), ends)).group(1))  # type: ignore[union-attr]

    assert at(0.9, (0, 1)) > at(0.2, (0, 1)) and at(0.2, (1, 0)) > at(0.9, (1, 0))
    assert at(5.0, (0, 1)) == at(1.0, (0, 1)), "what lies outside stays on the axis"


def test_curves_bear_flat_and_single_points() -> None:
    assert curve({"a": ([], [], "red")}) == ""
    for steps, values in (([3], [1.0]), ([0, 1, 2], [2.0, 2.0, 2.0])):
        assert "nan" not in curve({"a": (steps, values, "red")}) and "polyline" in curve({"a": (steps, values, "red")})
    assert ticks(0, 10) == [0, 2.5, 5, 7.5, 10] and ticks(1, 1) == [1]


@pytest.mark.parametrize("name", sorted(FIGURES))
def test_figures_of_an_environment_follow_its_state(name: str) -> None:
    draw = np.random.default_rng(0)
    size = {"CartPole-v1": 4, "Pendulum-v1": 3, "MountainCarContinuous-v0": 2, "Acrobot-v1": 6}[name]
    rows = draw.uniform(-0.5, 0.5, (23, size))
    assert FIGURES[name](rows[0]) != FIGURES[name](rows[1])
    shown = strip(name, rows, 0.02)
    assert shown.count("<svg") == 10 and "0.0 s" in shown and "0.4 s" in shown
    assert strip(name, rows[:1], 0.02).count("<svg") == 1


LOCAL = ("file:", "data:", "blob:", "about:")


def requests(page: Path, folder: Path) -> tuple[list[str], str]:
    """What a page asks the network for when a browser opens it, and the document that it became."""
    log = folder / "net.json"
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--disable-background-networking"]
    flags += [f"--user-data-dir={folder / 'profile'}", "--host-resolver-rules=MAP * ~NOTFOUND", f"--log-net-log={log}"]
    command = [str(CHROMIUM), *flags, "--virtual-time-budget=2000", "--dump-dom", page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert "Uncaught" not in done.stderr and "Refused to" not in done.stderr
    events = [event.get("params", {}) for event in json.loads(log.read_text())["events"]]
    asked = {e["url"] for e in events if e.get("initiator") == "null" and not e.get("url", "file:").startswith(LOCAL)}
    return sorted(asked), done.stdout


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium to open the page with")
def test_the_page_opens_in_a_browser_and_no_request_leaves_it(quick: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    spy = tmp_path / "spy.html"
    spy.write_text('<img src="http://other.invalid/x.png">')
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    assert requests(spy, tmp_path / "one")[0] == ["http://other.invalid/x.png"], "the log would show a request"
    found, document = requests(quick[0] / "report.html", tmp_path / "two")
    assert found == []
    assert document.count("<tr") > len(ASKED) and "<audio" in document and document.rstrip().endswith("</html>")
