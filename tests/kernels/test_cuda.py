"""Building and loading the CUDA C++ kernels: what the compiler reports, and what the loader says where they cannot run."""

from __future__ import annotations

import hashlib
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
def built(request: pytest.FixtureRequest) -> tuple[Path, str]:
    """The shared object and what the compiler said of it; made once per state of the sources."""
    home = cuda.toolkit()
    if home is None:
        pytest.skip("no CUDA toolkit (nvcc) is installed")
    if torch.version.cuda is None:
        pytest.skip("this torch was built without CUDA")
    texts = [path.read_bytes() for path in sorted(cuda.SOURCES.glob("*.cu*"))]
    state = [*map(str.encode, cuda.build_command(Path("target"), home)), torch.__version__.encode(), *texts]
    target = request.config.cache.mkdir("cuda-build") / f"{hashlib.sha256(bytes(1).join(state)).hexdigest()[:24]}.so"
    report = target.with_suffix(".txt")
    if not (target.exists() and report.exists()):
        report.write_text(cuda.build(target, verbose=True))
    return target, report.read_text()


def spilled(report: str) -> list[str]:
    """Kernels of a ptxas report that keep something in local memory, with their architecture."""
    numbers = r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
    found = re.findall(r"Compiling entry function '(\w+)' for 'sm_(\w+)'.*?" + numbers, report, re.DOTALL)
    assert len(found) == report.count("Compiling entry function")
    return [f"{name} for sm_{arch}" for name, arch, *bytes_of in found if any(map(int, bytes_of))]


def kernels(report: str) -> dict[str, int]:
    """Kernels per architecture."""
    arches = re.findall(r"Compiling entry function '\w+' for 'sm_(\w+)'", report)
    return {arch: arches.count(arch) for arch in set(arches)}


def test_every_kernel_compiles_without_spills(built: tuple[Path, str]) -> None:
    count = kernels(built[1])
    assert set(count) == {"80", "90a"} and count["80"] == count["90a"] >= 12 + 6 + 12 + 1  # norm, store, decode, advance
    assert spilled(built[1]) == []


def test_the_object_loads_and_declares_its_operators(built: tuple[Path, str]) -> None:
    """In a process of its own, because operators cannot be unloaded."""
    program = (
        "import torch; from weft.kernels import cuda; print(cuda.missing());"
        "print(torch.ops.weft_cuda.qk_norm_rope.default._schema);"
        "x = torch.empty(3, 2, 64, device='meta'); w = torch.empty(64, device='meta'); t = torch.empty(3, 32, device='meta');"
        "print(torch.ops.weft_cuda.qk_norm_rope(x, w, t, t, x, 1e-6, 1));"
        "n = torch.empty(3, device='meta', dtype=torch.int32); r = torch.empty(1, 7, device='meta', dtype=torch.int32);"
        "print(torch.ops.weft_cuda.attention_forward(x, x, x, n, n, n, r, x, w, 1.0, 128, 64))"
    )
    environment = {**os.environ, cuda.VARIABLE: str(built[0])}
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, cwd=root)
    assert done.returncode == 0, done.stderr[-2000:]
    first, schema, *fakes = done.stdout.splitlines()
    assert first == "None" and schema.endswith("-> ()") and "Tensor(a!) y" in schema and fakes == ["None", "None"]


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
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
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
