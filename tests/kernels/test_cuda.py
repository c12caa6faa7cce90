"""Building and loading the CUDA C++ kernels: what the compiler reports, and what the loader says where they cannot run."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from weft.kernels import cuda
from weft.kernels.rotary import qk_norm_rope, rope_table


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    if cuda.toolkit() is None:
        pytest.skip("no CUDA toolkit (nvcc) is installed")
    if torch.version.cuda is None:
        pytest.skip("this torch was built without CUDA")
    target = tmp_path_factory.mktemp("cuda") / "weft_cuda.so"
    return target, cuda.build(target, verbose=True)


def test_both_architectures_compile_without_spills(built: tuple[Path, str]) -> None:
    report = built[1]
    kernels = re.findall(r"Compiling entry function '(\w+)' for 'sm_(\w+)'", report)
    assert {arch for _, arch in kernels} == {"80", "90a"} and len(kernels) == 2 * 8  # 2 kernels, 2 widths, 2 types
    spilled = [int(n) for n in re.findall(r"(\d+) bytes spill", report)]
    assert len(spilled) == 2 * len(kernels) and not any(spilled)
    stacks = [int(n) for n in re.findall(r"(\d+) bytes stack frame", report)]
    assert not any(stacks)


def test_the_object_loads_and_declares_its_operators(built: tuple[Path, str]) -> None:
    """In a process of its own, because operators cannot be unloaded."""
    program = (
        "import torch; from weft.kernels import cuda; print(cuda.missing());"
        "print(torch.ops.weft_cuda.qk_norm_rope.default._schema);"
        "x = torch.empty(3, 2, 64, device='meta'); w = torch.empty(64, device='meta'); t = torch.empty(3, 32, device='meta');"
        "print(torch.ops.weft_cuda.qk_norm_rope(x, w, t, t, x, 1e-6, 1))"
    )
    environment = {**os.environ, cuda.VARIABLE: str(built[0])}
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, cwd=root)
    assert done.returncode == 0, done.stderr[-2000:]
    first, schema, fake = done.stdout.splitlines()
    assert first == "None" and schema.endswith("-> ()") and "Tensor(a!) y" in schema and fake == "None"


def test_a_missing_or_broken_object_is_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if torch.version.cuda is None:
        pytest.skip("this torch was built without CUDA")
    monkeypatch.setenv(cuda.VARIABLE, str(tmp_path / "none.so"))
    cuda.missing.cache_clear()
    assert "weft kernels build" in (cuda.missing() or "")
    (tmp_path / "none.so").write_text("not a shared object")
    cuda.missing.cache_clear()
    assert "does not load" in (cuda.missing() or "")
    cuda.missing.cache_clear()


def test_without_a_toolkit_building_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    with pytest.raises(cuda.BuildError, match="set CUDA_HOME"):
        cuda.build(tmp_path / "weft_cuda.so")


def test_tensors_on_a_cpu_are_refused() -> None:
    q, w = torch.zeros(3, 2, 64), torch.ones(64)
    table = rope_table(torch.zeros(3, 3, dtype=torch.int64), 64)
    with pytest.raises(RuntimeError, match="needs an NVIDIA GPU, found cpu"):
        cuda.qk_norm_rope(q, q, w, w, *table)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [64, 128])
def test_norm_and_rotation_on_a_gpu(width: int, dtype: torch.dtype) -> None:
    q, k = (torch.randn(301, heads, width, device="cuda", dtype=dtype, requires_grad=True) for heads in (7, 3))
    weights = [torch.rand(width, device="cuda", requires_grad=True) for _ in range(2)]
    table = rope_table(torch.randint(0, 900, (301, 3), device="cuda"), width)
    reason = cuda.supports(q, k, *weights)
    if reason:
        pytest.skip(reason)

    def results(function: object, dtype: torch.dtype) -> list[torch.Tensor]:
        inputs = [x.detach().to(dtype).requires_grad_() for x in (q, k, *weights)]
        out = function(*inputs, *table)  # type: ignore[operator]
        return [*(x.detach() for x in out), *torch.autograd.grad(sum((x * x.detach().cos()).sum() for x in out), inputs)]

    inputs = (q, k, *weights)
    out = cuda.qk_norm_rope(*inputs, *table)
    ours = [*(x.detach() for x in out), *torch.autograd.grad(sum((x * x.detach().cos()).sum() for x in out), inputs)]
    for a, b, c in zip(ours, results(qk_norm_rope, dtype), results(qk_norm_rope, torch.float64)):
        assert (a.double() - c).norm() <= 3 * (b.double() - c).norm() + 2 * torch.finfo(dtype).eps * c.norm()
