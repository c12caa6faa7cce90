"""Smaller weights: a part of the memory, nearly the same answers, the same laws."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.inference.conftest import make_model, mixed_prompts
from weft.inference.errors import CheckpointError
from weft.inference.generalist import Generalist
from weft.inference.load import load, save
from weft.inference.quantize import KINDS, StackedExperts, quantize_weights, stored_bytes
from weft.model.moe import Experts, MoE
from weft.tokenizers.bundle import StreamTokenizer

pytest.importorskip("torchao", reason="needs the extra `quantize`")
MOST_ERROR = {"int8": 0.15, "int4": 1.5}
"""Mean change of a text's log-probability per token, nats, for weights of three times the usual size."""
WIDE = {"width": 96, "heads": 4, "kv_heads": 2, "head_width": 24, "expert_width": 64, "shared_width": 64, "dense_width": 128}


@pytest.fixture(scope="module")
def wide(tokenizer: StreamTokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with matrices large enough to be quantized, experts included."""
    return save(make_model(tokenizer, **WIDE), tokenizer, tmp_path_factory.mktemp("wide"))


def test_int8_rounding_error_is_at_most_half_a_step() -> None:
    layer = torch.nn.Sequential(torch.nn.Linear(64, 96, bias=False))
    weight = layer[0].weight.detach().clone()
    assert quantize_weights(layer, "int8") == ["0"]
    back = layer[0].weight.dequantize()
    assert ((back - weight).abs() <= weight.abs().amax(-1, keepdim=True) / 254 + 1e-7).all()


def test_experts_taken_apart_compute_the_same() -> None:
    mlp = MoE(24, 5, 2, 20).eval()
    for parameter in mlp.parameters():
        torch.nn.init.normal_(parameter)
    x, counts = torch.randn(11, 24), torch.tensor([3, 0, 4, 4, 0])
    assert isinstance(mlp.experts, Experts)
    apart = StackedExperts(mlp.experts)
    assert (apart(x, counts) - mlp.experts(x, counts)).abs().max() < 1e-3 * mlp.experts(x, counts).abs().max()
    assert torch.equal(apart.gate_up_proj[3], mlp.experts.gate_up_proj[3])
    with torch.inference_mode():
        truth, _ = mlp(x)
        mlp.experts = apart  # type: ignore[assignment]
        assert (mlp(x)[0] - truth).abs().max() < 1e-4 * truth.abs().max()


def answers(model: Generalist) -> np.ndarray:
    return np.array([s.mean for s in model.score(mixed_prompts(12, 3), ["the fox jumps"] * 12)])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", KINDS)
def test_quantized_model_is_smaller_and_close(wide: Path, kind: str, dtype: str) -> None:
    plain, small = (load(wide, device="cpu", dtype=dtype, quantize=q) for q in (None, kind))
    done = {
        name
        for name, module in small.model.named_modules()
        if isinstance(module, torch.nn.Linear) and type(module.weight.data) is not torch.Tensor
    }
    assert sum(".experts." in name for name in done) == 2 * 4 * sum(b.mlp is not None for b in small.model.blocks)
    assert not any(name.endswith("gate") or name == "output" for name in done)
    before, after = stored_bytes(plain.model), stored_bytes(small.model)
    kept = sum(m.in_features * m.out_features for n, m in small.model.named_modules() if n in done)
    each, left = (4 if dtype == "float32" else 2), (1 if kind == "int8" else 0.5)
    assert 0.7 * kept * (each - left) < before - after < kept * (each - left)
    change = np.abs(answers(plain) - answers(small)).mean()
    assert 0 < change < MOST_ERROR[kind]


@pytest.mark.parametrize("kind", KINDS)
def test_quantized_results_do_not_depend_on_the_batch(wide: Path, kind: str) -> None:
    model = load(wide, device="cpu", quantize=kind)
    prompts = mixed_prompts(6, 4)
    together = model.generate(prompts, max_tokens=5)
    for prompt, reply in zip(prompts, together):
        alone = model.generate(prompt, max_tokens=5)
        assert np.array_equal(alone.tokens, reply.tokens) and np.array_equal(alone.logprobs, reply.logprobs)


def test_a_quantized_model_scores_what_it_generates_and_explains_it(wide: Path) -> None:
    model = load(wide, device="cpu", quantize="int8")
    reply = model.generate(["the fox", *mixed_prompts(1, 6)[0]], ["text", "image"], grid=(2, 2), max_tokens=6)
    score = model.score(["the fox", *mixed_prompts(1, 6)[0]], reply)
    assert np.abs(score.logprobs - reply.logprobs)[reply.drawn].max() < 2e-5
    assert model.explain("the fox", model.generate("the fox", max_tokens=4)).parts


def test_unknown_kinds_are_refused(folder: Path) -> None:
    with pytest.raises(CheckpointError, match="'int8' or 'int4'"):
        load(folder, device="cpu", quantize="int2")
