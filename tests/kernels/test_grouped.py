"""Laws of the product per expert."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from weft.kernels import grouped
from weft.kernels.grouped import grouped_matmul, grouped_outer


def plain(x: torch.Tensor, weight: torch.Tensor, counts: list[int]) -> torch.Tensor:
    expert = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    return torch.einsum("nd,nfd->nf", x, weight[expert])


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=5), st.sampled_from([1, 3, 16]))
def test_each_row_meets_its_expert(counts: list[int], pad: int) -> None:
    x, weight = torch.randn(sum(counts), 5, dtype=torch.float64), torch.randn(len(counts), 3, 5, dtype=torch.float64)
    ours = grouped_matmul(x, weight, torch.tensor(counts), pad_rows_to=pad)
    torch.testing.assert_close(ours, plain(x, weight, counts))
    assert torch.equal(ours, grouped_matmul(x, weight, counts, pad_rows_to=pad))


@pytest.mark.parametrize("counts", [[5, 0, 7, 0], [0, 0, 0, 12], [3, 3, 3, 3], [0, 0, 0, 0]])
def test_gradients_are_right_with_idle_experts(counts: list[int]) -> None:
    x = torch.randn(sum(counts), 5, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(4, 3, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, w: grouped_matmul(x, w, torch.tensor(counts)), (x, weight))
    grad = torch.autograd.grad(grouped_matmul(x, weight, counts).sum(), weight)[0]
    for expert, count in enumerate(counts):
        assert bool((grad[expert] != 0).any()) == (count > 0)


def test_padded_rows_do_not_depend_on_the_other_rows() -> None:
    """Bitwise: the same rows alone, and among others of the same expert."""
    weight = torch.randn(3, 128, 96)
    for rows in (1, 2, 5, 17):
        x = torch.randn(100, 96)
        alone = grouped_matmul(x[:rows], weight, [rows, 0, 0], pad_rows_to=16)
        among = grouped_matmul(x, weight, [70, 20, 10], pad_rows_to=16)[:rows]
        assert torch.equal(alone, among)


def test_bfloat16_is_as_exact_as_one_product_per_expert() -> None:
    counts = [7, 0, 30, 4]
    x, weight = torch.randn(41, 64, dtype=torch.bfloat16), torch.randn(4, 24, 64, dtype=torch.bfloat16)
    truth = plain(x.double(), weight.double(), counts)
    ours = (grouped_matmul(x, weight, counts).double() - truth).norm()
    assert ours <= 2 * (torch.cat([a @ w.T for a, w in zip(x.split(counts), weight)]).double() - truth).norm()


@pytest.mark.parametrize("counts", [[5, 0, 7, 0], [0, 0, 0, 12], [0, 0, 0, 0]])
def test_outer_products_are_summed_per_expert(counts: list[int]) -> None:
    a, b = torch.randn(sum(counts), 5, dtype=torch.float64), torch.randn(sum(counts), 3, dtype=torch.float64)
    expect = torch.stack([x.T @ y for x, y in zip(a.split(counts), b.split(counts))])
    torch.testing.assert_close(grouped_outer(a, b, torch.tensor(counts)), expect)
    with pytest.raises(ValueError, match="rows"):
        grouped_outer(a, b, [1, 1, 1, 2])


@pytest.mark.parametrize("turned", [False, True])
def test_the_library_product_and_its_gradients(turned: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a GPU would run, here on torch's CPU version of it; experts without rows have a gradient of zero."""
    monkeypatch.setattr(grouped, "_fused", lambda x, weight: True)
    counts = [9, 0, 3, 0]
    x, weight = torch.randn(12, 16, requires_grad=True), torch.randn(4, 24, 16, requires_grad=True)
    given = weight.transpose(1, 2).contiguous().transpose(1, 2) if turned else weight
    grad = torch.randn(12, 24)
    out, expect = grouped_matmul(x, given, torch.tensor(counts)), plain(x, weight, counts)
    torch.testing.assert_close(out, expect, atol=1e-4, rtol=1e-5)
    ours, truth = (torch.autograd.grad(y, (x, weight), grad) for y in (out, expect))
    for a, b in zip(ours, truth):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-5)
    assert not bool(ours[1][[1, 3]].any())


@pytest.mark.parametrize(
    ("shapes", "counts", "message"),
    [
        (((6, 5), (2, 3, 4)), [3, 3], r"x \[N D\]"),
        (((6, 5), (2, 3, 5)), [3, 2, 1], "one count per expert"),
        (((6, 5), (2, 3, 5)), [3, 2], "counts sum to 5, x has 6"),
    ],
)
def test_what_does_not_fit_is_named(shapes: tuple[tuple[int, ...], ...], counts: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        grouped_matmul(torch.zeros(shapes[0]), torch.zeros(shapes[1]), counts)


@pytest.mark.gpu
@pytest.mark.parametrize("counts", [[50, 0, 30, 20], [0, 0, 0, 100]])
def test_fused_product_on_a_gpu(counts: list[int]) -> None:
    made = torch.randn(100, 64, device="cuda"), torch.randn(4, 48, 64, device="cuda")
    x, weight = (y.bfloat16().requires_grad_() for y in made)
    out = grouped_matmul(x, weight, torch.tensor(counts, device="cuda"))
    truth = plain(x.detach().double().cpu(), weight.detach().double().cpu(), counts)
    assert (out.double().cpu() - truth).norm() <= 0.01 * truth.norm()
    grad = torch.autograd.grad(out.float().sum(), (x, weight))
    assert all(bool(g.isfinite().all()) for g in grad) and not bool(grad[1][1].any())


@pytest.mark.parametrize("in_hardware", [True, False])
def test_autocast_lowers_products_where_the_cpu_has_them(in_hardware: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grouped, "multiplies_bfloat16", lambda device: in_hardware)
    x, weight, counts = torch.randn(12, 8), torch.randn(3, 16, 8, requires_grad=True), [5, 0, 7]
    with torch.autocast("cpu", torch.bfloat16):
        out = grouped.grouped_matmul(x.bfloat16(), weight, counts)
    assert out.dtype == (torch.bfloat16 if in_hardware else torch.float32)
    truth = grouped.grouped_matmul(x.bfloat16().double(), weight.detach().double(), counts)
    assert (out.double() - truth).abs().max() < (0.1 if in_hardware else 1e-5)
    out.sum().backward()
    assert weight.grad is not None and weight.grad.dtype == torch.float32 and bool((weight.grad[1] == 0).all())
