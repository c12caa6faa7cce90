"""Parity of the Triton sliced loss under Triton's interpreter. Run by tests/kernels/test_triton.py in a process of its own."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import weft.kernels.triton_sliced_loss as module
from tests.kernels.interpreter import patch_once_per_launch
from weft.kernels.sliced_loss import sliced_cross_entropy

patch_once_per_launch()


@pytest.fixture(autouse=True)
def _poisoned() -> Iterator[None]:
    """Memory that nobody wrote is NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


SLICES = ((0, 131), (131, 133), (133, 330), (331, 348))  # id 330 belongs to none


def case(tokens: int, used: list[int], dtype: torch.dtype, width: int = 37) -> tuple[Tensor, ...]:
    index = torch.tensor(used)[torch.randint(len(used), (tokens,))]
    borders = torch.tensor(SLICES)[index]
    target = borders[:, 0] + (torch.rand(tokens) * (borders[:, 1] - borders[:, 0])).long()
    hidden, weight = torch.randn(tokens, width).to(dtype), torch.randn(348, width).to(dtype)
    return hidden.requires_grad_(), weight.requires_grad_(), target, index


def values(hidden: Tensor, weight: Tensor, target: Tensor, index: Tensor, scale: Tensor, **options: object) -> list[Tensor]:
    loss, square = sliced_cross_entropy(hidden, weight, target, index, SLICES, **options)  # type: ignore[arg-type]
    total = (torch.stack([loss, square]) * scale.to(loss.dtype)).sum()
    return [loss, square, *torch.autograd.grad(total, (hidden, weight))]


@pytest.mark.parametrize(
    ("dtype", "z_loss", "smoothing"),
    [(torch.float32, 0.0, 0.0), (torch.float32, 0.3, 0.1), (torch.float16, 0.3, 0.0), (torch.bfloat16, 0.0, 0.1)],
)
def test_it_is_as_exact_as_the_torch_path(dtype: torch.dtype, z_loss: float, smoothing: float) -> None:
    hidden, weight, target, index = case(150, [0, 2, 3], dtype)
    scale, options = torch.rand(2, 150), {"label_smoothing": smoothing, "z_loss": z_loss}
    exact = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    truth = values(*exact, target, index, scale, **options)
    triple = (values(hidden, weight, target, index, scale, backend=b, **options) for b in ("triton", "torch"))
    for number, (a, b, c) in enumerate(zip(*triple, truth)):
        allowed = (2 if number < 2 else 3) * (b.double() - c).norm() + 2 * torch.finfo(a.dtype).eps * c.norm()
        assert (a.double() - c).norm() <= allowed, f"output {number}"


def test_blocks_of_any_size_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight, target, index = case(140, [0, 1], torch.float32)
    scale = torch.rand(2, 140)
    whole = values(hidden, weight, target, index, scale, backend="triton")
    monkeypatch.setattr(module, "BLOCK_BYTES", 1)
    for a, b in zip(values(hidden, weight, target, index, scale, backend="triton"), whole):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("tokens", [0, 7])
def test_every_row_of_the_matrix_has_a_gradient(tokens: int) -> None:
    hidden, weight, target, index = case(tokens, [1], torch.float32)
    values(hidden, weight, target, index, torch.ones(2, tokens), backend="triton")
    loss, _ = sliced_cross_entropy(hidden, weight, target, index, SLICES, backend="triton")
    loss.sum().backward()
    assert weight.grad is not None and hidden.grad is not None
    assert (weight.grad.abs().sum(1) > 0).nonzero()[:, 0].tolist() == ([131, 132] if tokens else [])


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # torch's own check looks at it
def test_operators_are_well_made() -> None:
    """Schema, fake implementation and autograd agree, and a compiled caller needs no graph break."""
    hidden, weight, target, index = case(11, [1, 3], torch.float32)
    borders = [border for pair in SLICES for border in pair]
    checks = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(module._forward, (hidden, weight, target, index, borders), test_utils=checks)
    log_z, picked, mean, order, counts = (x.detach() for x in module._forward(hidden, weight, target, index, borders))
    grads = [torch.rand_like(x) for x in (log_z, picked, mean)]
    inputs = (hidden.detach(), weight.detach(), target, order, log_z, grads, counts, borders)
    torch.library.opcheck(module._backward, inputs, test_utils=checks[:3])

    def block(hidden: Tensor) -> Tensor:
        loss, _ = sliced_cross_entropy(hidden * 2, weight, target, index, SLICES, backend="triton", z_loss=0.1)
        return loss.sum()

    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
    for a, b in zip(*(torch.autograd.grad(f(hidden), (hidden, weight)) for f in (block, compiled))):
        torch.testing.assert_close(a, b)
