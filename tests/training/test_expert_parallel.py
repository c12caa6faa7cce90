"""Experts divided between ranks compute what one process with all experts computes, for every engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.training import expert_scenarios as divided
from tests.training import runs, scenarios
from tests.training.expert_scenarios import ENGINES, SIZES, routed_model
from tests.training.ranks import launch
from tests.training.synthetic import small_config, small_model
from tests.training.test_deepspeed import SAME_SCHEDULE, close, rows, saved
from weft.model.save import from_pretrained
from weft.training.distributed import World
from weft.training.engine import EngineConfig, LocalEngine
from weft.training.expert_parallel import ExpertGroups, ExpertParallelError, by_expert, check
from weft.training.export import export

deepspeed = pytest.importorskip("deepspeed", reason="pip install 'weft[deepspeed]'")
pytestmark = pytest.mark.timeout(900)


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """One two-process job with all scenarios; a single process begins one of its runs."""
    out = tmp_path_factory.mktemp("experts")
    runs.go(runs.config(out / "one_then_divided", max_steps=6, schedule=SAME_SCHEDULE), model=routed_model())
    return out, launch(divided.quick, out)


State = dict[str, torch.Tensor]


def plain(steps: list[list[Any]], clip: float = 0.0, favour: tuple[int, ...] = ()) -> tuple[list[float], State]:
    """(losses, weights and moments) of one process with all experts."""
    engine = LocalEngine(routed_model(favour), EngineConfig(), scenarios.optimizer(clip), scenarios.LOSS, World())
    losses = scenarios.take(engine, steps)
    return losses, {**engine.weights(), **engine.moments()}


def gradients_equal(found: State, state: State, rel: float = 1e-6) -> None:
    """Adam's first moment after one update from zero is a tenth of the gradient."""
    expected = {k: v for k, v in state.items() if k.startswith("exp_avg.")}
    scale = max(float(v.abs().max()) for v in expected.values())
    for name, value in expected.items():
        assert float((found[name] - value).abs().max()) <= rel * scale + 1e-12, name


@pytest.mark.parametrize("name", [*ENGINES, "recompute"])
def test_divided_experts_equal_one_process_for_unlike_and_empty_ranks(job, name):
    out, result = job
    losses, state = plain(scenarios.pairs_steps(scenarios.PAIRS, None))
    assert result[f"{name}.pairs"] == pytest.approx(losses, rel=2e-5)
    assert result[f"{name}.pairs"][0] == pytest.approx(losses[0], rel=1e-6)
    close({k: v for k, v in saved(out, f"{name}.pairs").items()}, state, 2e-3)


@pytest.mark.parametrize("favour", [(0, 1), (2, 3), (0, 3)], ids=["rank0", "rank1", "both"])
def test_experts_without_tokens_get_zero_gradients_and_the_rest_the_right_ones(job, favour):
    out, _ = job
    found = load_file(out / f"idle.{''.join(map(str, favour))}.moments.safetensors")
    _, state = plain(scenarios.pairs_steps(scenarios.PAIRS[:1], None), favour=favour)
    gradients_equal(found, state)
    idle = [e for e in range(SIZES["experts"]) if e not in favour]
    moments = {name: value for name, value in found.items() if ".mlp.experts." in name and name.startswith("exp_avg.")}
    assert len(moments) == 4
    for value in moments.values():
        assert not value[idle].any() and value[list(favour)].abs().amax((1, 2)).min() > 0


@pytest.mark.parametrize("name", ENGINES)
def test_clipping_counts_every_expert_once(job, name):
    """With a wrong norm the clipped gradients, and so both moments, would be off by its factor."""
    out, result = job
    losses, state = plain(scenarios.accumulated(None), clip=0.5)
    assert result[f"{name}.clip"]["losses"] == pytest.approx(losses, rel=1e-6)
    close(saved(out, f"{name}.clip"), state, 1e-3)


@pytest.mark.parametrize("name", ENGINES)
def test_poison_on_one_rank_or_in_its_experts_changes_nothing(job, name):
    _, result = job
    assert result[f"{name}.clip"]["poison"] == [False, False, False, True]


@pytest.mark.parametrize("name", ENGINES)
def test_saved_state_of_divided_experts_resumes_bit_for_bit(job, name):
    out, result = job
    after, again = result[f"{name}.clip"]["resumed"]
    assert after == again
    one, other = saved(out, f"{name}.after"), saved(out, f"{name}.again")
    assert one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def test_probes_get_a_whole_model_on_the_first_rank(job):
    _, result = job
    assert result["probe"] == [True]


def test_run_with_divided_experts_continues_on_one_process_and_back(job, tmp_path):
    out, result = job
    assert (result["divided_then_one"], result["one_then_divided"]) == (6, 12)
    whole = runs.config(tmp_path / "whole", schedule=SAME_SCHEDULE)
    runs.go(whole, model=routed_model())
    runs.go(runs.config(out / "divided_then_one", schedule=SAME_SCHEDULE), model=routed_model())
    for name in ("divided_then_one", "one_then_divided"):
        assert rows(out / name) == pytest.approx(rows(whole.folder), rel=2e-4)


def test_run_with_divided_experts_exports_one_folder(job, tmp_path):
    out, _ = job
    folder = export(out / "one_then_divided", tmp_path / "exported")
    model = from_pretrained(folder)
    stored = load_file(out / "one_then_divided" / "final" / "model.safetensors")
    assert model.get_parameter("blocks.2.mlp.experts.down_proj").size(0) == SIZES["experts"]
    assert all(torch.equal(value, stored[name]) for name, value in model.state_dict().items())


def test_rows_from_all_ranks_are_sorted_by_expert_then_rank():
    order, place = by_expert(torch.tensor([[2, 1, 0], [1, 0, 3]]), 7)
    assert order.tolist() == [0, 1, 3, 2, 4, 5, 6]
    assert place[order].tolist() == list(range(7))


def test_own_and_split_know_experts_by_name():
    groups = ExpertGroups(size=2, index=1)
    value = torch.arange(4.0)[:, None, None].expand(4, 3, 2)
    assert groups.own("exp_avg.blocks.1.mlp.experts.down_proj", value)[:, 0, 0].tolist() == [2.0, 3.0]
    assert groups.own("blocks.1.ffn.down.weight", value) is value
    common, apart = groups.split({"blocks.1.mlp.gate.weight": value, "blocks.1.mlp.experts.down_proj": value})
    assert (list(common), list(apart)) == (["blocks.1.mlp.gate.weight"], ["blocks.1.mlp.experts.down_proj"])


@pytest.mark.parametrize(
    ("size", "world", "sizes", "words"),
    [
        (2, World(0, 1), {"experts": 4}, "start a multiple of 2"),
        (2, World(0, 3), {"experts": 4}, "continues the same checkpoints"),
        (2, World(0, 2), {"experts": 3}, "3 routed experts; it must divide them evenly"),
        (4, World(0, 4), {"experts": 2}, "must divide them evenly"),
    ],
)
def test_worlds_that_cannot_divide_the_experts_are_refused(size, world, sizes, words):
    with pytest.raises(ExpertParallelError, match=words):
        check(small_config(**sizes), size, world)


def test_adapters_are_refused_with_divided_experts():
    from weft.training import expert_parallel, finetune

    model = small_model(**SIZES)
    finetune.apply(model, finetune.FinetuneConfig(lora=("blocks.*.attention.out.weight",)))
    with pytest.raises(ExpertParallelError, match="need whole weights"):
        expert_parallel.divide(model, ExpertGroups(size=2))


# ---- long tier -------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_gradients_with_divided_experts_equal_one_process_for_every_pair_of_modalities(tmp_path):
    launch(divided.matrix, tmp_path, limit_s=3000)
    for left in scenarios.PIECES:
        for right in scenarios.PIECES:
            _, state = plain(scenarios.pairs_steps([(left, right)], None))
            for name in ENGINES:
                gradients_equal(load_file(tmp_path / f"{name}.{left}.{right}.moments.safetensors"), state)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_four_ranks_in_two_groups_equal_one_process(tmp_path):
    result = launch(divided.four, tmp_path, ranks=4, limit_s=1500)
    losses, state = plain(divided.pairs_of_four(None), clip=0.5)
    for name in ENGINES:
        assert result[name] == pytest.approx(losses, rel=1e-5), name
        close(saved(tmp_path, name), state, 2e-3)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_offload_muon_compile_and_bf16_meet_divided_experts(tmp_path):
    result = launch(divided.variants, tmp_path, limit_s=1500)
    losses, state = plain(scenarios.pairs_steps(scenarios.PAIRS, None))
    for name in ("offload2", "offload3", "compile_local", "compile_z1"):
        assert result[name] == pytest.approx(losses, rel=2e-5), name
        close(saved(tmp_path, name), state, 2e-3)
    assert result["bf16"] == pytest.approx(losses, rel=2e-2)
    engine = LocalEngine(
        routed_model(), EngineConfig(), scenarios.replace(scenarios.optimizer(), kind="muon"), scenarios.LOSS, World()
    )
    muon = scenarios.take(engine, scenarios.pairs_steps(scenarios.PAIRS, None))
    for name in ("muon_local", "muon_z0"):
        assert result[name] == pytest.approx(muon, rel=1e-3), name
        assert saved(tmp_path, name).keys() == {**engine.weights(), **engine.moments()}.keys()
