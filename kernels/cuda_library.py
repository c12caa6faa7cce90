"""The CUDA C++ kernels: find, build and load them. `cuda.py` and its neighbours make torch functions of what is loaded.

In: the sources in `csrc/`. Out: one shared object on torch's stable ABI (torch 2.11 and later, any CPython), loaded when it is
first needed, with the operators `torch.ops.weft_cuda.*`. `missing()` says why they cannot be used here. Nothing is compiled
without being asked for: by `weft kernels build`, or by setup.py (which reads this file alone) as docs/kernels.md describes.
"""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
from pathlib import Path

import torch

SOURCES = Path(__file__).resolve().parent / "csrc"
LIBRARY = "weft_cuda.so"
VARIABLE = "WEFT_CUDA_LIBRARY"
ARCHITECTURES = ("80", "90a")
OLDEST_TORCH = "0x020b000000000000"  # 2.11: the stable ABI that the object asks for
OPERATORS = (
    "qk_norm_rope", "qk_norm_rope_backward", "norm_rope_store", "decode_step", "decode_advance",
    "attention_forward", "attention_share", "attention_query_grad", "attention_key_grad",
    "attention_hopper",
)  # fmt: skip


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
    options = ["-std=c++17", "-O3", "-Xcompiler", "-fPIC", "-shared", "-cudart", "static", "-DUSE_CUDA", "--threads", "0"]
    options += [f"-DTORCH_TARGET_VERSION={OLDEST_TORCH}", f"-I{folder}/include", *(["-Xptxas", "-v"] if verbose else [])]
    sources = [str(path) for path in sorted(SOURCES.glob("*.cu"))]
    libraries = [f"-L{folder}/lib", "-ltorch_cuda", "-ltorch_cpu", "-ltorch", "-lc10"]
    return [str(home / "bin" / "nvcc"), *arches, *options, *sources, *libraries, "-o", str(target)]


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


def _register_fakes() -> None:
    """The operators only write into their arguments: on fake tensors there is nothing to do."""
    for name in OPERATORS:
        torch.library.register_fake(f"weft_cuda::{name}", lambda *args: None)
