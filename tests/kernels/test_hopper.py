"""The attention forward pass for Hopper without a GPU: emulated and held against float64, and its machine code read."""

from __future__ import annotations

import ctypes
import hashlib
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.kernels import emulated
from tests.kernels.emulated import BAND, Call, Fault, banded
from tests.kernels.test_attention import LAYOUTS, build, hold, inputs, results
from weft.kernels import cuda_library
from weft.kernels.attention import ORDER, attention, why
from weft.kernels.cuda_library import SOURCES
from weft.kernels.hopper_attention import OWN, STEP, _forward, _plan, run
from weft.kernels.layout import StreamLayout

QUICK = ("one token", "documents", "window", "landmarks", "images larger than the window", "last medium only", "an empty row")


def compiled(cache: Path, changes: dict[str, tuple[str, str]] | None = None, optimise: str = "-O2") -> ctypes.CDLL:
    """The emulated kernel, compiled once per state of the sources. changes: file -> (text, what to put in its place, once)."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("g++ is not installed")
    texts = {path.name: path.read_text() for path in SOURCES.glob("*.cuh")}
    texts["emulate_hopper.cpp"] = (SOURCES / "emulate_hopper.cpp").read_text()
    for name, (old, new) in (changes or {}).items():
        assert texts[name].count(old) == 1, f"{old!r} is not once in {name}"
        texts[name] = texts[name].replace(old, new)
    state = chr(0).join([optimise, *(f"{name}\0{texts[name]}" for name in sorted(texts))])
    target = cache / f"{hashlib.sha256(state.encode()).hexdigest()[:24]}.so"
    if not target.exists():
        folder = cache / f"{target.stem}.{os.getpid()}"
        folder.mkdir(parents=True)
        for name, text in texts.items():
            (folder / name).write_text(text)
        command = [compiler, optimise, "-std=c++17", "-Wall", *(() if changes else ("-Werror",)), "-shared", "-fPIC"]
        done = subprocess.run(
            [*command, str(folder / "emulate_hopper.cpp"), "-o", str(folder / "part.so")], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr[-4000:]
        (folder / "part.so").replace(target)
        shutil.rmtree(folder)
    library = ctypes.CDLL(str(target))
    library.hopper_emulated.restype = ctypes.c_bool
    library.hopper_emulated.argtypes = [
        ctypes.c_bool, ctypes.c_int, Call, ctypes.c_void_p, ctypes.c_int, ctypes.c_uint64,
    ]  # fmt: skip
    library.emulator_fault.restype = ctypes.c_char_p
    return library


class Emulator:
    """The operator `weft_cuda::attention_hopper` for CPU tensors."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self.library, self.seed = library, 1

    def sizes(self, width: int) -> list[int]:
        """Queries of a block, keys of a step, bytes of shared memory."""
        numbers = (ctypes.c_int * 3)()
        self.library.hopper_emulated_sizes(width, numbers)
        return list(numbers)

    def attention_hopper(
        self, q: Tensor, k: Tensor, v: Tensor, first: Tensor, last: Tensor, at: Tensor, table: Tensor, lives: Tensor,
        out: Tensor, lse: Tensor, scale: float, own: int, step: int,
    ) -> None:  # fmt: skip
        assert [own, step] == self.sizes(q.shape[2])[:2], "the plan was made for other tiles"
        read = {"q": banded(q), "k": banded(k), "v": banded(v)}
        written = {name: banded(torch.full_like(x, float("nan"))) for name, x in (("result", out), ("lse", lse))}
        whole = {"first": first, "last": last, "at": at, "table": table}
        call = Call(**{name: x.data_ptr() for name, x in (read | written | whole).items()})
        for name in ("q", "k", "v"):
            setattr(call, f"{name}_t", read[name].stride(0))
            setattr(call, f"{name}_h", read[name].stride(1))
        call.total, call.heads, call.group, call.scale = len(q), q.shape[1], q.shape[1] // k.shape[1], scale
        blocks = len(table) * q.shape[1]
        if not self.library.hopper_emulated(q.dtype == torch.float16, q.shape[2], call, lives.data_ptr(), blocks, self.seed):
            raise Fault(self.library.emulator_fault().decode())
        for name, x in (("result", out), ("lse", lse)):
            around = written[name].as_strided((2, BAND), (BAND + x.numel(), 1), 0)
            assert bool(around.isnan().all()), f"wrote outside {name}"
            x.copy_(written[name])


@contextmanager
def operators(library: ctypes.CDLL) -> Iterator[Emulator]:
    """While this lasts `weft_cuda::attention_hopper` runs on the emulator for CPU tensors, with the C++ source's schema."""
    emulator = Emulator(library)
    text = (SOURCES / "attention_hopper_ops.cu").read_text()
    (schema,) = ["".join(re.findall(r'"([^"]*)"', found)) for found in re.findall(r"m\.def\(([^;]*)\);", text)]
    fragment: Any = torch.library.Library("weft_cuda", "FRAGMENT")
    if cuda_library.missing() is not None:
        fragment.define(schema)
    fragment.impl("attention_hopper", emulator.attention_hopper, "CPU")
    try:
        yield emulator
    finally:
        fragment._destroy()


@pytest.fixture(scope="module")
def cache(request: pytest.FixtureRequest) -> Path:
    return request.config.cache.mkdir("emulated-hopper")


@pytest.fixture(scope="module")
def emulator(cache: Path) -> Iterator[Emulator]:
    with operators(compiled(cache)) as emulator:
        yield emulator


def ours(layout: StreamLayout, q: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
    out, lse = run(q.detach(), k.detach(), v.detach(), layout, q.shape[2] ** -0.5, True)
    assert lse is not None
    return [out, lse]


def compare(layout: StreamLayout, heads: tuple[int, int, int], dtype: torch.dtype) -> None:
    q, k, v, _ = inputs(layout, heads, dtype)
    out, lse = ours(layout, q, k, v)
    exact = [x.detach().double() for x in (q, k, v)]
    truth, expect = attention(*exact, layout, backend="reference", return_lse=True)
    plain = attention(q.detach(), k.detach(), v.detach(), layout, backend="reference")
    hold([out], [plain], [truth])
    torch.testing.assert_close(lse, expect.float(), atol=2e-5, rtol=0)  # products of 16-bit numbers are exact in float


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in LAYOUTS])
def test_every_layout(emulator: Emulator, name: str) -> None:
    compare(LAYOUTS[name]("cpu"), (2, 1, 64), torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_the_wider_head(emulator: Emulator, dtype: torch.dtype) -> None:
    compare(LAYOUTS["landmarks"]("cpu"), (2, 2, 128), dtype)


def test_rings_of_buffers_wrap(emulator: Emulator) -> None:
    """More steps than buffers, full ones among them, and landmarks in more than one step, at both widths."""
    compare(build([900], None), (1, 1, 64), torch.float16)
    compare(build([700], 200, landmarks=0.5), (1, 1, 128), torch.bfloat16)


def test_the_order_of_threads_changes_nothing(emulator: Emulator) -> None:
    layout = build([200, 101], 130, landmarks=0.4, blocks=0.3)
    q, k, v, _ = inputs(layout, (1, 1, 64), torch.bfloat16)
    found = []
    for emulator.seed in range(2, 6):
        found.append(ours(layout, q, k, v))
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other))


def test_strided_inputs(emulator: Emulator) -> None:
    """q, k, v cut out of one projection are read in place; other strides are copied."""
    layout = build([141], 9)
    parts = torch.randn(141, 4, 64).half().split([2, 1, 1], 1)
    turned = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in parts]
    first, *others = (run(*x, layout, 0.1)[0] for x in (parts, turned, [x.contiguous() for x in parts]))
    assert all(torch.equal(first, other) for other in others)


def test_sizes_are_those_of_the_plan_and_fit(emulator: Emulator) -> None:
    for width in (64, 128):
        *found, shared = emulator.sizes(width)
        assert found == [OWN, STEP]
        assert shared <= 227 * 1024, "what a block may have on sm_90 (CUDA programming guide, compute capabilities)"


KERNEL, WAIT_V, LET_GO_V = (
    "attention_hopper.cuh",
    "    wait(memory.v_full + i % S::STAGES, i / S::STAGES & 1);\n",
    "    wait_products<0>();\n    hold(out[0]);\n    let_go(memory.v_empty + (i - 1) % S::STAGES);\n",
)
MISTAKES = {
    "keys are read before they arrive": (KERNEL, "    wait(memory.k_full + stage, i / S::STAGES & 1);\n", ""),
    "values are read before they arrive": (KERNEL, WAIT_V, ""),
    "keys are overwritten while they are read": (KERNEL, "    wait(memory.k_empty + stage, parity);\n", ""),
    "values are let go of too early": (KERNEL, LET_GO_V, "".join(reversed(LET_GO_V.splitlines(keepends=True)))),
    "scores are looked at before they are there": (KERNEL, "wait_products<1>();", ""),
    "sums are stored before they are there": (
        KERNEL, "  meet_values(walk.tiles - 1);\n  wait_products<0>();", "  meet_values(walk.tiles - 1);",
    ),
    "no fence": (KERNEL, "    fence_products();\n    start_scores", "    start_scores"),
    "bytes are not announced": (KERNEL, "S::TILE * 2 + (mask ? 2 * S::STEP * 4 : 0)", "S::TILE * 2"),
    "an arrival too few": (KERNEL, "make_barrier(v_empty + i, 4 * HOPPER_GROUPS)", "make_barrier(v_empty + i, 9)"),
    "the wrong parity": (KERNEL, "parity = (i / S::STAGES & 1) ^ 1", "parity = i / S::STAGES & 1"),
    "chunks of channels are mixed up": (KERNEL, "16 * N * 64 * 2)", "8 * N * 64 * 2)"),
    "half of a warp leaves": (KERNEL, "  clear(out);\n", "  clear(out);\n  if (thread_index() % 32 > 15) return;\n"),
    "landmarks are not permuted": ("attention_tiles.cuh", "((piece ^ (row & 7)) << 3)", "(piece << 3)"),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_seen(emulator: Emulator, cache: Path, mistake: str) -> None:
    """The tests above can fail: each of these mistakes gives a fault, NaN or other numbers."""
    name, old, new = MISTAKES[mistake]
    layout = build([600], 300, landmarks=0.5)
    q, k, v, _ = inputs(layout, (1, 1, 128), torch.bfloat16)
    right, truth, seen = emulator.library, ours(layout, q, k, v), False
    emulator.library = compiled(cache, {name: (old, new)}, "-O1")
    try:
        for emulator.seed in range(3):
            seen |= any(not torch.equal(a, b) for a, b in zip(truth, ours(layout, q, k, v)))
    except Fault:
        seen = True
    finally:
        emulator.library = right
    assert seen


@pytest.mark.slow
def test_machine_code(cache: Path) -> None:
    """No spills, products of warp groups and the copy engine in every kernel, products not serialised by the compiler."""
    home = cuda_library.toolkit()
    if home is None:
        pytest.skip("no CUDA toolkit (nvcc) is installed")
    kernels = "".join(
        f"template __global__ void attention_hopper<{t}, {d}>(const __grid_constant__ HopperCall);\n"
        for t in ("bf16", "fp16")
        for d in (64, 128)
    )
    source, cubin = cache / "hopper.cu", cache / "hopper.cubin"
    source.write_text(f'#include "attention_hopper.cuh"\n{kernels}')
    command = [str(home / "bin/nvcc"), "-std=c++17", "-O3", "-cubin", "-gencode=arch=compute_90a,code=sm_90a", f"-I{SOURCES}"]
    done = subprocess.run([*command, "-Xptxas", "-v", str(source), "-o", str(cubin)], capture_output=True, text=True)
    report = done.stdout + done.stderr
    assert done.returncode == 0, report[-4000:]
    spills = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", report)
    assert spills == [("0", "0", "0")] * 4 and "serialized" not in report, report
    tool = Path(pytest.importorskip("triton").__file__).parent / "backends/nvidia/bin/cuobjdump"
    code = subprocess.run([tool, "-sass", cubin], capture_output=True, text=True, check=True).stdout
    functions = code.split("Function : ")[1:]
    assert len(functions) == 4
    for function in functions:
        for instruction in (r"\bHGMMA\.64x128x16", r"\bUTMALDG\.3D", r"\bUBLKCP\b", r"\bUSETMAXREG\b", r"\bSYNCS\.PHASECHK"):
            assert re.search(instruction, function), instruction
        assert not re.search(r"\b(LDL|STL)\b", function)


def test_gradients_are_those_of_the_kernels_for_older_gpus(emulator: Emulator, request: pytest.FixtureRequest) -> None:
    """What this forward pass keeps serves the backward pass of `cuda_attention`, on an emulator too."""
    layout = build([100, 61], 40, landmarks=0.2, blocks=0.3)
    q, k, v, grad = inputs(layout, (2, 1, 64), torch.bfloat16)
    older = emulated.compiled(request.config.cache.mkdir("emulated-attention"))
    with emulated.operators(older):
        out, lse = run(q, k, v, layout, 0.125, True)
        assert lse is not None and not lse.requires_grad
        found = [out, *torch.autograd.grad(out, (q, k, v), grad)]
    exact = [x.detach().double().requires_grad_(x.requires_grad) for x in (q, k, v, grad)]
    hold(found, results(q, k, v, grad, layout, "reference"), results(*exact, layout, "reference"))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # torch's own check looks at it
def test_the_operator_is_well_made(emulator: Emulator) -> None:
    layout = build([23], 7, landmarks=0.2)
    q, k, v, _ = inputs(layout, (2, 1, 64), torch.bfloat16)
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(_forward, (q, k, v, *_plan(layout, 64), 0.25), test_utils=checks)


def test_it_runs_only_when_it_is_named() -> None:
    assert all("hopper" not in names for names in ORDER.values())  # until it has been timed on a GPU
    q = torch.zeros(20, 2, 64, dtype=torch.float16)
    assert "needs an NVIDIA GPU, found cpu" in dict(why(q, q, q, build([20], None)))["hopper"]
