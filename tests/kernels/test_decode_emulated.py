"""The CUDA C++ kernels of the paged cache compiled for the host and run on an emulator whose blocks take turns at random."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.kernels.decoding import EPS, KINDS, Run, Setting, emulated
from weft.kernels import cuda
from weft.kernels.rotary import rope_table

LENGTHS = (0, 1, None, 36, 37, 90)


def compile_for_host(source: Path, target: Path, *options: str) -> ctypes.CDLL:
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("g++ is not installed")
    command = [compiler, "-O1", "-std=c++17", "-Wall", "-Werror", "-shared", "-fPIC", *options, str(source), "-o", str(target)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return ctypes.CDLL(str(target))


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return compile_for_host(cuda.SOURCES / "emulate_decode.cpp", tmp_path_factory.mktemp("emulator") / "emulated.so")


SETTINGS = {
    "one part": Setting(LENGTHS, parts=1),
    "parts": Setting((150, 3, None, 400), parts=4, window=260, max_landmarks=20, every=9, page=32),
    "bfloat16": Setting((0, None, 37, 230), heads=8, width=128, window=180, max_landmarks=None, dtype=torch.bfloat16),
    "float16, no groups": Setting((7, 70, 129), heads=3, kv_heads=3, window=None, dtype=torch.float16),
    "three heads of four": Setting((5, 60), heads=6, kv_heads=2, dtype=torch.float16, max_landmarks=2, every=3),
    "eight heads": Setting((9, 200), heads=8, kv_heads=1, width=128, window=150, every=3, dtype=torch.bfloat16),
    "six heads of eight": Setting((40, None, 1), heads=6, kv_heads=1, max_landmarks=1, every=2),
    "a window of one": Setting((3, 0), window=1, max_landmarks=2, every=2),
    "no landmarks": Setting((36, 80), every=0, page=8, width=128),
    "from nothing": Setting((0, None), window=5, max_landmarks=2, every=2, page=4),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_steps_equal_whole_documents(library: ctypes.CDLL, name: str) -> None:
    setting, steps = SETTINGS[name], 16 if name == "from nothing" else 3
    ours, plain = Run(setting, steps), Run(setting, steps)
    step, plain_step = ours.new_step(), plain.new_step()
    step.partial.fill_(float("nan"))
    for number in range(steps):
        out, rounded, truth = ours.step(step, emulated(library, number)), plain.step(plain_step), ours.truth()
        error, allowed = (out.double() - truth).norm(), (rounded.double() - truth).norm()
        assert error <= 2 * allowed + 2 * torch.finfo(setting.dtype).eps * truth.norm()
        assert not step.arrived.any(), "a counter was not reset"
    assert_same_cache(ours, plain)
    assert ours.cache.faults() == []


def assert_same_cache(ours: Run, plain: Run) -> None:
    """Values of both caches, slot by slot: copies to the last bit, keys to rounding; page 0 is nobody's."""
    atol = 4 * torch.finfo(plain.setting.dtype).eps
    mine, theirs = ours.keys.pool[:, 1:].float(), plain.keys.pool[:, 1:].float()
    torch.testing.assert_close(mine[:, :, 1], theirs[:, :, 1], rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(mine[:, :, 0], theirs[:, :, 0], rtol=atol, atol=atol, equal_nan=True)


def test_the_order_of_threads_and_blocks_changes_nothing(library: ctypes.CDLL) -> None:
    setting = Setting((150, 200), parts=4, window=260, max_landmarks=20, every=9, page=32)

    def result(seed: int) -> list[Tensor]:
        run = Run(setting, 1)
        return [run.step(run.new_step(), emulated(library, seed)), run.keys.pool]

    first, *others = (result(seed) for seed in range(4))
    for other in others:
        assert all(a.equal(b) for a, b in zip((x.nan_to_num(7) for x in first), (x.nan_to_num(7) for x in other)))


@pytest.mark.parametrize(
    ("line", "instead"),
    [
        ("  sync_block();\n  if (thread == 0) *last =", "  if (thread == 0) *last ="),  # counted before all have written
        ("  if (thread == 0) step.arrived[pair] = 0;\n", ""),  # right once, wrong when replayed
    ],
    ids=["early arrival", "counter not reset"],
)
def test_a_broken_merge_is_seen(tmp_path: Path, line: str, instead: str) -> None:
    for path in cuda.SOURCES.glob("*.c*"):
        text = path.read_text()
        if path.name == "decode.cuh":
            assert text.count(line) == 1
            text = text.replace(line, instead)
        (tmp_path / path.name).write_text(text)
    broken = compile_for_host(tmp_path / "emulate_decode.cpp", tmp_path / "broken.so", "-DWEFT_FEW")
    setting = Setting((260, 200), parts=4, window=260, max_landmarks=20, every=9, page=32)

    def wrong(seed: int) -> bool:
        run = Run(setting, 2)
        step = run.new_step()
        step.partial.fill_(float("nan"))
        errors = [(run.step(step, emulated(broken, seed)).double() - run.truth()).norm() for _ in range(2)]
        return not all(bool(error < 1e-4) for error in errors)

    assert any(wrong(seed) for seed in range(30)), "no order of 30 shows it"


def test_steps_are_counted(library: ctypes.CDLL) -> None:
    """The kernel's counting is the reference's, before and after the ring wraps, and leaves rows that are nobody's alone."""
    setting = Setting((0, None, 3, 40), window=9, every=3)
    ours, plain = Run(setting, 0), Run(setting, 0)
    library.decode_advance_emulated.restype = ctypes.c_bool
    random = torch.Generator().manual_seed(1)
    for seed in range(12):
        landmark = torch.randint(0, 2, (4,), generator=random, dtype=torch.uint8)
        tensors = (ours.rows, landmark, ours.cache.state, ours.cache.marked)
        pointers = [ctypes.c_void_p(x.data_ptr()) for x in tensors]
        assert library.decode_advance_emulated(*pointers, 4, 9, ctypes.c_uint64(seed))
        torch.ops.weft.decode_advance(plain.rows, landmark, plain.cache.state, plain.cache.marked)
        live = slice(0, -1)  # the last row is nobody's
        assert ours.cache.state[live].equal(plain.cache.state[live]) and ours.cache.marked[live].equal(plain.cache.marked[live])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize(
    ("tokens", "groups", "width", "page", "blocks"), [(23, 2, 64, 8, 2), (5, 3, 128, 16, 3), (1, 1, 64, 1, 1)]
)
def test_keys_and_values_go_straight_to_their_places(
    library: ctypes.CDLL, tokens: int, groups: int, width: int, page: int, blocks: int, dtype: torch.dtype
) -> None:
    fused = torch.randn(tokens, 3 * groups, width).to(dtype)
    k, v = fused[:, groups : 2 * groups], fused[:, 2 * groups :]
    weight, table = torch.rand(width) + 0.5, rope_table(torch.randint(0, 99, (tokens, 3)), width)
    pages = -(-tokens // page) + 2
    slot = torch.randperm(pages * page)[:tokens]
    slot[tokens // 2] = -1
    caches = [torch.full((pages, 2, groups, page, width), float("nan"), dtype=dtype) for _ in range(2)]
    expect = cuda.norm_rope_store(k, v, weight, *table, slot, caches[0], EPS)
    y = torch.full_like(expect, float("nan"))
    strides = (ctypes.c_int64 * 4)(k.stride(0), k.stride(1), v.stride(0), v.stride(1))
    pointers = [ctypes.c_void_p(x.data_ptr()) for x in (k, v, weight, *table, slot, caches[1], y)]
    sizes = (tokens, groups, strides, ctypes.c_int64(page), ctypes.c_float(EPS), blocks, ctypes.c_uint64(3))
    library.norm_rope_store_emulated.restype = ctypes.c_bool
    assert library.norm_rope_store_emulated(width, KINDS[dtype], *pointers, *sizes)
    close = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(y, expect, rtol=close, atol=close)
    torch.testing.assert_close(caches[1][:, 0], caches[0][:, 0], rtol=close, atol=close, equal_nan=True)
    torch.testing.assert_close(caches[1][:, 1], caches[0][:, 1], rtol=0, atol=0, equal_nan=True)
