"""What happens now and then in a run: evaluation, an average of the weights, the best checkpoints, a full disk, lost data."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.training.runs import config, data, fingerprint, go
from tests.training.synthetic import FEATURES, mixed_streams, small_model
from weft.tokenizers.pack import Batch, collate
from weft.training.checkpoint import DiskFullError, checkpoints, read_json, step_folder
from weft.training.ema import Ema
from weft.training.parts import Moment
from weft.training.tracking import read_jsonl

STEADY: dict[str, Any] = {"schedule": {"kind": "constant", "warmup_steps": 0}, "monitors": {"probe_every": 0}}


def held_out() -> list[Batch]:
    return [collate([mixed_streams(4, seed=9)], 192, FEATURES)]


def test_the_evaluation_hook_sees_the_model_when_it_is_due_and_its_figures_are_logged(tmp_path: Path) -> None:
    seen: list[tuple[int, float]] = []

    def evaluate(model: Any, step: int) -> dict[str, float]:
        seen.append((step, float(model.norm.weight.detach().sum())))
        return {"answers": 0.5 + step}

    run = config(tmp_path, max_steps=8, evaluation={"every": 3}, **STEADY)
    result = go(run, evaluate=evaluate, validation=held_out())
    assert [step for step, _ in seen] == [3, 6, 8]
    assert len({weight for _, weight in seen}) == 3  # the model of that step, not of the first
    rows = [row for row in read_jsonl(tmp_path / "metrics.jsonl") if "eval/answers" in row]
    assert [(row["step"], row["eval/answers"]) for row in rows] == [(2, 3.5), (5, 6.5), (7, 8.5)]
    assert all(row["eval/loss"] > 0 and any(k.startswith("eval/loss/") for k in row) for row in rows)
    assert result.metrics["eval/answers"] == 8.5
    go(run, evaluate=evaluate, validation=held_out())  # a finished run that is started again says nothing twice
    assert [row for row in read_jsonl(tmp_path / "metrics.jsonl") if "eval/answers" in row] == rows


class Gone(BaseException):
    """The process ended here."""


@pytest.mark.parametrize("last", [7, 8])
def test_a_run_that_dies_after_its_last_checkpoint_still_writes_the_same_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, last: int
) -> None:
    """The last evaluation is a row of its own; whether it was written before the checkpoint must not matter."""
    given = {"evaluation": {"every": 3}, "checkpoint": {"every": 4}}
    whole = config(tmp_path / "whole", max_steps=last, **given)
    go(whole, validation=held_out())
    run = config(tmp_path / "run", max_steps=last, **given)
    from weft.training import run_state

    real = run_state.publish

    def die_before_final(folder: Path, *rest: Any, **more: Any) -> Path:
        if folder.name == "final":
            raise Gone
        return real(folder, *rest, **more)

    with monkeypatch.context() as patch, pytest.raises(Gone):
        patch.setattr(run_state, "publish", die_before_final)
        go(run, validation=held_out())
    go(run, validation=held_out())
    assert fingerprint(run.folder, last) == fingerprint(whole.folder, last)


def test_the_average_follows_its_formula_and_is_what_inference_gets(tmp_path: Path) -> None:
    seen: list[dict[str, torch.Tensor]] = []

    def keep(moment: Moment) -> None:
        seen.append({k: v.clone() for k, v in moment.model.state_dict().items()})

    first = {k: v.float().clone() for k, v in small_model().state_dict().items()}
    go(config(tmp_path, max_steps=5, checkpoint={"ema": 0.9}, **STEADY), callbacks=[keep])
    expected = first
    for n, weights in enumerate(seen):
        decay = min(0.9, (1 + n) / (10 + n))
        expected = {k: decay * expected[k] + (1 - decay) * weights[k].float() for k in expected}
    final = load_file(tmp_path / "final" / "model.safetensors")
    assert all(torch.allclose(final[k].float(), v, atol=1e-6) for k, v in expected.items())
    assert not torch.equal(final["norm.weight"], seen[-1]["norm.weight"])


def test_the_average_comes_back_where_it_lay():
    """A checkpoint is read into CPU memory; `meta` stands for the GPU that holds the weights."""
    average = Ema({"w": torch.zeros(3, device="meta")}, 0.9)
    average.restore({"w": torch.ones(3), "experts of another rank": torch.ones(2)}, 7)
    assert {name: value.device.type for name, value in average.average.items()} == {"w": "meta"}
    average.update({"w": torch.zeros(3, device="meta")})
    assert average.updates == 8


def test_held_out_data_that_are_not_finite_cost_their_score_and_not_the_run(tmp_path: Path) -> None:
    (good,) = held_out()
    bad = replace(good, features={name: torch.full_like(value, float("nan")) for name, value in good.features.items()})
    run = config(tmp_path, max_steps=4, checkpoint={"every": 2, "keep_best": 1}, evaluation={"every": 2}, **STEADY)
    assert go(run, validation=[bad]).steps == 4
    saved = checkpoints(tmp_path / "checkpoints")
    assert [read_json(folder / "trainer.json")["score"] for folder in saved] == [None, None]
    rows = [row for row in read_jsonl(tmp_path / "metrics.jsonl") if "eval/loss" in row]
    assert [(row["step"], row["eval/loss"]) for row in rows] == [(1, None), (3, None)]


def test_the_best_checkpoints_of_a_run_are_kept(tmp_path: Path) -> None:
    keep = {"every": 2, "keep_last": 1, "keep_best": 1}
    run = config(tmp_path, max_steps=10, checkpoint=keep, evaluation={"every": 2}, optimizer={"lr": 3e-2}, **STEADY)
    scores: dict[int, float] = {}

    def note(moment: Moment) -> None:
        for folder in checkpoints(run.folder / "checkpoints"):
            scores[int(folder.name[5:])] = read_json(folder / "trainer.json")["score"]

    go(run, validation=held_out(), callbacks=[note])
    note(None)  # type: ignore[arg-type]
    assert sorted(scores) == [2, 4, 6, 8, 10]
    best = min(scores, key=lambda step: (scores[step], -step))
    assert {f.name for f in checkpoints(run.folder / "checkpoints")} == {step_folder(run.folder, s).name for s in {best, 10}}


@pytest.mark.parametrize("choice", ["stop", "continue"])
def test_a_disk_that_fills_up_stops_the_run_or_is_waited_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, choice: str
) -> None:
    """No room at steps 6 and 9; the checkpoint of step 3 stays, and with `continue` step 12 is saved again."""
    run = config(tmp_path, checkpoint={"every": 3, "on_full_disk": choice}, **STEADY)
    usage = shutil.disk_usage
    step = {"now": 0}

    def full(path: Any) -> Any:
        return usage(path)._replace(free=0) if step["now"] in (6, 9) else usage(path)

    monkeypatch.setattr(shutil, "disk_usage", full)
    told = {"callbacks": [lambda moment: step.update(now=moment.step + 1)]}
    if choice == "stop":
        with pytest.raises(DiskFullError, match=r"no room for checkpoint .*step-00000006.*free some space"):
            go(run, **told)
        assert [f.name for f in checkpoints(run.folder / "checkpoints")] == ["step-00000003"]
        step["now"] = 0
        go(run)  # once there is room, the run ends as if nothing had been
    else:
        go(run, **told)
        assert [f.name for f in checkpoints(run.folder / "checkpoints")] == ["step-00000003", "step-00000012"]
    whole = config(tmp_path / "whole", checkpoint={"every": 3}, **STEADY)
    go(whole)
    found = fingerprint(run.folder)
    assert {k: v for k, v in found.items()} == fingerprint(whole.folder)


class Losing:
    """Data in memory that says it lost something: step 1 cuts two documents, step 3 drops one and replaces one."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def counts(self, step: int) -> dict[str, int]:
        return {1: {"cut": 2}, 3: {"dropped": 1, "replaced": 1}}.get(step, {})


def test_what_the_data_lost_is_in_every_row_and_in_the_summary_also_after_a_stop(tmp_path: Path) -> None:
    for steps in (3, 6):
        run = config(tmp_path, max_steps=steps, tracking={"panel": "plain"}, **STEADY)
        go(run, source=Losing(data(run)))
    rows = [row for row in read_jsonl(tmp_path / "metrics.jsonl") if "loss" in row]
    lost = [tuple(int(row[f"data/{name}"]) for name in ("cut", "dropped", "replaced")) for row in rows]
    assert lost == [(0, 0, 0), (2, 0, 0), (0, 0, 0), (0, 1, 1), (0, 0, 0), (0, 0, 0)]
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["data"] == {"cut": 2, "dropped": 1, "replaced": 1, "quarantined": 0}
    assert summary["steps"] == summary["applied"] == 6 and summary["metrics"]["loss"] == rows[-1]["loss"]


def test_data_that_does_not_count_says_nothing(tmp_path: Path) -> None:
    go(config(tmp_path, max_steps=2, **STEADY))
    assert not any(k.startswith("data/") for row in read_jsonl(tmp_path / "metrics.jsonl") for k in row)
