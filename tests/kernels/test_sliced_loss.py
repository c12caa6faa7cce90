"""Laws of the sliced cross-entropy, held against the naive formula."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import weft.kernels.sliced_loss as module
from weft.kernels.sliced_loss import sliced_cross_entropy

SLICES = ((0, 11), (11, 13), (13, 30), (31, 37))  # id 30 belongs to none


def case(tokens: int, used: list[int], seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    """hidden, weight, target, slice_index; only the slices in `used` get tokens."""
    torch.manual_seed(seed)
    index = torch.tensor(used)[torch.randint(len(used), (tokens,))]
    borders = torch.tensor(SLICES)[index]
    target = borders[:, 0] + (torch.rand(tokens) * (borders[:, 1] - borders[:, 0])).long()
    hidden, weight = torch.randn(tokens, 5, dtype=torch.float64), torch.randn(37, 5, dtype=torch.float64)
    return hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), target, index


def naive(
    hidden: Tensor, weight: Tensor, target: Tensor, index: Tensor, smoothing: float, z_loss: float
) -> tuple[Tensor, Tensor]:
    losses, squares = [hidden.new_zeros(0)], [hidden.new_zeros(0)]
    for row, t, s in zip(hidden, target, index.tolist()):
        first, end = SLICES[s]
        logits = (weight[first:end] @ row)[None]
        square = logits.logsumexp(1) ** 2
        losses.append(F.cross_entropy(logits, (t - first)[None], reduction="none", label_smoothing=smoothing) + z_loss * square)
        squares.append(square)
    return torch.cat(losses), torch.cat(squares)


@settings(max_examples=30, deadline=None)
@given(
    st.integers(0, 23),
    st.lists(st.integers(0, 3), min_size=1, max_size=4, unique=True),
    st.sampled_from([0.0, 0.1]),
    st.sampled_from([0.0, 0.3]),
    st.sampled_from([0, 10**9]),
)
def test_it_is_the_naive_loss(tokens: int, used: list[int], smoothing: float, z_loss: float, keep: int) -> None:
    hidden, weight, target, index = case(tokens, used)
    ours = sliced_cross_entropy(
        hidden, weight, target, index, SLICES, label_smoothing=smoothing, z_loss=z_loss, keep_bytes=keep
    )
    expect = naive(hidden, weight, target, index, smoothing, z_loss)
    scale = torch.rand(2, tokens, dtype=torch.float64)
    for a, b in zip(ours, expect):
        torch.testing.assert_close(a, b)
    if tokens:
        grads = [torch.autograd.grad((x * scale).sum(), (hidden, weight)) for x in (torch.stack(ours), torch.stack(expect))]
        for a, b in zip(*grads):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("keep", [0, 10**9], ids=["recomputed", "kept"])
def test_gradcheck(keep: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MIN_ROWS", 2)
    monkeypatch.setattr(module, "BLOCK_BYTES", 200)  # several blocks per slice
    hidden, weight, target, index = case(9, [0, 2, 3])
    assert len(list(module._blocks(index, SLICES, torch.float64))) > 4
    options = {"label_smoothing": 0.1, "z_loss": 0.2, "keep_bytes": keep}
    assert torch.autograd.gradcheck(lambda h, w: sliced_cross_entropy(h, w, target, index, SLICES, **options), (hidden, weight))


@pytest.mark.parametrize("tokens", [0, 7])
def test_every_row_of_the_matrix_has_a_gradient(tokens: int) -> None:
    """Zero where no token was, never None: under ZeRO every rank must touch every parameter."""
    hidden, weight, target, index = case(tokens, [1])
    loss, square = sliced_cross_entropy(hidden, weight, target, index, SLICES)
    (loss.sum() + square.sum()).backward()
    assert weight.grad is not None and hidden.grad is not None
    used = weight.grad.abs().sum(1) > 0
    assert used.nonzero()[:, 0].tolist() == ([11, 12] if tokens else [])


def test_bfloat16_is_as_exact_as_the_naive_loss_in_bfloat16() -> None:
    hidden, weight, target, index = case(200, [0, 2, 3], dtype=torch.bfloat16)
    exact = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    truth = naive(*exact, target, index, 0.0, 0.0)[0]
    plain = naive(hidden, weight, target, index, 0.0, 0.0)[0]
    ours = sliced_cross_entropy(hidden, weight, target, index, SLICES)[0]
    assert ours.dtype == torch.float32
    triple = [(ours, (hidden, weight)), (plain, (hidden, weight)), (truth, tuple(exact))]
    values = [[y, *torch.autograd.grad(y.sum(), x)] for y, x in triple]
    for factor, a, b, c in zip((2, 3, 3), *values):
        assert (a.double() - c).norm() <= factor * (b.double() - c).norm()


def test_autocast_reads_the_matrix_in_lower_precision() -> None:
    hidden, weight, target, index = case(50, [0, 2], dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        loss = sliced_cross_entropy(hidden, weight, target, index, SLICES)[0]
    expect = sliced_cross_entropy(hidden.bfloat16(), weight.bfloat16(), target, index, SLICES)[0]
    assert loss.dtype == torch.float32 and torch.equal(loss, expect)
    assert torch.autograd.grad(loss.sum(), weight)[0].dtype == torch.float32


def test_no_block_of_logits_is_larger_than_allowed() -> None:
    index = torch.zeros(100_000, dtype=torch.int64)
    blocks = list(module._blocks(index, ((0, 1000),), torch.float32))
    assert max(len(b.tokens) for b in blocks) * 1000 * 4 <= module.BLOCK_BYTES
    assert sum(len(b.tokens) for b in blocks) == 100_000


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"target": torch.full((4,), 12)}, "target 12 of token 0 lies outside its slice"),
        ({"slice_index": torch.full((4,), 4)}, "slice_index holds 4; there are 4 slices"),
        ({"slices": ((0, 40),)}, "slice 0 is ids 0 to 40"),
        ({"target": torch.zeros(3, dtype=torch.int64)}, r"must be \[N\]"),
        ({"weight": torch.zeros(37, 6)}, r"hidden \[N D\]"),
    ],
)
def test_wrong_inputs_are_named(change: dict[str, object], message: str) -> None:
    hidden, weight, target, index = case(4, [0])
    right = {"hidden": hidden, "weight": weight, "target": target, "slice_index": index, "slices": SLICES}
    with pytest.raises(ValueError, match=message):
        sliced_cross_entropy(**{**right, **change})  # type: ignore[arg-type]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("width", [5, 192])
def test_both_backends_on_a_gpu(width: int, dtype: torch.dtype) -> None:
    """Against float64, with the error of the plain path on a CPU as the measure; a step repeats to the last bit."""
    slices = ((0, 301), (301, 303), (303, 900))
    index = torch.tensor([0, 2])[torch.randint(2, (517,))]  # one slice without tokens
    borders = torch.tensor(slices)[index]
    target = borders[:, 0] + (torch.rand(517) * (borders[:, 1] - borders[:, 0])).long()
    hidden, weight, scale = torch.randn(517, width).to(dtype), torch.randn(900, width).to(dtype), torch.rand(2, 517)

    def values(backend: str, device: str, dtype: torch.dtype) -> list[Tensor]:
        inputs = [x.to(device, dtype).requires_grad_() for x in (hidden, weight)]
        options = {"label_smoothing": 0.1, "z_loss": 0.3, "backend": backend}
        made = sliced_cross_entropy(*inputs, target.to(device), index.to(device), slices, **options)  # type: ignore[arg-type]
        total = sum((x * y).sum() for x, y in zip(made, scale.to(device, made[0].dtype)))
        return [x.detach().cpu().double() for x in (*made, *torch.autograd.grad(total, inputs))]  # type: ignore[arg-type]

    truth, plain = values("torch", "cpu", torch.float64), values("torch", "cpu", dtype)
    for backend in ("torch", "triton"):
        first, again = values(backend, "cuda", dtype), values(backend, "cuda", dtype)
        for number, (a, b, c) in enumerate(zip(first, plain, truth)):
            allowed = (2 if number < 2 else 3) * (b - c).norm() + 2 * torch.finfo(dtype).eps * c.norm()
            assert (a - c).norm() <= allowed, (backend, number)
        assert backend == "torch" or all(torch.equal(a, b) for a, b in zip(first, again))
