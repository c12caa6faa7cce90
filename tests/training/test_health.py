"""A silent rank is named, a flipped bit is found, and norms by part add up."""

from __future__ import annotations

import json
import random

import pytest
import torch

from tests.training import runs, scenarios
from tests.training.synthetic import small_model
from weft.training import health
from weft.training.distributed import World
from weft.training.engine import EngineConfig, LocalEngine
from weft.training.health import Heartbeat, digests, disagreements, heartbeats, main, stalled
from weft.training.norms import PARTS, part_of


def test_a_run_leaves_one_heartbeat_per_rank(tmp_path):
    runs.go(runs.config(tmp_path, max_steps=3))
    said = heartbeats(tmp_path)
    assert [(one["rank"], one["step"], one["phase"]) for one in said] == [(0, 3, "done")]
    assert stalled(tmp_path, after_s=0, now_s=said[0]["time_s"] + 1000) == []


def test_a_silent_rank_is_named_with_step_and_phase(tmp_path, capsys):
    for rank, step in ((0, 12), (1, 9)):
        Heartbeat(tmp_path, rank).beat(step, "training")
    path = tmp_path / "heartbeat" / "rank-1.json"
    said = json.loads(path.read_text())
    path.write_text(json.dumps({**said, "time_s": said["time_s"] - 300}))
    assert stalled(tmp_path, after_s=400) == []
    (line,) = stalled(tmp_path, after_s=120)
    assert line.startswith("rank 1 on ") and "300 s in training of step 9, 3 steps behind" in line
    assert main([str(tmp_path)]) == 1
    assert "stalled: rank 1" in capsys.readouterr().out
    assert main([str(tmp_path), "--after", "400"]) == 0


def test_a_folder_without_heartbeats_is_a_mistake(tmp_path, capsys):
    assert main([str(tmp_path)]) == 2
    assert "point to the folder of a run" in capsys.readouterr().err


def test_a_heartbeat_is_not_written_more_often_than_asked(tmp_path):
    heart = Heartbeat(tmp_path, 0, every_s=60)
    heart.beat(1, "training")
    heart.beat(2, "training")
    assert heartbeats(tmp_path)[0]["step"] == 1
    heart.beat(2, "saving", force=True)
    assert heartbeats(tmp_path)[0]["step"] == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_every_flipped_bit_changes_the_digest(dtype):
    value = torch.randn(7, 11, generator=torch.Generator().manual_seed(0)).to(dtype)
    before = digests({"w": value})
    integers = value.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[value.element_size()])
    draw = random.Random(0)
    for _ in range(200):
        row, column, bit = draw.randrange(7), draw.randrange(11), draw.randrange(8 * value.element_size() - 1)
        integers[row, column] ^= 1 << bit
        assert not torch.equal(digests({"w": value}), before)
        integers[row, column] ^= 1 << bit
    assert torch.equal(digests({"w": value}), before)


def test_the_rank_outside_the_majority_is_named():
    rows = torch.tensor([[1, 5], [1, 5], [1, 6], [1, 5]])
    assert disagreements(["a", "b"], rows, [0, 0, 0, 0]) == ["b: rank 2 differs from the others"]
    assert disagreements(["a", "b"], rows, [0, 1, 0, 1]) == ["b: rank 0, 2 do not agree"]
    assert disagreements(["a"], rows[:, :1], [0, 0, 0, 0]) == []


def test_a_flipped_bit_stops_every_rank_of_a_run(monkeypatch):
    """Two ranks of which one has a changed bit, as the gathered digests show it."""
    value = torch.randn(5, 3)
    other = value.clone()
    other.view(torch.int32)[2, 1] ^= 1 << 20
    monkeypatch.setattr(health, "world", lambda: World(0, 2))
    both = [torch.cat([torch.tensor([0]), digests({"blocks.0.w": v})]) for v in (value, other)]
    monkeypatch.setattr(health, "gather_integers", lambda mine: torch.stack(both))
    with pytest.raises(health.WeightsDiffer, match=r"blocks\.0\.w: rank 0, 1 do not agree.*goes on from the last checkpoint"):
        health.check_agreement({"blocks.0.w": value}, {}, 0)
    monkeypatch.setattr(health, "gather_integers", lambda mine: torch.stack([both[0], both[0]]))
    health.check_agreement({"blocks.0.w": value}, {}, 0)


def test_ranks_that_read_other_shards_stop_before_the_first_step(monkeypatch):
    mine = {"seed": 0, "data": {"digest": "a"}}
    seen = []
    monkeypatch.setattr(health, "world", lambda: World(0, 3))
    monkeypatch.setattr(health, "gather_integers", lambda row: seen.append(row) or torch.stack([row, row, row]))
    health.check_same_run(mine)
    health.check_same_run({**mine, "data": {"digest": "b"}})
    monkeypatch.setattr(health, "gather_integers", lambda row: torch.stack([seen[0], seen[1], row]))
    with pytest.raises(health.RunsDiffer, match=r"data: rank 1 differs from the others.*tokenizer and shards"):
        health.check_same_run(mine)


def test_norms_by_part_add_up_to_the_norm():
    engine = LocalEngine(small_model(), EngineConfig(), scenarios.optimizer(), scenarios.LOSS, World())
    (batch,) = scenarios.pairs_steps(scenarios.PAIRS[:1], None)[0]
    outcome = engine.forward_backward([batch], engine.exchange([batch], []).whole)
    assert sum(n * n for n in outcome.part_norms.values()) ** 0.5 == pytest.approx(outcome.grad_norm, rel=1e-6)
    assert set(outcome.part_norms) == set(PARTS)
    experts = [p.grad for name, p in engine.model.named_parameters() if ".mlp.experts." in name]
    assert outcome.part_norms["experts"] == pytest.approx(float(torch.cat([g.flatten() for g in experts]).norm()), rel=1e-6)


def test_every_parameter_has_a_part():
    found = {part_of(name) for name, _ in small_model().named_parameters()}
    assert found == set(PARTS)
    assert part_of("blocks.1.ffn_norm.weight") == "ffn" and part_of("norm.weight") == "output"
