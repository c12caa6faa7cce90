"""Parity of the Triton attention under Triton's interpreter. Run by tests/kernels/test_triton.py in a process of its own."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tests.kernels.interpreter import patch_once_per_launch
from tests.kernels.test_attention import LAYOUTS, build, hold, inputs, results
from weft.kernels.attention import attention, why
from weft.kernels.triton_attention import _backward, _forward, _numbers, attend
from weft.kernels.triton_plan import TileSize, TileSizes, interval_plan

patch_once_per_launch()
SIZES = TileSizes(TileSize(64, 32), TileSize(32, 64), TileSize(64, 32))
SMALL = TileSizes(TileSize(16, 16), TileSize(16, 16), TileSize(16, 16))
LARGE = TileSizes(TileSize(64, 64), TileSize(64, 64), TileSize(64, 64))


@pytest.fixture(autouse=True)
def _poisoned() -> Iterator[None]:
    """Memory that nobody wrote is NaN, and the largest integer."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


GROUPED = ("landmarks", "images larger than the window", "documents")
SHORT = [name for name in LAYOUTS if name not in ("long", "split pieces")]


def compare(name: str, dtype: torch.dtype, heads: tuple[int, int, int], sizes: TileSizes) -> None:
    layout = LAYOUTS[name]("cpu")
    q, k, v, grad = inputs(layout, heads, dtype)
    out, lse = attend(q, k, v, layout, heads[2] ** -0.5, sizes)
    ours = [out, *torch.autograd.grad(out, (q, k, v), grad)]
    exact = [x.detach().double().requires_grad_(x.requires_grad) for x in (q, k, v, grad)]
    hold(ours, results(q, k, v, grad, layout, "reference"), results(*exact, layout, "reference"))
    expect = attention(*exact[:3], layout, backend="reference", return_lse=True)[1]
    torch.testing.assert_close(lse, expect.float(), atol=1e-5 if dtype == torch.float32 else 2e-2, rtol=0)
    assert not lse.requires_grad


@pytest.mark.parametrize("name", SHORT)
def test_float32(name: str) -> None:
    compare(name, torch.float32, (2, 1, 16), SIZES)


@pytest.mark.parametrize("name", GROUPED)
def test_float16_with_grouped_heads(name: str) -> None:
    compare(name, torch.float16, (4, 2, 32), LARGE)


@pytest.mark.parametrize("name", [name for name in SHORT if name not in GROUPED])
def test_float16(name: str) -> None:
    """In tiles of another form, which are fewer: the interpreter's time is their number."""
    compare(name, torch.float16, (1, 1, 16), LARGE)


@pytest.mark.parametrize("name", ["one-token documents", "window of one"])
def test_tiles_smaller_than_documents_and_windows(name: str) -> None:
    compare(name, torch.float32, (3, 3, 16), SMALL)


def test_bfloat16_with_products_in_float32() -> None:
    compare("window", torch.bfloat16, (2, 1, 16), SIZES)


@pytest.mark.parametrize(("width", "dtype"), [(64, torch.float16), (128, torch.float16), (128, torch.float32)])
def test_head_widths_through_the_dispatcher(width: int, dtype: torch.dtype) -> None:
    layout = build([70, 27], 20, landmarks=0.1, blocks=0.5)
    q, k, v, grad = inputs(layout, (2, 1, width), dtype)
    assert dict(why(q, k, v, layout))["triton"] == "runs"
    exact = [x.detach().double().requires_grad_(x.requires_grad) for x in (q, k, v, grad)]
    triple = [results(q, k, v, grad, layout, b) for b in ("triton", "reference")]
    hold(*triple, results(*exact, layout, "reference"))


@pytest.mark.parametrize("scale", [-0.3, 0.0])
def test_a_scale_that_is_not_positive(scale: float) -> None:
    layout = build([37], 11)
    q, k, v, grad = inputs(layout, (2, 1, 16), torch.float32)
    outs = [attention(q, k, v, layout, backend=b, scale=scale) for b in ("triton", "reference")]
    grads = [torch.autograd.grad(out, (q, k, v), grad) for out in outs]
    for a, b in zip([outs[0], *grads[0]], [outs[1], *grads[1]]):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_strided_inputs() -> None:
    """q, k, v cut out of one projection, channels side by side or not."""
    layout = build([41], 9)
    fused = torch.randn(41, 4, 16)
    parts = fused.split([2, 1, 1], 1)
    turned = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in parts]
    plain = [x.contiguous() for x in parts]
    first, *others = (attention(*x, layout, backend="triton") for x in (parts, turned, plain))
    assert all(torch.equal(first, other) for other in others)


def test_no_tokens() -> None:
    layout = build([], None)
    q, k, v, grad = inputs(layout, (2, 1, 16), torch.float32)
    assert [x.shape for x in results(q, k, v, grad, layout, "triton")] == [q.shape, q.shape, k.shape, v.shape]


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # torch's own check looks at it
def test_operators_are_well_made() -> None:
    """Schema, fake implementation and autograd agree, and a compiled caller needs no graph break."""
    layout = build([23], 7, landmarks=0.2)
    q, k, v, grad = inputs(layout, (2, 1, 16), torch.float32)
    plan = interval_plan(layout, SMALL)
    tail = (plan.spans, plan.tables, 0.25, _numbers(SMALL))
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(_forward, (q, k, v, *tail), test_utils=checks)
    out, lse = _forward(q, k, v, *tail)
    held = [x.detach() for x in (grad, q, k, v, out, lse)]
    torch.library.opcheck(_backward, (*held, *tail), test_utils=checks)

    def block(q: torch.Tensor) -> torch.Tensor:
        return attention(q * 2, k, v, layout, backend="triton") + 1

    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
    results = [torch.autograd.grad(f(q), (q, k), grad) for f in (block, compiled)]
    for a, b in zip(*results):
        torch.testing.assert_close(a, b)
