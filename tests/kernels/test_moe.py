"""Laws of the routed experts' product, whatever backend runs it, and of the choice between backends."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.routed import SIZES, Size, gradients, hold, inputs, one_by_one, wide
from weft.kernels.choice import ChoiceError
from weft.kernels.moe import CHOICE, MoEError, moe_ffn, why


@pytest.mark.parametrize("name", SIZES)
def test_it_is_the_definition(name: str) -> None:
    given = inputs(SIZES[name], torch.float64)
    grad = torch.randn(SIZES[name].tokens, SIZES[name].width, dtype=torch.float64)
    for a, b in zip(*(gradients(f(*given), given, grad) for f in (moe_ffn, one_by_one))):
        torch.testing.assert_close(a, b)


def test_gradcheck() -> None:
    x, weight, expert, gate_up, down = inputs(Size(5, 3, 2, width=4, hidden=3), torch.float64)
    call = lambda x, w, a, b: moe_ffn(x, w, expert, a, b)  # noqa: E731
    assert torch.autograd.gradcheck(call, (x, weight, gate_up, down))


def test_the_choice_is_forced_by_argument_then_context_then_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WEFT_MOE", raising=False)
    given = inputs(SIZES["two of five"], torch.float32)
    moe_ffn(*given)
    monkeypatch.setenv("WEFT_MOE", "triton")
    with pytest.raises(ChoiceError, match="NVIDIA GPU"):
        moe_ffn(*given)
    moe_ffn(*given, backend="torch")
    with CHOICE.use("torch"):
        moe_ffn(*given)
    monkeypatch.setenv("WEFT_MOE", "quick")
    with pytest.raises(ChoiceError, match="'quick' is unknown"):
        moe_ffn(*given)


def test_a_backend_that_cannot_run_is_an_error_and_says_why() -> None:
    given = inputs(SIZES["two of five"], torch.float32)
    reasons = dict(why(given[0], *given[3:]))
    assert reasons["torch"] == "runs" and "needs an NVIDIA GPU, found cpu" in reasons["triton"]
    with pytest.raises(ChoiceError, match="'triton' was asked for but needs an NVIDIA GPU"):
        moe_ffn(*given, backend="triton")
    assert "float64" in dict(why(*(x.double() for x in (given[0], *given[3:]))))["triton"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({0: torch.zeros(18, 24)}, r"x \[T D\], weight and expert \[T S\]"),
        ({1: torch.zeros(19, 3)}, r"weight \(19, 3\)"),
        ({3: torch.zeros(5, 32, 23)}, r"gate_up \[E 2F D\]"),
        ({4: torch.zeros(4, 24, 16)}, r"down \(4, 24, 16\)"),
    ],
)
def test_wrong_shapes_are_named(change: dict[int, torch.Tensor], message: str) -> None:
    given = [change.get(i, x) for i, x in enumerate(inputs(SIZES["two of five"], torch.float32))]
    with pytest.raises(MoEError, match=message):
        moe_ffn(*given)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_backends_on_a_gpu(backend: str, name: str, dtype: torch.dtype) -> None:
    size = SIZES[name]
    given = inputs(size, dtype, "cuda")
    grad = torch.randn(size.tokens, size.width, device="cuda").to(dtype)
    exact, on_cpu = wide(given), [x.detach().cpu().requires_grad_(x.requires_grad) for x in given]
    truth = gradients(one_by_one(*exact), exact, grad)
    plain = [x.cuda() for x in gradients(moe_ffn(*on_cpu), on_cpu, grad.cpu())]
    first, again = (gradients(moe_ffn(*given, backend=backend), given, grad) for _ in range(2))
    hold(first, plain, truth)
    assert all(torch.equal(a, b) for a, b in zip(first, again)), "a step repeats to the last bit"
