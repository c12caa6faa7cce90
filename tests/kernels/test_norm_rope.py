"""QK-norm with rotation as operators: right on any device, differentiable, and whole under torch.compile."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from weft.kernels import cuda, norm_rope, rotary
from weft.kernels.choice import ChoiceError

T, H, G, K, EPS = 7, 3, 2, 64, 1e-6


def inputs(dtype: torch.dtype = torch.float32, grad: bool = False) -> tuple[Tensor, ...]:
    """q [T H K] and k [T G K] cut out of one tensor, weights, cos and sin."""
    fused = torch.randn(T, H + 2 * G, K, dtype=dtype)
    q, k = (x.detach().requires_grad_(grad) for x in (fused[:, :H], fused[:, H : H + G]))
    weights = [(torch.rand(K, dtype=dtype) + 0.5).requires_grad_(grad) for _ in range(2)]
    return q, k, *weights, *rotary.rope_table(torch.randint(0, 99, (T, 3)), K)


def operator(q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    return cuda.norm_rope(q, q_weight, cos, sin, EPS), cuda.norm_rope(k, k_weight, cos, sin, EPS)


def test_the_operator_and_its_gradients_are_the_references() -> None:
    tensors = inputs(torch.float64, grad=True)
    table = [x.double() for x in tensors[4:]]
    results = []
    for function in (operator, rotary.qk_norm_rope):
        out = function(*tensors[:4], *table)
        loss = sum((x * x.detach().cos()).sum() for x in out)
        results.append([*out, *torch.autograd.grad(loss, tensors[:4])])
    for ours, theirs in zip(*results):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # by opcheck itself
def test_operators_pass_torchs_checks() -> None:
    q, k, weight, _, cos, sin = inputs(grad=True)
    torch.library.opcheck(torch.ops.weft.norm_rope.default, (q, weight, cos, sin, EPS))
    torch.library.opcheck(torch.ops.weft.norm_rope_backward.default, (q.detach(), q.detach(), weight.detach(), cos, sin, EPS))
    slot = torch.tensor([3, 0, -1, 7, 1, 2, 9])
    plain = (k.detach(), k.detach() + 1, weight.detach(), cos, sin, slot, torch.zeros(2, 2, G, 5, K), EPS)
    torch.library.opcheck(torch.ops.weft.norm_rope_store.default, plain)


def test_a_compiled_caller_keeps_one_graph() -> None:
    """With the CUDA kernel forced: what is compiled is the operator, here on a CPU, and nothing breaks the graph."""
    tensors = inputs(grad=True)

    def loss(*tensors: Tensor) -> Tensor:
        q, k = norm_rope.qk_norm_rope(*tensors, EPS)
        return (q * q.cos()).sum() + (k * k.cos()).sum()

    with norm_rope.CHOICE.use("cuda"):
        compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")(*tensors)
    ours = [compiled, *torch.autograd.grad(compiled, tensors[:4])]
    plain = loss(*tensors)
    for a, b in zip(ours, [plain, *torch.autograd.grad(plain, tensors[:4])]):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_fakes_know_shape_type_and_device() -> None:
    """As torch.compile sees the operators on a GPU that is not here."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        fused = torch.empty(T, H + 2 * G, K, device="cuda", dtype=torch.bfloat16)
        x, weight, table = fused[:, :H], torch.empty(K, device="cuda"), torch.empty(T, K // 2, device="cuda")
        y = cuda.norm_rope(x, weight, table, table, EPS)
        assert y.shape == x.shape and y.dtype == x.dtype and y.device.type == "cuda" and y.is_contiguous()
        dx, dw = torch.ops.weft.norm_rope_backward(y, x, weight, table, table, EPS)
        assert dx.shape == x.shape and dx.is_contiguous() and dw.shape == weight.shape and dw.dtype == weight.dtype
        pool = torch.empty(4, 2, H, 16, K, device="cuda", dtype=torch.bfloat16)
        slot = torch.zeros(T, dtype=torch.int64, device="cuda")
        assert cuda.norm_rope_store(x, x, weight, table, table, slot, pool, EPS).shape == x.shape


def test_auto_is_torch_and_the_kernel_must_be_able() -> None:
    from weft.model.attention import Attention
    from weft.model.config import ModelConfig

    tensors = inputs()
    for a, b in zip(norm_rope.qk_norm_rope(*tensors, EPS), rotary.qk_norm_rope(*tensors, EPS)):
        torch.testing.assert_close(a, b)
    layer, x = Attention(ModelConfig(vocab_size=11)), torch.randn(T, 256)
    layer.project(x, tensors[4:])
    with norm_rope.CHOICE.use("cuda"), pytest.raises(RuntimeError, match="needs an NVIDIA GPU, found cpu"):
        layer.project(x, tensors[4:])
    with pytest.raises(ChoiceError, match="choose one of auto, torch, cuda"):
        norm_rope.qk_norm_rope(*tensors, EPS, implementation="cudnn")
