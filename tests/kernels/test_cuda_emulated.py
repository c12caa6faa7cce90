"""The CUDA C++ kernels compiled for the host and run on an emulator of warps, held against float64."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch import Tensor

from weft.kernels.cuda import SOURCES
from weft.kernels.rotary import qk_norm_rope

THREADS = 256
EPS = 1e-6


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("g++ is not installed")
    target = tmp_path_factory.mktemp("emulator") / "emulated.so"
    command = [compiler, "-O1", "-std=c++17", "-Wall", "-Werror", "-shared", "-fPIC", str(SOURCES / "emulate.cpp"), "-o"]
    done = subprocess.run([*command, str(target)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return ctypes.CDLL(str(target))


def pointer(x: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(x.data_ptr())


def case(tokens: int, heads: int, width: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """x [T H K] cut out of a wider tensor, weight, cos, sin and the gradient of the result."""
    fused = torch.randn(tokens, heads + 3, width).to(dtype)
    angle = torch.randn(tokens, width // 2, dtype=torch.float64) * 3
    grad = torch.randn(tokens, heads, width).to(dtype)
    return fused[:, 2 : 2 + heads], torch.rand(width) + 0.5, angle.cos().float(), angle.sin().float(), grad


def ours(library: ctypes.CDLL, blocks: int, seed: int, *tensors: Tensor) -> list[Tensor]:
    """Result, gradient of x and of the weight from the emulated kernels; everything they should write starts as NaN."""
    x, weight, cosine, sine, grad = tensors
    tokens, heads, width = x.shape
    kind = f"{width}_{'bf16' if x.dtype == torch.bfloat16 else 'float'}"
    y, dx = (torch.full(x.shape, float("nan"), dtype=x.dtype) for _ in range(2))
    parts = torch.full((blocks, width), float("nan"))
    tables = [pointer(t) for t in (weight, cosine, sine)]
    shape = (tokens, heads, ctypes.c_int64(x.stride(0)), ctypes.c_int64(x.stride(1)), ctypes.c_float(EPS), blocks)
    forward, backward = (getattr(library, f"norm_rope_{name}_{kind}") for name in ("forward", "backward"))
    forward.restype = backward.restype = ctypes.c_bool
    assert forward(pointer(x), *tables, pointer(y), *shape, ctypes.c_uint64(seed)), "the threads wait for each other"
    done = backward(pointer(grad), pointer(x), *tables, pointer(dx), pointer(parts), *shape, ctypes.c_uint64(seed))
    assert done, "the threads wait for each other"
    return [y, dx, parts.sum(0)]


def plain(x: Tensor, weight: Tensor, cosine: Tensor, sine: Tensor, grad: Tensor, dtype: torch.dtype) -> list[Tensor]:
    x, weight = x.detach().to(dtype).requires_grad_(), weight.to(dtype).requires_grad_()
    y = qk_norm_rope(x, x[:, :1], weight, weight, cosine.to(dtype), sine.to(dtype), EPS)[0]
    return [y.detach(), *torch.autograd.grad(y, (x, weight), grad.to(dtype))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    ("tokens", "heads", "width", "blocks"), [(7, 3, 64, 2), (5, 2, 128, 1), (1, 1, 128, 3), (23, 5, 64, 4)]
)
def test_norm_and_rotation(library: ctypes.CDLL, tokens: int, heads: int, width: int, blocks: int, dtype: torch.dtype) -> None:
    tensors = case(tokens, heads, width, dtype)
    truth, rounded = plain(*tensors, torch.float64), plain(*tensors, dtype)
    for number, (a, b, c) in enumerate(zip(ours(library, blocks, 1, *tensors), rounded, truth)):
        allowed = (2 if number == 0 else 3) * (b.double() - c).norm() + 2 * torch.finfo(a.dtype).eps * c.norm()
        assert (a.double() - c).norm() <= allowed, f"output {number}"


def test_the_order_of_threads_changes_nothing(library: ctypes.CDLL) -> None:
    """A missing barrier would read what another thread has not written yet (NaN) under some order."""
    tensors = case(11, 3, 64, torch.float32)
    first, *others = (ours(library, 2, seed, *tensors) for seed in range(4))
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other))


def test_a_missing_barrier_is_seen(tmp_path: Path) -> None:
    """The same source without its block barrier gives NaN: the test above can fail."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("g++ is not installed")
    for name in ("prim.cuh", "emulator.cuh", "emulate.cpp", "norm_rope.cuh"):
        text = (SOURCES / name).read_text()
        if name == "norm_rope.cuh":
            assert text.count("  sync_block();\n") == 1
            text = text.replace("  sync_block();\n", "")
        (tmp_path / name).write_text(text)
    target = tmp_path / "broken.so"
    command = [compiler, "-O1", "-std=c++17", "-shared", "-fPIC", str(tmp_path / "emulate.cpp"), "-o", str(target)]
    subprocess.run(command, check=True)
    broken = ctypes.CDLL(str(target))
    results = [ours(broken, 2, seed, *case(11, 3, 64, torch.float32))[2] for seed in range(3)]
    assert any(bool(result.isnan().any()) for result in results)
