"""int8 weights: a quarter of the memory, nearly the same answers, the same laws."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.inference.conftest import mixed_prompts
from weft.inference.generalist import Generalist
from weft.inference.load import load
from weft.inference.quantize import from_int8, stored_bytes, to_int8


def test_rounding_error_is_at_most_half_a_step() -> None:
    weight = torch.randn(3, 7, 11)
    stored, scale = to_int8(weight)
    back = from_int8(stored, scale, torch.float32)
    assert stored.dtype == torch.int8
    assert ((back - weight).abs() <= weight.abs().amax(-1, keepdim=True) / 254 + 1e-7).all()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_quantized_model_is_smaller_and_close(tiny: Generalist, folder: Path, dtype: str) -> None:
    plain, small = load(folder, device="cpu", dtype=dtype), load(folder, device="cpu", dtype=dtype, quantize="int8")
    large = [
        n for n, p in plain.model.named_parameters() if p.dim() > 1 and p.numel() >= 4096 and "blocks" in n and "gate." not in n
    ]
    kept = sum(p.numel() for n, p in plain.model.named_parameters() if n in large)
    saved = stored_bytes(plain.model) - stored_bytes(small.model)
    bytes_each = 4 if dtype == "float32" else 2
    assert saved > 0.85 * kept * (bytes_each - 1)
    prompts = mixed_prompts(12, 3)
    a = np.array([s.mean for s in plain.score(prompts, ["the fox jumps"] * 12)])
    b = np.array([s.mean for s in small.score(prompts, ["the fox jumps"] * 12)])
    assert np.abs(a - b).mean() < 0.15 and not np.array_equal(a, b)


def test_quantized_results_do_not_depend_on_the_batch(folder: Path) -> None:
    model = load(folder, device="cpu", quantize="int8")
    prompts = mixed_prompts(6, 4)
    together = model.generate(prompts, max_tokens=5)
    for prompt, reply in zip(prompts, together):
        alone = model.generate(prompt, max_tokens=5)
        assert np.array_equal(alone.tokens, reply.tokens) and np.array_equal(alone.logprobs, reply.logprobs)
