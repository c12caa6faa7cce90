"""The CUDA C++ attention on a host: compiled by g++ against the emulator, and put behind its torch operators for CPU tensors.

Everything that a kernel should write starts as NaN and lies between bands of NaN that must stay; what it reads lies between
such bands too.
"""

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

from weft.kernels import cuda_library
from weft.kernels.cuda_library import SOURCES

BAND = 512
STEPS = ("forward", "share", "query_grad", "key_grad", "landmark_grad")


class Fault(AssertionError):
    """A kernel did what the hardware would not forgive."""


class Call(ctypes.Structure):
    """AttentionCall of csrc/attention_tiles.cuh."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("q", "k", "v", "out", "grad", "lse", "share", "result", "second")),
        *((name, ctypes.c_void_p) for name in ("first", "last", "at", "table")),
        *((name, ctypes.c_int64) for name in ("q_t", "q_h", "k_t", "k_h", "v_t", "v_h")),
        *((name, ctypes.c_int) for name in ("total", "heads", "group")),
        ("scale", ctypes.c_float),
    ]


def compiled(cache: Path, changes: dict[str, tuple[str, str]] | None = None, *options: str) -> ctypes.CDLL:
    """The emulated kernels, compiled once per state of the sources. changes: file -> (text, what to put in its place, once)."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("g++ is not installed")
    texts = {path.name: path.read_text() for path in SOURCES.glob("*.c*") if path.suffix in (".cuh", ".cpp")}
    for name, (old, new) in (changes or {}).items():
        assert texts[name].count(old) == 1, f"{old!r} is not once in {name}"
        texts[name] = texts[name].replace(old, new)
    parts = [*(f"{name}\0{texts[name]}" for name in sorted(texts)), *options]
    target = cache / f"{hashlib.sha256(chr(0).join(parts).encode()).hexdigest()[:24]}.so"
    if not target.exists():
        folder = cache / f"{target.stem}.{os.getpid()}"
        folder.mkdir(parents=True)
        for name, text in texts.items():
            (folder / name).write_text(text)
        command = [compiler, "-O2", "-std=c++17", "-Wall", "-Werror", "-shared", "-fPIC", *options]
        command += [str(folder / "emulate_attention.cpp"), "-o", str(folder / "part.so")]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-4000:]
        (folder / "part.so").replace(target)
        shutil.rmtree(folder)
    library = ctypes.CDLL(str(target))
    library.attention_emulated.restype = ctypes.c_bool
    library.attention_emulated.argtypes = [ctypes.c_int, ctypes.c_bool, ctypes.c_int, Call, ctypes.c_int, ctypes.c_uint64]
    library.emulator_fault.restype = ctypes.c_char_p
    library.emulator_bank_conflicts.restype = ctypes.c_long
    return library


def banded(x: Tensor) -> Tensor:
    """A copy between bands of NaN; a strided input stays as it is."""
    if not x.is_contiguous():
        return x
    whole = torch.full((x.numel() + 2 * BAND,), float("nan"), dtype=x.dtype)
    whole[BAND : BAND + x.numel()] = x.flatten()
    return whole[BAND : BAND + x.numel()].view(x.shape)


class Emulator:
    """The operators `weft_cuda::attention_*` for CPU tensors."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self.library = library
        self.seed = 1
        self.bank_conflicts = 0

    def attention_forward(
        self, q: Tensor, k: Tensor, v: Tensor, first: Tensor, last: Tensor, at: Tensor, table: Tensor, out: Tensor, lse: Tensor,
        scale: float, own: int, step: int,
    ) -> None:  # fmt: skip
        self._check(0, q, own, step)
        numbers = {"first": first, "last": last, "at": at, "table": table}
        self._run(0, q, k, v, len(table) * q.shape[1], scale, numbers, {"result": out, "lse": lse})

    def attention_share(self, out: Tensor, grad: Tensor, share: Tensor) -> None:
        rows = 128 // (out.shape[2] // 8)
        self._run(1, out, out, out, -(-share.numel() // rows), 1.0, {"out": out, "grad": grad}, {"share": share})

    def attention_query_grad(
        self, q: Tensor, k: Tensor, v: Tensor, grad: Tensor, lse: Tensor, share: Tensor, first: Tensor, last: Tensor,
        at: Tensor, table: Tensor, result: Tensor, scale: float, own: int, step: int,
    ) -> None:  # fmt: skip
        self._check(2, q, own, step)
        numbers = {"grad": grad, "lse": lse, "share": share, "first": first, "last": last, "at": at, "table": table}
        self._run(2, q, k, v, len(table) * q.shape[1], scale, numbers, {"result": result})

    def attention_key_grad(
        self, q: Tensor, k: Tensor, v: Tensor, grad: Tensor, lse: Tensor, share: Tensor, first: Tensor, last: Tensor,
        at: Tensor, table: Tensor, keys: Tensor, values: Tensor, scale: float, own: int, step: int, gather: bool,
    ) -> None:  # fmt: skip
        self._check(3, q, own, step)
        numbers = {"grad": grad, "lse": lse, "share": share, "first": first, "last": last, "at": at, "table": table}
        results = {"result": keys, "second": values}
        self._run(4 if gather else 3, q, k, v, len(table) * k.shape[1], scale, numbers, results, keep=gather)

    def _check(self, kind: int, q: Tensor, own: int, step: int) -> None:
        assert (own, step) == self.sizes(kind, q.shape[2])[:2], "the plan was made for other tiles"

    def sizes(self, kind: int, width: int) -> tuple[int, int, int]:
        """Rows that a block owns, the step of its walk, bytes of shared memory."""
        numbers = (ctypes.c_int * 3)()
        self.library.attention_emulated_sizes(kind, width, numbers)
        return numbers[0], numbers[1], numbers[2]

    def _run(
        self, kind: int, q: Tensor, k: Tensor, v: Tensor, blocks: int, scale: float, numbers: dict[str, Tensor],
        results: dict[str, Tensor], keep: bool = False,
    ) -> None:  # fmt: skip
        read = {"q": banded(q), "k": banded(k), "v": banded(v)}
        read |= {name: banded(x) if x.is_floating_point() else x for name, x in numbers.items()}
        written = {name: banded(x if keep else torch.full_like(x, float("nan"))) for name, x in results.items()}
        call = Call(**{name: x.data_ptr() for name, x in (read | written).items()})
        for name in ("q", "k", "v"):
            setattr(call, f"{name}_t", read[name].stride(0))
            setattr(call, f"{name}_h", read[name].stride(1))
        call.total, call.heads, call.group, call.scale = q.shape[0], q.shape[1], q.shape[1] // k.shape[1], scale
        half = q.dtype == torch.float16
        if not self.library.attention_emulated(kind, half, q.shape[2], call, blocks, self.seed):
            raise Fault(f"{STEPS[kind]}: {self.library.emulator_fault().decode()}")
        self.bank_conflicts += self.library.emulator_bank_conflicts()
        for name, x in results.items():
            around = written[name].as_strided((2, BAND), (BAND + x.numel(), 1), 0)
            assert bool(around.isnan().all()), f"{STEPS[kind]} wrote outside {name}"
            x.copy_(written[name])


@contextmanager
def operators(library: ctypes.CDLL) -> Iterator[Emulator]:
    """While this lasts `weft_cuda::attention_*` run on the emulator for CPU tensors, with the schemas of the C++ source."""
    emulator = Emulator(library)
    text = (SOURCES / "attention_ops.cu").read_text()
    schemas = ["".join(re.findall(r'"([^"]*)"', found)) for found in re.findall(r"m\.def\(([^;]*)\);", text)]
    declared = cuda_library.missing() is None
    fragment: Any = torch.library.Library("weft_cuda", "FRAGMENT")
    for schema in schemas:
        name = schema.split("(")[0]
        if not declared:
            fragment.define(schema)
        fragment.impl(name, getattr(emulator, name), "CPU")
        if not declared:
            fragment.impl(name, lambda *args: None, "Meta")
    try:
        yield emulator
    finally:
        fragment._destroy()
