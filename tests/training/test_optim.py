"""Optimizer and schedule against their references."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from tests.training.synthetic import small_model
from weft.training.distributed import World
from weft.training.ema import Ema
from weft.training.optim import Muon, OptimizerConfig, build_optimizers, divide, orthogonalise
from weft.training.schedule import ScheduleConfig, factor


@pytest.mark.parametrize("shape", [(5, 11), (11, 5), (7, 7)])
def test_muon_equals_torch_muon_on_a_matrix(shape):
    ours, theirs = (torch.nn.Parameter(torch.linspace(-1, 1, math.prod(shape)).view(shape).clone()) for _ in range(2))
    one = Muon([ours], lr=0.02, weight_decay=0.1, momentum=0.9)
    two = torch.optim.Muon([theirs], lr=0.02, weight_decay=0.1, momentum=0.9, adjust_lr_fn="match_rms_adamw")
    for step in range(4):
        grad = torch.randn(shape, generator=torch.Generator().manual_seed(step))
        ours.grad, theirs.grad = grad.clone(), grad.clone()
        one.step()
        two.step()
    assert torch.allclose(ours, theirs, atol=2e-3)  # bfloat16 inside both, in another order of additions


def test_a_stack_of_experts_is_each_expert_alone():
    stack = torch.randn(3, 5, 9)
    together = orthogonalise(stack)
    for e in range(3):
        assert torch.allclose(together[e].float(), orthogonalise(stack[e]).float(), atol=2e-2)
    spectrum = torch.linalg.svdvals(together.float())
    assert float(spectrum.min()) > 0.4
    assert float(spectrum.max()) < 1.6


def test_ranks_divide_all_the_work():
    assert divide([5, 9, 1, 4], 2) == [1, 0, 0, 1]
    assert divide([3, 3, 3], 1) == [0, 0, 0]
    assert sorted(set(divide([1, 1], 4))) == [0, 1]


def stepped(ranks: World) -> list[torch.Tensor]:
    """Weights of four shapes after three steps of Muon with the same gradients on every rank."""
    seeds = torch.Generator().manual_seed(3)
    shapes = [(6, 10), (3, 8, 4), (9, 9), (5, 2)]
    params = [torch.nn.Parameter(torch.randn(shape, generator=seeds)) for shape in shapes]
    muon = Muon(params, lr=0.1, ranks=ranks)
    for _ in range(3):
        for p in params:
            p.grad = torch.randn(p.shape, generator=seeds)
        muon.step()
    return [p.detach() for p in params]


def one_rank(rank: int, address: str, folder: str) -> None:
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=3)
    torch.save(stepped(World(rank, 3)), f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def test_divided_steps_are_the_same_bits_on_every_rank(tmp_path):
    torch.multiprocessing.spawn(one_rank, (f"file://{tmp_path}/store", str(tmp_path)), nprocs=3)
    want = stepped(World())
    for rank in range(3):
        for ours, alone in zip(torch.load(tmp_path / f"{rank}.pt"), want, strict=True):
            assert torch.equal(ours, alone)


def test_muon_refuses_a_vector():
    with pytest.raises(ValueError, match="give it to AdamW"):
        Muon([torch.nn.Parameter(torch.zeros(3))], lr=0.1)


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_every_parameter_is_in_one_group(kind):
    model = small_model()
    made = build_optimizers(model, OptimizerConfig(kind=kind))
    seen = [id(p) for group in made.param_groups for p in group["params"]]
    assert sorted(seen) == sorted(id(p) for p in model.parameters())
    experts = {id(p) for n, p in model.named_parameters() if ".experts." in n}
    if kind == "muon":
        assert experts <= {id(p) for group in made.parts[1].param_groups for p in group["params"]}
        assert id(model.output_weight) in {id(p) for group in made.parts[0].param_groups for p in group["params"]}


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_saved_state_continues_bit_for_bit(kind):
    def begin():
        model = small_model()
        return model, build_optimizers(model, OptimizerConfig(kind=kind, lr=0.01))

    def push(model, made, seed):
        generator = torch.Generator().manual_seed(seed)
        for p in model.parameters():
            p.grad = torch.randn(p.shape, generator=generator)
        made.set_factor(1.0)
        made.step()

    model, made = begin()
    push(model, made, 1)
    weights = {k: v.clone() for k, v in model.state_dict().items()}
    state = {k: v.clone() for k, v in made.state_tensors().items()}
    push(model, made, 2)
    other, again = begin()
    other.load_state_dict(weights)
    again.load_state_tensors(state)
    push(other, again, 2)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters()))


def test_all_frozen_is_refused():
    model = small_model()
    for p in model.parameters():
        p.requires_grad_(False)
    with pytest.raises(ValueError, match="every parameter is frozen"):
        build_optimizers(model, OptimizerConfig())


@given(st.sampled_from(["cosine", "wsd", "constant"]), st.integers(1, 3000), st.integers(0, 400))
def test_schedule_rises_then_never_rises_again(kind, total, warmup):
    config = ScheduleConfig(kind=kind, warmup_steps=warmup)
    values = [factor(config, i, total) for i in range(total)]
    assert all(0 < v <= 1 for v in values)
    top = values.index(max(values))
    assert top <= max(1, total // 10) + 1
    assert all(a <= b for a, b in pairwise(values[: top + 1]))
    assert all(a >= b - 1e-12 for a, b in pairwise(values[top:]))
    if kind != "constant" and total > 20:
        assert values[-1] == pytest.approx(config.floor, abs=1e-9)


def test_unknown_length_warms_up_and_stays():
    config = ScheduleConfig(warmup_steps=4)
    assert [factor(config, i, None) for i in (0, 3, 4, 99)] == [0.2, 0.8, 1.0, 1.0]


def test_ema_follows_a_constant_exactly_and_starts_fast():
    ema = Ema({"w": torch.zeros(3)}, 0.999)
    for _ in range(400):
        ema.update({"w": torch.ones(3)})
    assert float(ema.average["w"].min()) > 0.99
    with pytest.raises(ValueError, match="ema must lie"):
        Ema({}, 1.0)
