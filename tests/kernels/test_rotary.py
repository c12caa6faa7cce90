"""Laws of rotary positions, norms and SwiGLU."""

from __future__ import annotations

import math

import pytest
import torch

from weft.kernels.elementwise import rms_norm, swiglu
from weft.kernels.rotary import axis_of_pair, default_split, qk_norm_rope, rope_table, rotate

T, H, G, K = 7, 6, 3, 20


def positions(seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 50, (T, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.int32)


def test_position_zero_changes_nothing_and_lengths_stay() -> None:
    x = torch.randn(T, H, K)
    assert torch.equal(rotate(x, *rope_table(torch.zeros(T, 3), K)), x)
    turned = rotate(x, *rope_table(positions(), K))
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1))
    assert not torch.allclose(turned, x)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_scores_depend_on_differences_of_positions_only(axis: int) -> None:
    q, k = torch.randn(1, 1, K, dtype=torch.float64), torch.randn(1, 1, K, dtype=torch.float64)

    def score(a: list[int], b: list[int]) -> float:
        tables = [[y.double() for y in rope_table(torch.tensor([p]), K)] for p in (a, b)]
        return float((rotate(q, *tables[0]) * rotate(k, *tables[1])).sum())

    shift = [0, 0, 0]
    shift[axis] = 13
    moved = score([3 + shift[0], 5 + shift[1], 7 + shift[2]], [1 + shift[0], 9 + shift[1], 2 + shift[2]])
    assert math.isclose(score([3, 5, 7], [1, 9, 2]), moved, rel_tol=1e-5)
    only_query = score([3 + shift[0], 5 + shift[1], 7 + shift[2]], [1, 9, 2])
    assert not math.isclose(moved, only_query, rel_tol=1e-3)


def test_equal_axes_are_ordinary_rotary() -> None:
    """The textbook formula with complex numbers, one position for all pairs."""
    at = torch.arange(T) * 3
    x = torch.randn(T, H, K, dtype=torch.float64)
    angle = at[:, None].double() * 10_000.0 ** (-torch.arange(0, K, 2, dtype=torch.float64) / K)
    pairs = torch.complex(x[..., : K // 2], x[..., K // 2 :]) * torch.polar(torch.ones_like(angle), angle)[:, None]
    cos, sin = rope_table(at[:, None].expand(T, 3), K)
    torch.testing.assert_close(rotate(x, cos, sin), torch.cat([pairs.real, pairs.imag], -1), atol=1e-6, rtol=1e-6)


def test_each_axis_has_its_pairs_from_fast_to_slow() -> None:
    axes = axis_of_pair((8, 4, 4))
    assert [axes.count(a) for a in range(3)] == [8, 4, 4]
    for axis in range(3):
        places = [i for i, a in enumerate(axes) if a == axis]
        assert places[0] < 4 and places[-1] >= 12
    assert default_split(20) == (6, 2, 2)


def test_far_positions_keep_their_angle() -> None:
    far = 10_000_001
    cos, sin = rope_table(torch.full((1, 3), far), 8)
    assert math.isclose(float(torch.atan2(sin, cos)[0, 0]), math.remainder(far, 2 * math.pi), abs_tol=1e-5)


def test_qk_norm_rope_is_norm_then_rotation() -> None:
    q, k = torch.randn(T, H, K, dtype=torch.float64), torch.randn(T, G, K, dtype=torch.float64)
    weights = torch.rand(2, K, dtype=torch.float64) + 0.5
    cos, sin = rope_table(positions(), K)
    ours = qk_norm_rope(q, k, *weights, cos, sin, eps=1e-5)
    for x, weight, got in zip((q, k), weights, ours):
        normed = x / (x.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * weight
        torch.testing.assert_close(got, rotate(normed, cos, sin))


@pytest.mark.parametrize("strided", [False, True])
def test_gradients_of_qk_norm_rope(strided: bool) -> None:
    cos, sin = (x[:3, :4].double() for x in rope_table(positions(), K))
    fused = torch.randn(3, 5, 8, dtype=torch.float64, requires_grad=True)
    weights = [(torch.rand(8, dtype=torch.float64) + 0.5).requires_grad_() for _ in range(2)]

    def call(fused: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, ...]:
        q, k = fused.split([3, 2], 1)
        if not strided:
            q, k = q.contiguous(), k.contiguous()
        return qk_norm_rope(q, k, a, b, cos, sin)

    assert torch.autograd.gradcheck(call, (fused, *weights))


@pytest.mark.parametrize("weighted", [True, False])
def test_rms_norm_is_its_formula(weighted: bool) -> None:
    x = torch.randn(T, 13, dtype=torch.float64, requires_grad=True)
    weight = torch.rand(13, dtype=torch.float64, requires_grad=True) if weighted else None
    expect = x / (x.pow(2).mean(-1, keepdim=True) + 1e-3).sqrt() * (1 if weight is None else weight)
    torch.testing.assert_close(rms_norm(x, weight, 1e-3), expect)
    given = [y for y in (x, weight) if y is not None]
    assert torch.autograd.gradcheck(lambda x, w=None: rms_norm(x, w, 1e-3), given)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rms_norm_is_as_exact_as_the_plain_formula(dtype: torch.dtype) -> None:
    x, weight = torch.randn(50, 96).to(dtype), torch.rand(96).to(dtype)
    formula = lambda x, w: x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * w  # noqa: E731
    truth = formula(x.double(), weight.double())
    ours = rms_norm(x, weight)
    assert ours.dtype == dtype
    assert (ours.double() - truth).norm() <= 2 * (formula(x, weight).double() - truth).norm()


def test_norms_and_gates_take_empty_slices() -> None:
    weight = torch.ones(5, requires_grad=True)
    out = swiglu(rms_norm(torch.zeros(0, 5), weight), torch.zeros(0, 5))
    assert torch.autograd.grad(out.sum(), weight)[0].tolist() == [0.0] * 5


def test_swiglu_of_halves_is_swiglu_of_two() -> None:
    both = torch.randn(T, 22, dtype=torch.float64, requires_grad=True)
    gate, up = both.chunk(2, -1)
    torch.testing.assert_close(swiglu(both), gate * torch.sigmoid(gate) * up)
    assert torch.equal(swiglu(both), swiglu(gate, up))
    assert torch.autograd.gradcheck(swiglu, (both,)) and torch.autograd.gradcheck(swiglu, (gate, up))


def test_swiglu_of_bfloat16_is_as_exact_as_the_plain_formula() -> None:
    both = torch.randn(300, 64).bfloat16().requires_grad_()
    exact = both.detach().double().requires_grad_()

    def plain(x: torch.Tensor) -> torch.Tensor:
        gate, up = x.chunk(2, -1)
        return gate * torch.sigmoid(gate) * up

    values = [
        [y, torch.autograd.grad(y.sum(), x)[0]] for y, x in ((swiglu(both), both), (plain(both), both), (plain(exact), exact))
    ]
    for factor, a, b, c in zip((2, 3), *values):
        assert (a.double() - c).norm() <= factor * (b.double() - c).norm()


@pytest.mark.parametrize("split", [(5, 5, 5), (12, -1, -1)])
def test_a_split_that_does_not_fit_is_named(split: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="must sum to half the head width"):
        rope_table(positions(), K, split=split)
