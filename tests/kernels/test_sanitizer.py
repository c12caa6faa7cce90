"""Checkers of memory, races and barriers over small calls of every GPU kernel (NVIDIA's compute-sanitizer; needs a GPU)."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.kernels.sanitized import BROKEN, PROGRAMS
from weft.benchmarks.speed.gpu_attention import LIBRARIES
from weft.kernels import cuda
from weft.kernels.attention import BACKENDS

ROOT = Path(__file__).parents[2]
FOUND = 86  # exit status that we ask for where the checker found something


def sanitizer() -> str | None:
    """Path of compute-sanitizer, beside nvcc or on the PATH."""
    home = cuda.toolkit()
    beside = home / "bin" / "compute-sanitizer" if home else None
    return str(beside) if beside is not None and beside.exists() else shutil.which("compute-sanitizer")


def command(tool: str, name: str, program: str) -> list[str]:
    """The checker around one program; a compiler that Triton starts is not checked."""
    options = ["--tool", name, "--error-exitcode", str(FOUND), "--target-processes", "application-only"]
    return [tool, *options, sys.executable, "-m", "tests.kernels.sanitized", program]


def check(name: str, program: str) -> subprocess.CompletedProcess[str]:
    tool = sanitizer()
    if tool is None:
        pytest.skip("compute-sanitizer is not installed (it comes with the CUDA toolkit)")
    # without torch's cache of memory each tensor is an allocation of its own, so that an overrun leaves it
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    return subprocess.run(command(tool, name, program), cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.mark.gpu
@pytest.mark.timeout(600)
@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "synccheck"])
@pytest.mark.parametrize("program", [name for name in PROGRAMS if name != BROKEN])
def test_checkers_find_nothing(program: str, tool: str) -> None:
    done = check(tool, program)
    if "skip " in done.stdout:
        pytest.skip(done.stdout[done.stdout.index("skip ") + 5 :].splitlines()[0])
    assert done.returncode == 0 and "done" in done.stdout, done.stdout[-4000:] + done.stderr[-1000:]


@pytest.mark.gpu
@pytest.mark.timeout(600)
def test_the_memory_checker_sees_an_overrun() -> None:
    assert check("memcheck", BROKEN).returncode != 0


def test_every_kernel_has_a_program_that_is_checked() -> None:
    line = command("compute-sanitizer", "racecheck", "triton loss")
    assert line[:3] == ["compute-sanitizer", "--tool", "racecheck"] and line[-1] == "triton loss" and str(FOUND) in line
    ours = {f"{name} attention" for name in BACKENDS if name not in LIBRARIES}
    assert ours | {"triton loss", "triton experts", "cuda norm", "cuda decode"} <= set(PROGRAMS)
