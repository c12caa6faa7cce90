"""Two processes under DeepSpeed compute what one plain process computes, for every ZeRO stage."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.training import runs, scenarios
from tests.training.ranks import launch
from tests.training.synthetic import small_model
from weft.training.distributed import World
from weft.training.engine import EngineConfig, LocalEngine
from weft.training.tracking import read_jsonl

pytest.importorskip("deepspeed", reason="pip install 'weft[deepspeed]'")

pytestmark = pytest.mark.timeout(900)
STAGES = scenarios.STAGES
SAME_SCHEDULE = {"kind": "constant", "warmup_steps": 0}


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """One two-process job with all scenarios; a single process begins one of its runs."""
    out = tmp_path_factory.mktemp("ranks")
    runs.go(runs.config(out / "one_then_two", max_steps=6, schedule=SAME_SCHEDULE))
    return out, launch(scenarios.everything, out)


def plain(steps: list[list[Any]], clip: float = 0.0) -> tuple[list[float], dict[str, torch.Tensor]]:
    """(losses, weights and moments) of one plain process."""
    engine = LocalEngine(small_model(), EngineConfig(), scenarios.optimizer(clip), scenarios.LOSS, World())
    losses = scenarios.take(engine, steps)
    return losses, {**engine.weights(), **engine.moments()}


def saved(out: Path, name: str) -> dict[str, torch.Tensor]:
    return {**load_file(out / f"{name}.weights.safetensors"), **load_file(out / f"{name}.moments.safetensors")}


def close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], rel: float) -> None:
    """Every tensor within `rel` of the largest value of its counterpart. Adam turns rounding of tiny gradients into
    steps of size lr, so weights are compared to a thousandth of the step and moments relatively."""
    assert found.keys() == expected.keys(), sorted(found.keys() ^ expected.keys())[:6]
    for name, value in expected.items():
        scale = float(value.abs().max()) if name.startswith(("exp_avg", "step")) else 1.0
        assert float((found[name] - value).abs().max()) <= rel * scale + 1e-12, name


@pytest.mark.parametrize("name", ["local2", *STAGES])
def test_ranks_with_different_modalities_equal_one_process(job, name):
    out, result = job
    losses, state = plain(scenarios.pairs_steps(scenarios.PAIRS, None))
    assert result[f"{name}.pairs"] == pytest.approx(losses, rel=2e-5)
    first, moments = plain(scenarios.pairs_steps(scenarios.PAIRS[:1], None))
    assert first[0] == pytest.approx(result[f"{name}.pairs"][0], rel=1e-6)
    close({k: v for k, v in saved(out, f"{name}.pairs").items() if k in moments}, state, 2e-3)


@pytest.mark.parametrize("stage", STAGES)
def test_accumulation_over_ranks_equals_one_process(job, stage):
    out, result = job
    losses, state = plain(scenarios.accumulated(None), clip=0.5)
    assert result[f"{stage}.clip"]["losses"] == pytest.approx(losses, rel=1e-6)
    close(saved(out, f"{stage}.clip"), state, 1e-3)


@pytest.mark.parametrize("stage", STAGES)
def test_poison_on_one_rank_is_skipped_by_both_and_changes_nothing(job, stage):
    _, result = job
    assert result[f"{stage}.clip"]["poison"] == [False, False, True]


@pytest.mark.parametrize("stage", STAGES)
def test_saved_state_resumes_bit_for_bit(job, stage):
    out, result = job
    after, again = result[f"{stage}.clip"]["resumed"]
    assert after == again
    one, other = saved(out, f"{stage}.after"), saved(out, f"{stage}.again")
    assert all(torch.equal(one[k], other[k]) for k in one)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_gradients_equal_one_process_for_every_pair_of_modalities(tmp_path):
    """Adam's first moment after one update from zero is a tenth of the gradient."""
    launch(scenarios.matrix, tmp_path, limit_s=3000)
    names = list(scenarios.PIECES)
    for left in names:
        for right in names:
            _, state = plain(scenarios.pairs_steps([(left, right)], None))
            expected = {k: v for k, v in state.items() if k.startswith("exp_avg.")}
            for stage in STAGES:
                found = load_file(tmp_path / f"{stage}.{left}.{right}.moments.safetensors")
                scale = max(float(v.abs().max()) for v in expected.values())
                for name, value in expected.items():
                    assert float((found[name] - value).abs().max()) <= 1e-6 * scale + 1e-12, (stage, left, right, name)


def rows(folder: Path) -> list[float]:
    return [row["loss"] for row in read_jsonl(folder / "metrics.jsonl") if "loss" in row]


def test_run_of_two_ranks_continues_on_one_and_back(job, tmp_path):
    out, result = job
    assert (result["two_then_one"], result["one_then_two"]) == (6, 12)
    whole = runs.config(tmp_path / "whole", schedule=SAME_SCHEDULE)
    runs.go(whole)
    runs.go(runs.config(out / "two_then_one", schedule=SAME_SCHEDULE))
    for name in ("two_then_one", "one_then_two"):
        assert rows(out / name) == pytest.approx(rows(whole.folder), rel=2e-4)
