"""What the plan says of divided experts and measured speed, held against a divided model and a run's own figures."""

from __future__ import annotations

import json

import pytest

from tests.training.synthetic import small_config, small_model
from weft.model.presets import preset
from weft.training.expert_parallel import ExpertGroups, divide
from weft.training.plan import ASSUMED_MFU, PlanError, expert_params, measured_mfu, plan, step_bytes, table


@pytest.mark.parametrize("size", [2, 4])
def test_planned_weights_are_those_of_a_divided_model(size):
    model = small_model(experts=4)
    divide(model, ExpertGroups(size=size, index=1))
    held = 4 * sum(p.numel() for p in model.parameters())
    weights, gradients, moments, _ = step_bytes(small_config(experts=4), 64, 0, size, expert_parallel=size)
    assert (weights, gradients, moments) == pytest.approx((held, held, 2 * held))


def test_zero_divides_the_same_with_divided_experts():
    config = small_config(experts=4)
    whole = step_bytes(config, 64, 3, 8)
    assert step_bytes(config, 64, 3, 8, expert_parallel=4) == pytest.approx(whole)
    one, two = step_bytes(config, 64, 1, 8), step_bytes(config, 64, 1, 8, expert_parallel=4)
    assert two[2] == pytest.approx(one[2]) and one[0] - two[0] == pytest.approx(4 * expert_params(config) * 3 / 4)


def test_rows_on_their_way_cost_time():
    config = preset("base", vocab_size=65536)
    at_home, away = (plan(config, gpus=8, expert_parallel=size) for size in (1, 8))
    assert away.step_s > at_home.step_s and away.memory_gib < at_home.memory_gib
    assert "divided by 8" in table(config, gpus=8, expert_parallel=8).splitlines()[0]


@pytest.mark.parametrize(("gpus", "size", "experts"), [(8, 3, 6), (8, 8, 4), (8, 2, 0), (8, 0, 4)])
def test_experts_that_cannot_be_divided_are_refused(gpus, size, experts):
    with pytest.raises(PlanError, match="must divide 8 GPU"):
        plan(small_config(experts=experts), gpus=gpus, expert_parallel=size)


def test_a_measured_share_of_the_peak_replaces_the_assumed_one(tmp_path):
    with pytest.raises(PlanError, match="holds no MFU"):
        measured_mfu(tmp_path)
    rows = [{"step": s, "tokens_per_s": 1.0, "mfu": m} for s, m in enumerate((0.05, 0.2, 0.41, 0.42, 0.43))]
    (tmp_path / "speed.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = measured_mfu(tmp_path)
    assert found == 0.42
    config = preset("base", vocab_size=65536)
    guess, measured = plan(config, gpus=1), plan(config, gpus=1, assumed_mfu=found)
    assert measured.tokens_per_s / guess.tokens_per_s == pytest.approx(found / ASSUMED_MFU)
