"""Laws of routed experts: dense equivalence, permutation, idle experts, balance."""

import pytest
import torch
import torch.nn.functional as F

from weft.kernels.elementwise import swiglu
from weft.model.moe import MoE
from weft.model.router import RouterMeter, route, shift_bias


def build(experts: int, chosen: int) -> MoE:
    moe = MoE(11, experts, chosen, 7)
    for param in moe.parameters():
        torch.nn.init.normal_(param, std=0.5)
    return moe


@pytest.mark.parametrize(("experts", "chosen"), [(1, 1), (5, 1), (5, 3), (5, 5)])
def test_equal_experts_are_one_dense_layer(experts: int, chosen: int) -> None:
    moe = build(experts, chosen)
    with torch.no_grad():
        for weight in moe.experts.parameters():
            weight[:] = weight[0].clone()
    x = torch.randn(23, 11)
    dense = F.linear(swiglu(F.linear(x, moe.experts.gate_up_proj[0])), moe.experts.down_proj[0])
    torch.testing.assert_close(moe(x)[0], dense, rtol=1e-5, atol=1e-5)


def test_a_permutation_of_experts_changes_nothing() -> None:
    moe, other = build(5, 2), build(5, 2)
    order = torch.tensor([3, 0, 4, 1, 2])
    moe.bias.normal_(std=0.1)
    with torch.no_grad():
        for mine, theirs in zip(other.parameters(), moe.parameters(), strict=True):
            mine.copy_(theirs[order])
        other.bias.copy_(moe.bias[order])
    x = torch.randn(29, 11)
    torch.testing.assert_close(moe(x)[0], other(x)[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("chosen", [1, 2])
def test_sorted_experts_equal_a_loop_over_tokens_with_gradients(chosen: int) -> None:
    moe = build(5, chosen).double()
    x = torch.randn(13, 11, dtype=torch.float64, requires_grad=True)
    out, routing = moe(x)
    rows = []
    for t in range(13):
        parts = []
        for s in range(chosen):
            e = int(routing.expert[t, s])
            hidden = swiglu(F.linear(x[t], moe.experts.gate_up_proj[e]))
            parts.append(routing.weight[t, s] * F.linear(hidden, moe.experts.down_proj[e]))
        rows.append(torch.stack(parts).sum(0))
    plain = torch.stack(rows)
    torch.testing.assert_close(out, plain)
    seed = torch.randn_like(out)
    wanted = [x, *moe.parameters()]
    ours = torch.autograd.grad(out, wanted, seed, retain_graph=True)
    theirs = torch.autograd.grad(plain, wanted, seed)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


def test_serving_path_equals_training_path() -> None:
    moe = build(5, 2)
    x = torch.randn(32, 11)
    x[29:] = 0
    with torch.no_grad():
        start = torch.randn(32, 11)
        added = moe.infer(x, 29, start.clone()) - start
        torch.testing.assert_close(added[:29], moe(x[:29])[0], rtol=1e-5, atol=1e-6)
        assert not added[29:].any()
        alone = moe.infer(x[8:24], 1, start[8:24].clone())[0]
        assert torch.equal(alone, moe.infer(x, 29, start.clone())[8])
        chosen = moe.route(x[:29]).expert.flatten()
        (few, at), (grouped, place) = moe._by_expert(x, chosen.tolist()), moe._grouped(x, chosen)
        torch.testing.assert_close(few[at], grouped[place], rtol=1e-5, atol=1e-6)


def test_weights_of_a_token_sum_to_one_and_ignore_the_bias() -> None:
    moe = build(5, 2)
    x = torch.randn(17, 11)
    moe.bias[4] = 10.0
    routing = moe.route(x)
    assert (routing.expert == 4).any(1).all()
    torch.testing.assert_close(routing.weight.sum(1), torch.ones(17))
    scores = torch.sigmoid(routing.logits).gather(1, routing.expert)
    torch.testing.assert_close(routing.weight, scores / scores.sum(1, keepdim=True))


@pytest.mark.parametrize(("experts", "chosen"), [(1, 1), (4, 1), (4, 2)])
def test_scores_that_underflow_leave_finite_weights_and_gradients(experts: int, chosen: int) -> None:
    logits = torch.full((3, experts), -200.0, requires_grad=True)
    routing = route(logits, torch.zeros(experts), chosen)
    torch.testing.assert_close(routing.weight, torch.full((3, chosen), 1 / chosen))
    routing.weight.square().sum().backward()
    assert logits.grad is not None and logits.grad.isfinite().all()


@pytest.mark.parametrize("chosen", [1, 2])
def test_the_loss_teaches_the_router(chosen: int) -> None:
    moe = build(4, chosen)
    moe(torch.randn(16, 11))[0].square().sum().backward()
    assert moe.gate.weight.grad is not None and (moe.gate.weight.grad.norm(dim=1) > 0).all()


def test_bias_steps_even_out_the_load() -> None:
    moe = build(4, 1)
    x = torch.randn(512, 11)

    def spread() -> int:
        load = torch.bincount(moe.route(x).expert.flatten(), minlength=4)
        return int(load.max() - load.min())

    before = spread()
    for _ in range(400):
        shift_bias(moe.bias, torch.bincount(moe.route(x).expert.flatten(), minlength=4))
    assert spread() < before / 4


def test_load_is_counted_by_modality_without_padding() -> None:
    moe = build(5, 2)
    modality = torch.tensor([0, 0, 1, 2, 2, 0])
    meter = RouterMeter(modality, torch.tensor([False] * 5 + [True]), 3, 5)
    routing = moe.route(torch.randn(6, 11))
    meter.add(routing)
    stats = meter.stats()
    assert stats.load.shape == (1, 3, 5)
    assert stats.load.sum(2).tolist() == [[4, 2, 4]]
    assert stats.load[0, 1].tolist() == torch.bincount(routing.expert[2], minlength=5).tolist()
    torch.testing.assert_close(stats.z_loss, torch.logsumexp(routing.logits[:5], 1).square().mean())
