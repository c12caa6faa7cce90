"""Parity of the fused MoE under Triton's interpreter. Run by tests/kernels/test_triton.py in a process of its own."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import weft.kernels.triton_moe as module
from tests.kernels.interpreter import patch_once_per_launch
from tests.kernels.routed import SIZES, Size, gradients, hold, inputs, one_by_one, wide
from weft.kernels.moe import CHOICE, moe_ffn, sort_by_expert, why

patch_once_per_launch()


@pytest.fixture(autouse=True)
def _poisoned() -> Iterator[None]:
    """Memory that nobody wrote is NaN, and the largest integer."""
    torch.use_deterministic_algorithms(True)
    assert torch.ones(1).new_empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def compare(size: Size, dtype: torch.dtype) -> list[torch.Tensor]:
    given = inputs(size, dtype)
    grad = torch.randn(size.tokens, size.width).to(dtype)
    exact = wide(given)
    truth = gradients(one_by_one(*exact), exact, grad)
    ours, plain = (gradients(moe_ffn(*given, backend=b), given, grad) for b in ("triton", "torch"))
    hold(ours, plain, truth)
    assert [x.dtype for x in ours] == [x.dtype for x in plain]
    return ours


@pytest.mark.parametrize("name", SIZES)
def test_float32(name: str) -> None:
    size = SIZES[name]
    ours = compare(size, torch.float32)
    idle = sorted(set(range(size.experts)) - set(size.used or range(size.experts)))
    assert not any(bool(matrix[idle].any()) for matrix in ours[3:])


@pytest.mark.parametrize("name", SIZES)
def test_float16(name: str) -> None:
    compare(SIZES[name], torch.float16)


@pytest.mark.parametrize("name", ["two of five", "experts without tokens"])
def test_bfloat16(name: str) -> None:
    compare(SIZES[name], torch.bfloat16)


@pytest.mark.parametrize("columns", [8])
def test_tiles_smaller_than_the_widths(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "COLUMNS", columns)
    monkeypatch.setattr(module, "BLOCK", 16)
    for options in (module.FORWARD, module.BACKWARD):
        monkeypatch.setitem(options, "COLUMNS", columns)
    compare(Size(8, 5, 3, width=20, hidden=12), torch.float32)


@pytest.mark.parametrize(("tokens", "experts", "choices"), [(1, 1, 1), (43, 3, 3), (128, 7, 1), (97, 33, 4)])
def test_the_plan_is_a_stable_sort(tokens: int, experts: int, choices: int) -> None:
    expert = torch.randint(experts, (tokens, choices))
    for ours, expect in zip(module.plan(expert, experts), sort_by_expert(expert, experts)):
        assert ours.dtype == torch.int32 and torch.equal(ours.long(), expect)


def test_no_tokens() -> None:
    given = inputs(Size(0, 3, 2), torch.float32)
    ours = gradients(moe_ffn(*given, backend="triton"), given, torch.zeros(0, 24))
    assert [x.shape for x in ours[1:]] == [x.shape for x in given if x.requires_grad]
    assert not any(bool(x.any()) for x in ours)


def test_the_model_takes_it_when_asked() -> None:
    from weft.model.moe import MoE

    torch.manual_seed(0)
    layer, x = MoE(16, 4, 2, 8), torch.randn(11, 16)
    for p in layer.parameters():
        torch.nn.init.normal_(p, std=0.3)
    expect = layer(x)[0]
    ran = []

    def spy(*tensors: torch.Tensor) -> torch.Tensor:
        ran.append(1)
        return run(*tensors)

    run = module.run
    module.run = spy
    with CHOICE.use("triton"):
        ours = layer(x)[0]
    module.run = run
    assert ran == [1]
    torch.testing.assert_close(ours, expect, atol=1e-5, rtol=1e-5)
    assert dict(why(x, layer.experts.gate_up_proj, layer.experts.down_proj))["triton"] == "runs"


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # torch's own check looks at it
def test_operators_are_well_made() -> None:
    """Schema, fake implementation and autograd agree, and a compiled caller needs no graph break."""
    given = inputs(Size(5, 3, 2, width=8, hidden=8), torch.float32)
    checks = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(module._forward, tuple(given), test_utils=checks)
    kept = [x.detach() for x in module._forward(*given)]
    x, weight, _, gate_up, down = (x.detach() for x in given)
    tensors = (torch.randn_like(kept[0]), x, weight, gate_up, down, *kept[1:])
    torch.library.opcheck(module._backward, tensors, test_utils=checks[:3])

    def block(x: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
        return moe_ffn(x * 2, *rest, backend="triton") + 1

    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
    grad = torch.randn_like(x)
    for a, b in zip(*(gradients(f(*given), given, grad) for f in (block, compiled))):
        torch.testing.assert_close(a, b)
