"""The CUDA C++ kernels: find, build and load them, and use them where they can run.

In: the sources in `csrc/`. Out: one shared object on torch's stable ABI (torch 2.11 and later, any CPython), loaded when it is
first needed; its operators `torch.ops.weft_cuda.*`; and `qk_norm_rope`, with the arguments of `rotary.qk_norm_rope`.
`missing()` says why they cannot be used here. Nothing is compiled without being asked for: by `weft kernels build`, or by
setup.py as docs/kernels.md describes.

Axes: `T tokens  H heads  G kv heads  K head width`.
"""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

SOURCES = Path(__file__).resolve().parent / "csrc"
LIBRARY = "weft_cuda.so"
VARIABLE = "WEFT_CUDA_LIBRARY"
ARCHITECTURES = ("80", "90a")
OLDEST_TORCH = "0x020b000000000000"  # 2.11: the stable ABI that the object asks for
WIDTHS = (64, 128)
BLOCKS_PER_PROCESSOR = 4  # not measured


class BuildError(OSError):
    """The CUDA kernels could not be compiled."""


def library_path() -> Path:
    """Where the shared object lies or would be built: WEFT_CUDA_LIBRARY, beside the sources, or in the user's cache."""
    if os.environ.get(VARIABLE):
        return Path(os.environ[VARIABLE])
    beside = SOURCES / LIBRARY
    if beside.exists() or os.access(SOURCES, os.W_OK):
        return beside
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "weft" / LIBRARY


def toolkit() -> Path | None:
    """The CUDA toolkit's folder: CUDA_HOME, else the newest /usr/local/cuda*, else the one around nvcc; None without nvcc."""
    named = os.environ.get("CUDA_HOME")
    if named:
        folders = [Path(named)]
    else:
        folders = sorted(Path("/usr/local").glob("cuda*"), reverse=True)
        found = shutil.which("nvcc")
        folders += [Path(found).resolve().parents[1]] if found else []
    return next((folder for folder in folders if (folder / "bin" / "nvcc").exists()), None)


def build_command(target: Path, home: Path, verbose: bool = False, torch_folder: Path | None = None) -> list[str]:
    """The nvcc call that makes the shared object for sm_80 and sm_90a (sm_80 code also runs on 8.6 and 8.9)."""
    folder = torch_folder or Path(torch.__file__).parent
    arches = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in ARCHITECTURES]
    options = ["-std=c++17", "-O3", "-Xcompiler", "-fPIC", "-shared", "-cudart", "static", "-DUSE_CUDA"]
    options += [f"-DTORCH_TARGET_VERSION={OLDEST_TORCH}", f"-I{folder}/include", *(["-Xptxas", "-v"] if verbose else [])]
    libraries = [f"-L{folder}/lib", "-ltorch_cuda", "-ltorch_cpu", "-ltorch", "-lc10"]
    return [str(home / "bin" / "nvcc"), *arches, *options, str(SOURCES / "ops.cu"), *libraries, "-o", str(target)]


def build(target: Path | None = None, verbose: bool = False) -> str:
    """Compile the kernels to `target` (default: `library_path()`) and return what the compiler said. Raises BuildError."""
    target, home = target or library_path(), toolkit()
    if home is None:
        raise BuildError("no CUDA toolkit found: install one (13.0 was tried) and set CUDA_HOME to its folder")
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_suffix(f".{os.getpid()}.part")
    done = subprocess.run(build_command(part, home, verbose), capture_output=True, text=True)
    if done.returncode:
        part.unlink(missing_ok=True)
        raise BuildError(f"nvcc in {home} could not compile the kernels: {done.stderr[-2000:] or done.stdout[-2000:]}")
    part.replace(target)  # a process that has the old one open keeps it
    return done.stdout + done.stderr


@functools.cache
def missing() -> str | None:
    """None if the operators are loaded, else the reason. Asked once per process."""
    if torch.version.cuda is None:
        return "this torch was built without CUDA"
    path = library_path()
    if not path.exists():
        return f"{path} does not exist; build it with `weft kernels build`"
    try:
        torch.ops.load_library(str(path))
    except (OSError, RuntimeError) as error:
        return f"{path} does not load ({str(error).splitlines()[0]}); build it again with `weft kernels build`"
    _register_fakes()
    return None


def supports(q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor) -> str | None:
    """None if `qk_norm_rope` can run, else the reason."""
    if q.device.type != "cuda":
        return f"needs an NVIDIA GPU, found {q.device.type}"
    if torch.cuda.get_device_capability(q.device) < (8, 0):
        return "needs compute capability 8.0"
    if q.dtype not in (torch.float32, torch.bfloat16) or q.dtype != k.dtype:
        return f"computes in float32 or bfloat16, found {q.dtype} and {k.dtype}"
    if q.shape[-1] not in WIDTHS:
        return f"needs a head width of 64 or 128, found {q.shape[-1]}"
    return missing()


def qk_norm_rope(
    q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """RMSNorm over the head width, then rotation, in one pass over memory each. q [T H K], k [T G K], weights [K], cos and sin
    [T K/2]. Raises RuntimeError where `supports` gives a reason."""
    reason = supports(q, k, q_weight, k_weight)
    if reason:
        raise RuntimeError(f"the CUDA kernel for QK-norm and rotation {reason}")
    return _NormRope.apply(q, q_weight, cos, sin, eps), _NormRope.apply(k, k_weight, cos, sin, eps)


class _NormRope(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, eps: float) -> Tensor:
        x = x if x.stride(-1) == 1 else x.contiguous()
        tables = weight.float().contiguous(), cos.float().contiguous(), sin.float().contiguous()
        y = torch.empty_like(x, memory_format=torch.contiguous_format)
        torch.ops.weft_cuda.qk_norm_rope(x, *tables, y, eps, _blocks(x))
        ctx.save_for_backward(x, *tables)
        ctx.eps, ctx.weight_dtype = eps, weight.dtype
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, *tables = ctx.saved_tensors
        dx = torch.empty_like(x, memory_format=torch.contiguous_format)
        parts = x.new_zeros((_blocks(x), x.shape[-1]), dtype=torch.float32)
        torch.ops.weft_cuda.qk_norm_rope_backward(grad.contiguous(), x, *tables, dx, parts, ctx.eps)
        return dx, parts.sum(0).to(ctx.weight_dtype), None, None, None


def _blocks(x: Tensor) -> int:
    """Blocks of eight warps that fill the GPU, no more than there are rows."""
    rows = -(-x.shape[0] * x.shape[1] // 8)
    return max(1, min(rows, BLOCKS_PER_PROCESSOR * torch.cuda.get_device_properties(x.device).multi_processor_count))


def _register_fakes() -> None:
    """The operators only write into their arguments: on fake tensors there is nothing to do."""
    for name in ("qk_norm_rope", "qk_norm_rope_backward"):
        torch.library.register_fake(f"weft_cuda::{name}", lambda *args: None)
