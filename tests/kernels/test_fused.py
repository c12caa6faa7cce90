"""The fused CPU functions against their references and against finite differences."""

import pytest
import torch

from weft.kernels import elementwise, fused, rotary


def _double(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def test_fused_functions_equal_their_references() -> None:
    x, weight = _double(7, 12), _double(12)
    torch.testing.assert_close(fused.rms_norm(x, weight), elementwise.rms_norm(x, weight))
    torch.testing.assert_close(fused.swiglu(x), elementwise.swiglu(x))
    q, k, a, b, table = (
        _double(5, 3, 4),
        _double(5, 2, 4),
        _double(4),
        _double(4),
        rotary.rope_table(torch.randint(9, (5, 3)), 4),
    )
    for ours, theirs in zip(fused.qk_norm_rope(q, k, a, b, *table), rotary.qk_norm_rope(q, k, a, b, *table)):
        torch.testing.assert_close(ours, theirs)


def test_fused_gradients_equal_finite_differences() -> None:
    cos, sin = torch.randn(5, 2, dtype=torch.float64), torch.randn(5, 2, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x, w: fused.rms_norm(x, w), (_double(7, 6), _double(6)))
    assert torch.autograd.gradcheck(fused.swiglu, (_double(7, 6),))
    both = lambda x, a, b: fused.qk_norm_rope(x[:, :3], x[:, 3:], a, b, cos, sin)  # noqa: E731
    assert torch.autograd.gradcheck(both, (_double(5, 5, 4), _double(4), _double(4)))


def test_fused_functions_take_no_rows() -> None:
    x, weight = torch.zeros(0, 6, requires_grad=True), torch.ones(6, requires_grad=True)
    (fused.rms_norm(x, weight).sum() + fused.swiglu(x).sum()).backward()
    assert weight.grad is not None and not weight.grad.any()


def test_rms_norm_remembers_no_other_device_or_mode() -> None:
    """Its constant is kept between calls: the first call may have come from anywhere."""
    fused._scalar.cache_clear()
    x, weight = torch.randn(4, 8), torch.rand(8)
    with torch.device("meta"), torch.inference_mode():
        first = fused.rms_norm(x, weight)
    second = fused.rms_norm(x, weight.clone().requires_grad_())
    second.sum().backward()
    torch.testing.assert_close(first, elementwise.rms_norm(x, weight))
    torch.testing.assert_close(second.detach(), first)


@pytest.mark.parametrize("width", [19, 64, 192])
def test_a_row_has_the_same_bits_among_any_rows(width: int) -> None:
    """Without gradients, as decoding calls it."""
    x, weight = torch.randn(67, width), torch.rand(width)
    with torch.no_grad():
        rows = torch.cat([fused.rms_norm(row[None], weight) for row in x])
        for count in (1, 2, 3, 5, 8, 33, 67):
            assert torch.equal(fused.rms_norm(x[:count], weight), rows[:count])
