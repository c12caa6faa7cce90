"""Embedding, resampler, heads, initialisation, compilation, and a model that learns."""

import math
import time

import pytest
import streams
import torch
from streams import FEATURES

from weft.kernels.elementwise import swiglu
from weft.kernels.sliced_loss import sliced_cross_entropy
from weft.model.config import ConfigError, Resample
from weft.model.init import kind_of, param_groups
from weft.model.presets import scaled
from weft.model.resampler import Resampler
from weft.model.rows import block_rows, by_rows, stable_linear, stable_sigmoid
from weft.model.transformer import Transformer


def build(**changes: object) -> Transformer:
    torch.manual_seed(0)
    return Transformer(streams.small_config(**changes))


@pytest.mark.parametrize("hidden", [None, 7])
def test_an_input_is_the_sum_of_its_embeddings(hidden: int | None) -> None:
    model = build(feature_hidden=hidden)
    batch = streams.join([streams.document(60, 2)])
    e = model.embedding
    x = e.tokens.weight[batch.ids] + e.modality.weight[batch.modality] + e.channel.weight[batch.channel]
    for name, encoder in e.features.items():
        for row, at in zip(batch.features[name], batch.feature_at[name]):
            x[at] = x[at] + encoder.proj(row)
    torch.testing.assert_close(e(batch), x)


def test_resampler_makes_latents_and_runs_on_nothing() -> None:
    model = build(feature_sizes=FEATURES | {"audio": 22}, resample={"audio": {"tokens": 6, "latents": 3, "depth": 2}})
    batch = streams.join([streams.document(60, 2)])
    batch.features["audio"] = torch.rand(6, 22)
    batch.feature_at["audio"] = torch.arange(6)
    model(batch).hidden.sum().backward()
    assert model.embedding.features["audio"].resampler.latents.grad.any()
    resampler = Resampler(22, 11, Resample(6, 3))
    assert resampler(torch.randn(7, 6, 22)).shape == (7, 3, 22)
    resampler(torch.zeros(0, 6, 22)).sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in resampler.parameters())


def test_resampler_treats_each_medium_alone() -> None:
    resampler = Resampler(22, 11, Resample(6, 3))
    x = torch.randn(4, 6, 22)
    torch.testing.assert_close(resampler(x)[2:3], resampler(x[2:3]))


def test_resampler_does_not_look_at_absent_rows() -> None:
    resampler = Resampler(22, 11, Resample(6, 3))
    x = torch.randn(2, 6, 22)
    absent = torch.arange(6) >= torch.tensor([4, 6])[:, None]
    other = torch.where(absent[..., None], 9.0, x)
    torch.testing.assert_close(resampler(x, absent), resampler(other, absent))
    assert not torch.allclose(resampler(x)[0], resampler(x, absent)[0])
    torch.testing.assert_close(resampler(x)[1], resampler(x, absent)[1])


def test_logits_of_a_slice_are_columns_of_the_whole() -> None:
    for tied in (False, True):
        model = build(tied=tied)
        hidden = torch.randn(7, 40)
        for i, (first, end) in enumerate(streams.SLICES):
            torch.testing.assert_close(model.logits(hidden, i), (hidden @ model.output_weight.T)[:, first:end])
    with pytest.raises(ConfigError, match="slice 5"):
        model.logits(hidden, 5)


def test_embeddings_have_length_one_and_the_temperature_is_bounded() -> None:
    model = build()
    torch.testing.assert_close(model.embed(torch.randn(7, 40)).norm(dim=1), torch.ones(7))
    assert model.embed(torch.zeros(0, 40)).shape == (0, 17)
    assert math.isclose(float(model.embed_head.scale.detach()), 1 / 0.07, rel_tol=1e-5)
    with torch.no_grad():
        model.embed_head.log_scale.fill_(50.0)
    assert float(model.embed_head.scale.detach()) == 100.0


def test_every_parameter_is_in_one_group_with_the_rate_of_its_kind() -> None:
    model = Transformer(scaled(streams.small_config(), 4))
    groups = {g["name"]: g for g in param_groups(model, 1e-2, 0.1)}
    assert sum(len(g["params"]) for g in groups.values()) == len(list(model.parameters()))
    assert groups["hidden"]["lr"] == groups["output"]["lr"] == 1e-2 / 4 and groups["input"]["lr"] == 1e-2
    assert groups["hidden"]["lr"] * groups["hidden"]["weight_decay"] == pytest.approx(1e-3)
    kinds = {name: kind_of(name, p) for name, p in model.named_parameters()}
    assert kinds["blocks.1.mlp.gate.weight"] == kinds["output.weight"] == "output"
    assert kinds["blocks.1.mlp.experts.down_proj"] == kinds["blocks.0.attention.qkv.weight"] == "hidden"
    assert kinds["embedding.features.image.proj.weight"] == kinds["embedding.tokens.weight"] == "input"
    assert kinds["blocks.0.attention.q_norm"] == kinds["embed_head.log_scale"] == "vector"


def test_one_step_moves_the_logits_alike_at_every_width() -> None:
    """The coordinate check of muP: after Adam steps at one rate, logits have moved about as far at 1x and at 8x the width."""
    moved = []
    for factor in (1, 8):
        torch.manual_seed(0)
        model = Transformer(scaled(streams.small_config(layers=2), factor))
        batch = streams.join([streams.document(50, 1)])
        optimizer = torch.optim.Adam(param_groups(model, 3e-3, 0.0))
        with torch.no_grad():
            before = model.logits(model(batch).hidden, 0)
        for _ in range(3):
            loss = torch.nn.functional.cross_entropy(model.logits(model(batch).hidden, 0), batch.ids % 31)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        with torch.no_grad():
            moved.append(float((model.logits(model(batch).hidden, 0) - before).square().mean().sqrt()))
    assert 0.5 < moved[1] / moved[0] < 2.0


@pytest.mark.parametrize("threads", [1, 2])
def test_rows_have_the_same_bits_in_any_company(threads: int) -> None:
    x, weight = torch.randn(4096, 40), torch.randn(57, 40)
    torch.set_num_threads(threads)
    try:
        block = block_rows(x)
        with torch.no_grad():
            wide, whole, score = by_rows(swiglu, x), stable_linear(x[:96], weight), stable_sigmoid(x[:, :5])
            assert torch.equal(wide[block : 2 * block], by_rows(swiglu, x[block : 2 * block]))
            for rows in range(1, 30):
                assert torch.equal(stable_linear(x[3 : 3 + rows], weight), whole[3 : 3 + rows])
                assert torch.equal(stable_sigmoid(x[3 : 3 + rows, :5]), score[3 : 3 + rows])
    finally:
        torch.set_num_threads(1)


@pytest.mark.filterwarnings("ignore:The .grad attribute")
def test_a_dense_block_compiles_in_one_piece() -> None:
    """Attention is one operator to the compiler, so another packing of documents is no reason to break or to compile again."""
    model = build(layers=1)
    block = model.layers[0]
    whole = torch.compile(block, backend="aot_eager", fullgraph=True, dynamic=True)
    for lengths in ((40, 31), (20, 9, 28)):
        batch = streams.join([streams.document(length, i) for i, length in enumerate(lengths)])
        rotary, (layout, _) = model.rotary(batch.position), model.layouts(batch)
        x = torch.randn(len(batch.ids), 40)
        results = []
        for function in (block, whole):
            model.zero_grad()
            out, _ = function(x, rotary, layout)
            out.square().mean().backward()
            results.append([out.detach(), *(p.grad.clone() for p in block.parameters() if p.grad is not None)])
        for ours, compiled in zip(*results, strict=True):
            torch.testing.assert_close(compiled, ours)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute")
def test_a_compiled_block_gives_equal_results() -> None:
    model = build(layers=2)
    batch = streams.join([streams.document(70, i) for i in range(3)])
    rotary, (layout, _) = model.rotary(batch.position), model.layouts(batch)
    x = torch.randn(210, 40)
    results = []
    for block in (model.layers[1], torch.compile(model.layers[1])):
        model.zero_grad()
        out, _ = block(x, rotary, layout)
        out.square().sum().backward()
        results.append([out.detach(), *(p.grad.clone() for p in model.layers[1].parameters() if p.grad is not None)])
    for ours, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, ours, rtol=1e-4, atol=1e-4)


def test_compiling_the_whole_model_is_refused_with_a_reason() -> None:
    with pytest.raises(NotImplementedError, match="layouts and expert counts"):
        build(layers=1).compile()


def test_a_tiny_model_overfits_a_batch_of_all_six_modalities() -> None:
    model = build(width=64, base_width=64, layers=3, heads=4, head_width=16, expert_width=64, shared_width=64, dense_width=128)
    documents = [streams.document(40, 100 + m, modality=m) for m in range(6)] + [streams.document(80, 7)]
    batch = streams.join(documents)
    batch.position[:, 0] = torch.arange(len(batch.ids))  # every place is its own: the batch can be learnt by heart
    last = torch.cat([batch.document[1:] != batch.document[:-1], torch.tensor([True])])
    target, kind = batch.ids.roll(-1)[~last], torch.tensor(streams.SLICE_OF)[batch.modality.roll(-1)[~last]]
    optimizer = torch.optim.AdamW(param_groups(model, 1e-2, 0.0), fused=True)
    start = time.monotonic()
    for _ in range(300):
        output = model(batch)
        hidden = output.hidden[~last]
        nll, _ = sliced_cross_entropy(hidden, model.output_weight, target, kind, model.config.slices)
        if nll.mean() < 0.05:
            break
        optimizer.zero_grad()
        (nll.mean() + 1e-3 * output.router.z_loss).backward()
        optimizer.step()
        model.update_router_bias(output.router.load)
    worst = max(float(nll.detach()[kind == i].mean()) for i in range(5))
    assert nll.mean() < 0.05 and worst < 0.2, (float(nll.detach().mean()), worst)
    assert time.monotonic() - start < 60
