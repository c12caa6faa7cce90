"""Laws of the whole model: packing, causality, lifetimes, gradients, types."""

import pytest
import streams
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from weft.kernels.layout import StreamLayout
from weft.model.embedding import FeatureError
from weft.model.transformer import Transformer


def build(**changes: object) -> Transformer:
    torch.manual_seed(0)
    return Transformer(streams.small_config(**changes))


@settings(max_examples=12, deadline=None)
@given(st.lists(st.integers(1, 43), min_size=1, max_size=5), st.integers(0, 10**6))
def test_packed_documents_equal_each_document_alone(lengths: list[int], seed: int) -> None:
    model = build(max_landmarks=4)
    documents = [streams.document(n, seed + i) for i, n in enumerate(lengths)]
    with torch.no_grad():
        packed = model(streams.join(documents)).hidden
        alone = torch.cat([model(streams.join([d])).hidden for d in documents])
    assert (packed - alone).abs().max() < 1e-5


def test_a_changed_token_moves_only_later_tokens_of_its_document() -> None:
    model = build()
    documents = [streams.document(n, n, two_way=False) for n in (23, 29)]
    batch = streams.join(documents)
    with torch.no_grad():
        before = model(batch).hidden
        for at in range(23):
            kept = batch.ids[at].clone()
            batch.ids[at] = (kept + 1) % 31
            moved = (model(batch).hidden - before).abs().amax(1) > 1e-6
            batch.ids[at] = kept
            assert moved[at] and not moved[:at].any() and not moved[23:].any()


def test_one_layer_carries_a_token_exactly_through_its_lifetime() -> None:
    model = build(layers=1, full_every=0, window=5)
    document = streams.document(31, 3)
    layout = StreamLayout.build(document.document, document.landmark, document.two_way, 5)
    batch = streams.join([document])
    query = torch.arange(31)
    with torch.no_grad():
        before = model(batch).hidden
        for at in range(31):
            kept = batch.ids[at].clone()
            batch.ids[at] = (kept + 1) % 31
            moved = (model(batch).hidden - before).abs().amax(1) > 0
            batch.ids[at] = kept
            assert torch.equal(moved, (layout.born[at] <= query) & (query < layout.dies[at]))


def test_later_full_layers_see_past_the_window() -> None:
    model = build(layers=4, full_every=4, window=3)
    document = streams.document(41, 5, two_way=False)
    document.landmark[:] = False
    batch = streams.join([document])
    with torch.no_grad():
        before = model(batch).hidden
        batch.ids[1] = (batch.ids[1] + 1) % 31
        assert ((model(batch).hidden - before).abs().amax(1) > 0)[40]


@pytest.mark.parametrize("modality", [0, 1, None], ids=["text only", "image only", "mixed"])
def test_every_parameter_has_a_gradient_whatever_the_batch_holds(modality: int | None) -> None:
    model = build(experts=29, experts_per_token=1, feature_hidden=7, resample={"audio": {"tokens": 1, "latents": 1}})
    model.routers()[0].bias[3] = -10.0  # an expert that gets no token
    output = model(streams.join([streams.document(19, 3, modality), streams.document(11, 4, modality)]))
    loss = output.hidden.sum() + output.router.z_loss + model.embed(output.hidden[:0]).sum() + model.embed_head.scale
    (loss + sum(model.logits(output.hidden[:0], i).sum() for i in range(5))).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []
    assert all(bool(torch.isfinite(p.grad).all()) for p in model.parameters() if p.grad is not None)
    assert not model.routers()[0].experts.gate_up_proj.grad[3].any()


def test_gradients_equal_finite_differences_in_float64() -> None:
    model = build(layers=2, experts_per_token=5).double()
    batch = streams.to_double(streams.join([streams.document(17, 3)]))
    direction = torch.randn(17, 40, dtype=torch.float64)

    def loss() -> torch.Tensor:
        output = model(batch)
        return (output.hidden * direction).sum() + output.router.z_loss

    loss().backward()
    for name, param in model.named_parameters():
        if param.grad is None or not param.grad.any():
            continue
        step = torch.randn_like(param)
        with torch.no_grad():
            param += 1e-6 * step
            high = loss()
            param -= 2e-6 * step
            low = loss()
            param += 1e-6 * step
        assert torch.isclose((high - low) / 2e-6, (param.grad * step).sum(), rtol=1e-5, atol=1e-6), name


def test_recomputed_blocks_give_the_same_loss_and_gradients() -> None:
    grads = []
    for recompute in (False, True):
        model = build()
        output = model(streams.join([streams.document(30, 1)]), recompute=recompute)
        (output.hidden.square().sum() + output.router.z_loss).backward()
        grads.append([p.grad for p in model.parameters() if p.grad is not None])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_every_float_type_runs(dtype: torch.dtype) -> None:
    model = build().to(dtype)
    batch = streams.join([streams.document(30, 1)])
    output = model(batch)
    assert output.hidden.dtype == dtype and bool(torch.isfinite(output.hidden).all())
    output.hidden.sum().backward()
    assert all(moe.bias.dtype == torch.float32 for moe in model.routers())


def test_bfloat16_autocast_stays_near_float32() -> None:
    model = build()
    batch = streams.join([streams.document(50, 1)])
    exact = model(batch).hidden
    with torch.autocast("cpu", torch.bfloat16):
        rough = model(batch)
    rough.hidden.float().sum().backward()
    assert ((rough.hidden.float() - exact).abs().mean() / exact.abs().mean()) < 0.1
    assert rough.router.z_loss.dtype == torch.float32


def test_monitors_bound_the_logits_and_carry_no_gradient() -> None:
    model = build()
    output = model(streams.join([streams.document(30, 1)]))
    assert output.monitors["logit_bound"].shape == (4,) and not output.monitors["residual_rms"].requires_grad
    q, k, _ = model.layers[0].attention.project(torch.randn(9, 40), model.rotary(torch.randint(50, (9, 3))))
    logits = torch.einsum("thk,sgk->hgts", q, k) / 10**0.5
    assert logits.abs().max() <= output.monitors["logit_bound"][0] * (1 + 1e-5)


def test_features_that_do_not_fit_are_refused_by_name() -> None:
    model = build()
    batch = streams.join([streams.document(30, 1)])
    batch.features["image"] = torch.zeros(len(batch.features["image"]), 14)
    with pytest.raises(FeatureError, match="image features need shape"):
        model(batch)
    batch = streams.join([streams.document(30, 1)])
    batch.features["lidar"] = torch.zeros(2, 3)
    with pytest.raises(FeatureError, match="lidar"):
        model(batch)


def test_a_channel_beyond_the_table_is_refused_and_never_another_modalitys_row() -> None:
    model = build()
    batch = streams.join([streams.document(30, 1)])
    batch.channel[11] = 7
    with pytest.raises(FeatureError, match=r"channel 7, the model's num_channels is 7; raise it"):
        model(batch)
