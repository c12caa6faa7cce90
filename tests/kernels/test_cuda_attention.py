"""Interval attention in CUDA C++ without a GPU: the sources run on an emulator, held against float64."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.kernels.emulated import Emulator, Fault, compiled, operators
from tests.kernels.test_attention import LAYOUTS, build, hold, inputs, results
from weft.kernels.attention import ORDER, AttentionError, attention, why
from weft.kernels.cuda_attention import TILES, _backward, _forward, run
from weft.kernels.layout import StreamLayout
from weft.kernels.triton_plan import interval_plan

LONG = ("split pieces", "long")  # a second or more each


@pytest.fixture(scope="module")
def cache(request: pytest.FixtureRequest) -> Path:
    return request.config.cache.mkdir("emulated-attention")


@pytest.fixture(scope="module")
def emulator(cache: Path) -> Iterator[Emulator]:
    with operators(compiled(cache)) as emulator:
        yield emulator


def ours(layout: StreamLayout, q: Tensor, k: Tensor, v: Tensor, grad: Tensor) -> list[Tensor]:
    out, lse = run(q, k, v, layout, q.shape[2] ** -0.5, True)
    assert lse is not None and not lse.requires_grad
    return [out, *torch.autograd.grad(out, (q, k, v), grad), lse]


def compare(layout: StreamLayout, heads: tuple[int, int, int], dtype: torch.dtype) -> None:
    q, k, v, grad = inputs(layout, heads, dtype)
    *values, lse = ours(layout, q, k, v, grad)
    exact = [x.detach().double().requires_grad_(x.requires_grad) for x in (q, k, v, grad)]
    hold(values, results(q, k, v, grad, layout, "reference"), results(*exact, layout, "reference"))
    expect = attention(*exact[:3], layout, backend="reference", return_lse=True)[1]
    torch.testing.assert_close(lse, expect.float(), atol=2e-5, rtol=0)  # products of 16-bit numbers are exact in float


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow if n in LONG else ()) for n in LAYOUTS])
def test_every_layout(emulator: Emulator, name: str) -> None:
    compare(LAYOUTS[name]("cpu"), (2, 1, 64), torch.bfloat16)


@pytest.mark.parametrize("name", ["documents", "landmarks", "images larger than the window", "last medium only"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_the_wider_head(emulator: Emulator, name: str, dtype: torch.dtype) -> None:
    compare(LAYOUTS[name]("cpu"), (2, 2, 128), dtype)


def test_groups_of_heads_in_float16(emulator: Emulator) -> None:
    compare(build([70, 59], 20, landmarks=0.1, blocks=0.5), (6, 2, 64), torch.float16)


def test_full_tiles_are_walked_without_a_mask(emulator: Emulator) -> None:
    """Long enough that every table has full steps, so that both forms of the loop are held above and here."""
    layout = build([400], 300)
    plan = interval_plan(layout, TILES[64])
    assert all(bool((table[:, 3] > table[:, 2]).any()) for table in plan.tables[:3])
    compare(layout, (1, 1, 64), torch.bfloat16)


def test_the_order_of_threads_changes_nothing(emulator: Emulator) -> None:
    """Sums have one order: any order of threads and blocks gives the same bits."""
    layout = build([100, 41], 30, landmarks=0.2, blocks=0.3)
    q, k, v, grad = inputs(layout, (2, 1, 64), torch.bfloat16)
    found = []
    for emulator.seed in range(2, 6):
        found.append(ours(layout, q, k, v, grad))
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other))


@pytest.mark.parametrize("width", [64, 128])
def test_matrix_loads_meet_no_bank_conflict(emulator: Emulator, width: int) -> None:
    emulator.bank_conflicts = 0
    layout = build([90], None)
    ours(layout, *inputs(layout, (1, 1, width), torch.float16))
    assert emulator.bank_conflicts == 0


@pytest.mark.parametrize("scale", [-0.3, 0.0])
def test_a_scale_that_is_not_positive(emulator: Emulator, scale: float) -> None:
    layout = build([37], 11)
    q, k, v, grad = inputs(layout, (2, 1, 64), torch.float16)
    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    outs = [run(q, k, v, layout, scale)[0], attention(*exact, layout, backend="reference", scale=scale)]
    grads = [torch.autograd.grad(outs[0], (q, k, v), grad), torch.autograd.grad(outs[1], exact, grad.double())]
    for a, b in zip([outs[0], *grads[0]], [outs[1], *grads[1]]):
        torch.testing.assert_close(a.double(), b, atol=4e-3, rtol=4e-3)


def test_strided_inputs(emulator: Emulator) -> None:
    """q, k, v cut out of one projection: read in place where rows lie on multiples of 16 bytes, else copied."""
    layout = build([41], 9)
    fused = torch.randn(41, 4, 64).half()
    parts = fused.split([2, 1, 1], 1)
    odd = [torch.randn(len(x), x.shape[1], 67).half()[:, :, 1:65].copy_(x) for x in parts]
    turned = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in parts]
    first, *others = (run(*x, layout, 0.1)[0] for x in (parts, odd, turned, [x.contiguous() for x in parts]))
    assert all(torch.equal(first, other) for other in others)


def test_no_tokens(emulator: Emulator) -> None:
    layout = build([], None)
    q, k, v, grad = inputs(layout, (2, 1, 64), torch.bfloat16)
    assert [x.shape for x in ours(layout, q, k, v, grad)[:4]] == [q.shape, q.shape, k.shape, v.shape]


def test_tiles_are_those_of_the_source_and_fit(emulator: Emulator) -> None:
    for width, tiles in TILES.items():
        expected = [(tiles.forward.queries, tiles.forward.keys), (tiles.query_grad.queries, tiles.query_grad.keys)]
        expected.append((tiles.key_grad.keys, tiles.key_grad.queries))
        for kind, numbers in zip((0, 2, 3), expected):
            *found, shared = emulator.sizes(kind, width)
            assert tuple(found) == numbers
            assert shared <= 163 * 1024, "what a block may have on sm_80 (CUDA programming guide, compute capabilities)"
            assert 2 * (shared + 1024) <= 228 * 1024, "two blocks per processor of sm_90"


BUFFERS = "    T* k_tile = stages + i % 2 * 2 * S::STEP * D;\n    load_rows"
MISTAKES = {
    "keys are read before they arrive": ("attention_forward.cuh", "wait_copies<0>();", ""),
    "keys are overwritten while they are read": ("attention_forward.cuh", "sync_block();  // step i", "// step i"),
    "one buffer for two steps": ("attention_query_grad.cuh", BUFFERS, "    T* k_tile = stages;\n    load_rows"),
    "a missing barrier": ("attention_key_grad.cuh", "sync_block();  // this step", "// this step"),
    "rows are not permuted": ("attention_tiles.cuh", "((piece ^ (row & 7)) << 3)", "(piece << 3)"),
    "half of a warp leaves": (
        "attention_forward.cuh", "  float factor =", "  if (thread_index() % 32 > 15) return;\n  float factor =",
    ),
    "a copy that is not aligned": ("attention_tiles.cuh", "stride + piece * 8, from >= 0", "stride + piece * 8 + 1, from >= 0"),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_seen(emulator: Emulator, cache: Path, mistake: str) -> None:
    """The tests above can fail: each of these mistakes gives a fault, NaN, other bits or bank conflicts."""
    name, old, new = MISTAKES[mistake]
    layout = build([100, 41], 30, landmarks=0.2)
    tensors = inputs(layout, (1, 1, 64), torch.bfloat16)
    right, truth, seen = emulator.library, ours(layout, *tensors), False
    emulator.library, emulator.bank_conflicts = compiled(cache, {name: (old, new)}, "-Wno-error", "-O0"), 0
    try:
        for emulator.seed in range(3):
            seen |= any(not torch.equal(a, b) for a, b in zip(truth, ours(layout, *tensors)))
    except Fault:
        seen = True
    finally:
        emulator.library = right
    assert seen or emulator.bank_conflicts > 0


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # torch's own check looks at it
def test_operators_are_well_made(emulator: Emulator) -> None:
    """Schema, fake implementation and autograd agree, and a compiled caller needs no graph break."""
    layout = build([23], 7, landmarks=0.2)
    q, k, v, grad = inputs(layout, (2, 1, 64), torch.bfloat16)
    plan = interval_plan(layout, TILES[64])
    tail = (plan.spans, plan.tables, 0.25)
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(_forward, (q, k, v, *tail), test_utils=checks)
    out, lse = _forward(q, k, v, *tail)
    held = [x.detach() for x in (grad, q, k, v, out, lse)]
    torch.library.opcheck(_backward, (*held, *tail), test_utils=checks)
    numbers = (plan.spans[0], plan.spans[2], plan.spans[3], plan.tables[0])
    places = (torch.empty_like(out).detach(), torch.empty_like(lse))
    raw = torch.ops.weft_cuda.attention_forward.default
    torch.library.opcheck(raw, (*held[1:4], *numbers, *places, 0.25, 128, 64), test_utils=("test_schema", "test_faketensor"))

    def block(q: Tensor) -> Tensor:
        return _forward(q * 2, k, v, *tail)[0] + 1

    compiled_block = torch.compile(block, backend="aot_eager", fullgraph=True)
    found = [torch.autograd.grad(f(q), (q, k), grad) for f in (block, compiled_block)]
    for a, b in zip(*found):
        torch.testing.assert_close(a, b)


def test_it_runs_only_when_it_is_named_and_says_why_not() -> None:
    assert all("cuda" not in names for names in ORDER.values())  # until it has been timed on a GPU
    layout = build([20], None)
    q = torch.zeros(20, 2, 64, dtype=torch.float16)
    assert "needs an NVIDIA GPU, found cpu" in dict(why(q, q, q, layout))["cuda"]
    assert "float16 or bfloat16" in dict(why(q.float(), q.float(), q.float(), layout))["cuda"]
    narrow = q[..., :32].contiguous()
    assert "head width of 64 or 128" in dict(why(narrow, narrow, narrow, layout))["cuda"]
    with pytest.raises(AttentionError, match="'cuda' was asked for but needs an NVIDIA GPU"):
        attention(q, q, q, layout, backend="cuda")
