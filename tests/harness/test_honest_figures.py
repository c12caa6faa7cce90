"""Figures that look right and are not: each of these was one, or could be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from weft.benchmarks.harness import metrics as m
from weft.benchmarks.harness.aggregate import gaps, summarise
from weft.benchmarks.harness.environments import begin
from weft.benchmarks.harness.page import compare
from weft.benchmarks.harness.runner import EvalConfig, evaluate
from weft.benchmarks.harness.samples import task_data
from weft.benchmarks.harness.task import Data, Task, TaskError, load_tasks
from weft.inference.generalist import Generalist

DRAW = """name: draw
data: {manifest: draw.test.jsonl}
answer: image
first: [text]
produce: {max_tokens: 4, grid: [2, 2], temperature: 1}
metrics: [psnr]
"""


def run(model: Any, text: str, root: Path, out: Path, **config: Any) -> dict[str, Any]:
    (out / "task.yaml").write_text(text)
    (task,) = load_tasks(out / "task.yaml")
    found: dict[str, Any] = evaluate(model, [(task, root)], out / "out", EvalConfig(rounds=20, **config))["tasks"][task.name]
    return found


def records(out: Path, task: str) -> dict[str, Any]:
    (file,) = (out / "out" / task).glob("*.jsonl")
    return {r["key"]: r for r in map(json.loads, file.read_text().splitlines())}


def test_equal_questions_are_drawn_apart_and_alike_in_any_batch(tiny: Generalist, data: Path, tmp_path: Path) -> None:
    drawn = []
    for batch in (1, 5):
        out = tmp_path / str(batch)
        out.mkdir()
        assert run(tiny, DRAW, data, out, batch=batch)["failed"] == 0
        found = records(out, "draw")
        assert all(isinstance(r["said"], str) for r in found.values())  # words come first, then the picture
        drawn.append({key: (out / "out/draw/media/whole" / r["media"]).read_bytes() for key, r in found.items()})
    assert drawn[0] == drawn[1]
    dark = [drawn[0][f"draw/test/{i}"] for i in (0, 2, 4)]  # one prompt, three documents
    assert len(set(dark)) > 1


def test_an_unreadable_item_of_a_gallery_is_never_found_and_spoils_no_query(
    tiny: Generalist, data: Path, tmp_path: Path
) -> None:
    lines = (data / "name.test.jsonl").read_text().splitlines()
    torn = {"id": "torn", "pair": "bit-0", "segments": [{"image": "nowhere.png", "role": "observed"}]}
    text = "name: find\ndata: {manifest: look.test.jsonl, gallery: torn.test.jsonl}\n"
    text += "answer: retrieval\nmetrics: [recall@1, rank]\n"
    (data / "torn.test.jsonl").write_text("\n".join([*lines, json.dumps(torn)]) + "\n")
    found = run(tiny, text, data, tmp_path)
    assert found["failed"] == 0, found["failures"]
    alone = [json.dumps({**json.loads(line), "pair": "other"}) for line in lines]
    (data / "torn.test.jsonl").write_text("\n".join([*alone, json.dumps(torn)]) + "\n")
    (tmp_path / "b").mkdir()
    found = run(tiny, text, data, tmp_path / "b")
    kept = {key: r for key, r in records(tmp_path / "b", "find").items() if not r.get("failed")}
    assert len(kept) == 3 and all(r["scores"] == {**r["scores"], "recall@1": 0.0, "rank": 6.0} for r in kept.values())


def test_a_corrected_scale_is_used_for_episodes_on_record(tiny: Generalist, data: Path, tmp_path: Path) -> None:
    text = "name: cart\ndata: {environment: CartPole-v1}\nanswer: control\nmetrics: [normalised_return]\n"
    text += "control: {kind: cart, rate_hz: 50, episodes: 2, max_steps: 3, scale: scale.json}\n"
    values = []
    for expert in (3, 6):
        (tmp_path / "scale.json").write_text(json.dumps({"random": 0, "expert": expert}))
        values.append(run(tiny, text, tmp_path, tmp_path)["metrics"]["normalised_return"])
    assert [v["value"] for v in values] == [100.0, 50.0]


def test_slices_are_pooled_as_the_figure_is() -> None:
    task = Task("t", Data(manifest="x"), "text", ("wer",), slices=("who",))
    said = [("a b c d", "a b c d"), ("x", "y")] * 5  # rates 0 and 1; one word in five is wrong
    rows = [{"key": str(i), "answer": a, "reference": r, "metadata": {"who": "abc"[i % 2]}} for i, (a, r) in enumerate(said)]
    more = [{**r, "key": f"m{r['key']}", "metadata": {"who": "c"}} for r in rows]
    slices = gaps(task, [*rows, *more], 50)["who"]["slices"]
    assert slices["c"]["value"] == pytest.approx(0.2) == summarise(task, rows, 20)["metrics"]["wer"]["value"]


def test_a_failed_sample_is_no_class_of_its_own_to_be_right_about() -> None:
    task = Task("t", Data(manifest="x"), "choices", ("macro_f1", "calibration_error"), choices=("a", "b"))
    rows = [{"key": str(i), "answer": "ab"[i % 2], "reference": "a", "confidence": 0.9} for i in range(4)]
    failed = {"key": "9", "failed": "torn", "reference": None}
    before, after = (summarise(task, some, 20)["metrics"] for some in (rows, [*rows, failed]))
    assert after["macro_f1"]["value"] < before["macro_f1"]["value"]
    assert after["calibration_error"]["value"] > before["calibration_error"]["value"]


def test_an_answer_that_is_no_class_costs_a_miss() -> None:
    assert m.macro_f1(["a", "b", "nonsense"], ["a", "b", "b"]) == pytest.approx((1 + 2 / 3) / 2)


def test_one_episode_has_no_interval() -> None:
    task = Task("t", Data(manifest="x"), "text", ("accuracy",))
    (figure,) = summarise(task, [{"key": "a", "answer": "x", "reference": "x"}], 20)["metrics"].values()
    assert figure["value"] == 1.0 and "low" not in figure


def test_a_page_shows_the_samples_of_this_run(tiny: Generalist, data: Path, tmp_path: Path) -> None:
    text = "name: pick\ndata: {manifest: look.test.jsonl}\nanswer: choices\nchoices: [dark, light]\nmetrics: [accuracy]\n"
    run(tiny, text, data, tmp_path)
    found = run(tiny, text, data, tmp_path, limit=2)
    shown = {*found["shown"]["best"], *found["shown"]["worst"]}
    page = compare({"tiny": tmp_path / "out"}, tmp_path / "page.html").read_text()
    assert len(shown) == 2 and len(records(tmp_path, "pick")) == 5
    assert all((key in page) == (key in shown) for key in records(tmp_path, "pick"))
    assert page.count("<figcaption>asked<") == 2 == page.count("dark or light?")  # each with its picture and its words


def test_training_documents_of_the_test_are_neither_shown_nor_learnt_from(data: Path) -> None:
    both = (data / "look.test.jsonl").read_text() + (data / "look.train.jsonl").read_text()
    (data / "leaked.jsonl").write_text(both)
    task = Task("t", Data(manifest="look.test.jsonl", train="leaked.jsonl"), "text", ("accuracy",), shots=1)
    assert {s.key.split("/")[1] for s in task_data(task, data, limit=1).pool} == {"train"}
    with pytest.raises(TaskError, match="is asked in the test; name the training split"):
        task_data(Task("t", Data(manifest="look.test.jsonl", train="look.test.jsonl"), "text", ("accuracy",), shots=1), data)


def test_an_episode_is_its_seed_even_where_a_wrapper_draws_first() -> None:
    import gymnasium

    class Goal(gymnasium.Wrapper):  # type: ignore[misc, type-arg]
        def reset(self, **options: Any) -> Any:
            self.goal = self.np_random.random()  # before the seed is handed on, as Meta-World's wrapper does
            return self.env.reset(**options)

    first, second = (Goal(gymnasium.make("CartPole-v1")) for _ in range(2))
    begin(first, 3), begin(first, 4)
    assert np.array_equal(begin(first, 5)[0], begin(second, 5)[0]) and first.goal == second.goal
    assert begin(second, 6) and first.goal != second.goal
