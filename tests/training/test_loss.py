"""The loss of a step does not depend on how the step is cut, and every weight means what the plan says."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.training.synthetic import FEATURES, mixed_streams, small_model, stream
from weft.tokenizers.pack import collate
from weft.tokenizers.vocabulary import MODALITIES
from weft.training.distributed import World
from weft.training.engine import EngineConfig, LocalEngine
from weft.training.loss import LossConfig, Objective, count, info_nce, totals
from weft.training.optim import OptimizerConfig


def engine(loss: LossConfig | None = None, **more) -> LocalEngine:
    return LocalEngine(small_model(), EngineConfig(**more), OptimizerConfig(), loss or LossConfig(), World())


def gradients(made: LocalEngine, batches) -> tuple[float, dict[str, torch.Tensor]]:
    swap = made.exchange(list(batches), [])
    outcome = made.forward_backward(batches, swap.whole)
    return outcome.metrics["loss"], {n: p.grad.clone() for n, p in made.model.named_parameters()}


@settings(max_examples=8, deadline=None)
@given(st.integers(0, 50), st.integers(1, 4))
def test_accumulation_equals_one_batch(seed, parts):
    streams = mixed_streams(6, seed)
    whole = gradients(engine(), [collate([streams], 192, FEATURES)])
    cut = gradients(engine(), [collate([streams[i::parts]], 192, FEATURES) for i in range(parts)])
    assert cut[0] == pytest.approx(whole[0], rel=1e-6)
    for name, grad in whole[1].items():
        assert float((cut[1][name] - grad).abs().max()) <= 2e-5 * float(grad.abs().max()) + 1e-9, name


def test_dividing_each_micro_batch_by_its_own_count_would_be_wrong():
    streams = [stream([("text", True)], 1, size=3), stream([("text", True)], 2, size=17)]
    batches = [collate([[s]], 32, FEATURES) for s in streams]
    right, _ = gradients(engine(), batches)
    alone = [gradients(engine(), [b])[0] for b in batches]
    assert abs(sum(alone) / 2 - right) > 1e-3


def test_every_parameter_gets_a_gradient_even_from_padding_alone():
    made = engine(LossConfig(contrastive=0.5))
    for pieces in ([], [stream([("action", True)], 3)]):
        loss, grads = gradients(made, [collate([pieces], 32, FEATURES)])
        made.skip()
        assert torch.isfinite(torch.tensor(loss))
        assert all(torch.isfinite(g).all() for g in grads.values())
        assert set(grads) == {n for n, _ in made.model.named_parameters()}
        if not pieces:
            assert loss == 0.0
            assert all(not g.any() for g in grads.values())


def test_loss_is_the_sum_of_modality_means_against_plain_cross_entropy():
    model = small_model()
    streams = mixed_streams(6)
    batch = collate([streams], 192, FEATURES)
    config = LossConfig(z_loss=0.0, router_z_loss=0.0, modality_weight={"image": 0.25})
    whole = totals(count(batch)[None, None])[0]
    loss, *_ = Objective(model, config)(batch, whole)
    hidden = model(batch).hidden
    expected = 0.0
    for m, name in enumerate(MODALITIES):
        at = torch.nonzero((batch.weight > 0) & (batch.target_modality == m)).flatten()
        values = []
        for i in at.tolist():
            k = int(batch.target_slice[i])
            logits = model.logits(hidden[i : i + 1], k)
            values.append(F.cross_entropy(logits, batch.target[i : i + 1] - model.config.slices[k][0]))
        if values:
            expected += (0.25 if name == "image" else 1.0) * torch.stack(values).mean().item()
    assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_a_plan_weight_scales_the_loss_of_its_modality():
    """JAT's 0.005 on observations must not cancel in the normalisation."""
    batch = collate([[stream([("image", True)], 1)]], 32, FEATURES)
    faint = replace(batch, weight=batch.weight * 0.005)
    config = LossConfig(z_loss=0.0, router_z_loss=0.0)
    assert gradients(engine(config), [faint])[0] == pytest.approx(0.005 * gradients(engine(config), [batch])[0], rel=1e-5)


def test_mean_over_tokens_weighs_modalities_by_their_tokens():
    streams = [stream([("text", True)], 1, size=20), stream([("action", True)], 2, size=3)]
    batch = collate([streams], 64, FEATURES)
    made = engine(LossConfig(mean_over="tokens", z_loss=0.0, router_z_loss=0.0))
    outcome = made.forward_backward([batch], made.exchange([batch], []).whole)
    n = count(batch)[: len(MODALITIES)]
    parts = [outcome.metrics.get(f"loss/{m}", 0.0) * float(k) for m, k in zip(MODALITIES, n)]
    assert outcome.metrics["loss"] == pytest.approx(sum(parts) / float(n.sum()), rel=1e-6)


def test_info_nce_is_plain_cross_entropy_for_one_positive_each():
    x = F.normalize(torch.randn(6, 5), dim=-1)
    pair = torch.tensor([7, 8, 9, 7, 8, 9])
    logits = (x @ x.T * 3.0).masked_fill(torch.eye(6, dtype=torch.bool), float("-inf"))
    expected = F.cross_entropy(logits, torch.tensor([3, 4, 5, 0, 1, 2]), reduction="sum")
    assert float(info_nce(x, pair, torch.tensor(3.0))) == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize("n", [0, 1, 3])
def test_info_nce_without_positives_is_a_connected_zero(n):
    x = torch.randn(n, 5, requires_grad=True)
    scale = torch.tensor(2.0, requires_grad=True)
    loss = info_nce(x, torch.arange(n), scale)
    loss.backward()
    assert loss.item() == 0.0
    assert x.grad is not None and not x.grad.any()
    assert scale.grad is not None and float(scale.grad) == 0.0


def test_recompute_and_bf16_agree_with_the_plain_step():
    batch = collate([mixed_streams(6)], 192, FEATURES)
    plain = gradients(engine(), [batch])
    again = gradients(engine(recompute=True), [batch])
    assert again[0] == plain[0]
    assert all(torch.equal(plain[1][n], again[1][n]) for n in plain[1])
    rough = gradients(engine(precision="bf16"), [batch])
    assert rough[0] == pytest.approx(plain[0], rel=2e-2)


def test_clip_covers_all_parameters_and_experts():
    made = engine()
    made.clip = 0.01
    batch = collate([mixed_streams(6)], 192, FEATURES)
    outcome = made.forward_backward([batch], made.exchange([batch], []).whole)
    by_hand = torch.stack([p.grad.double().square().sum() for p in made.model.parameters()]).sum().sqrt()
    assert outcome.grad_norm == pytest.approx(float(by_hand), rel=1e-5)
    torch.nn.utils.clip_grads_with_norm_(made.trainable, made.clip, made._norm)
    clipped = torch.stack([p.grad.double().square().sum() for p in made.model.parameters()]).sum().sqrt()
    assert float(clipped) == pytest.approx(0.01, rel=1e-3)
    experts = [p for n, p in made.model.named_parameters() if ".experts." in n]
    assert experts and all(any(p is t for t in made.trainable) for p in experts)
