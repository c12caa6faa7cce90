"""One parity suite for every attention backend that can run here, and the laws of the dispatcher."""

from __future__ import annotations

import logging

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import weft.kernels.attention as dispatcher
from tests.kernels.streams import draw
from weft.kernels import attention_operator
from weft.kernels.attention import BACKENDS, AttentionError, attention, use_backend, why
from weft.kernels.chunks import Batched, Single, chunk_plan
from weft.kernels.layout import StreamLayout

FAST = [b for b in BACKENDS if b != "reference"]
PLACES = [("sdpa", "cpu"), *(pytest.param(b, "cuda", marks=pytest.mark.gpu) for b in FAST)]  # flex and xformers: see below
HEADS = {"grouped": (6, 3, 16), "equal": (3, 3, 32), "one kv head": (4, 1, 16)}


def build(lengths: list[int], window: int | None, device: str = "cpu", *, landmarks: float = 0.0, blocks: float = 0.0,
          longest: int = 9, most: int | None = None, last: bool = False, seed: int = 0) -> StreamLayout:  # fmt: skip
    stream = draw(seed, lengths, landmarks, blocks, longest)
    layout = StreamLayout.build(stream.document, stream.landmark, stream.two_way, window, most, stream.medium if last else None)
    return layout.to(device)


LAYOUTS = {
    "one token": lambda d: build([1], None, d),
    "one causal document": lambda d: build([131], None, d),
    "documents": lambda d: build([40, 3, 71, 20], None, d),
    "one-token documents": lambda d: build([1] * 37 + [5], 4, d),
    "window": lambda d: build([150, 43], 17, d),
    "window of one": lambda d: build([60, 7], 1, d),
    "landmarks": lambda d: build([157, 31], 13, d, landmarks=0.2),
    "images": lambda d: build([90, 101], 30, d, blocks=0.8),
    "images larger than the window": lambda d: build([211], 11, d, landmarks=0.1, blocks=0.7, longest=83),
    "whole documents two-way": lambda d: build([64, 37], None, d, blocks=1.0, longest=200, seed=4),
    "few landmarks kept": lambda d: build([173], 9, d, landmarks=0.3, most=4),
    "last medium only": lambda d: build([139, 20], 40, d, landmarks=0.1, blocks=0.6, longest=15, last=True),
    "an empty row": lambda d: build([30, 34, 128], 16, d, landmarks=0.05),
    "split pieces": lambda d: build([37, 61, 45, 59] * 6, 40, d, landmarks=0.05),
    "long": lambda d: build([700, 401], 257, d, landmarks=0.02, blocks=0.2, longest=40),
}


def inputs(layout: StreamLayout, heads: tuple[int, int, int], dtype: torch.dtype) -> list[Tensor]:
    (h, g, k), t = heads, len(layout)
    made = [torch.randn(t, n, k, dtype=torch.float64, device=layout.device) for n in (h, g, g, h)]
    return [x.to(dtype).requires_grad_(i < 3) for i, x in enumerate(made)]


def results(q: Tensor, k: Tensor, v: Tensor, grad: Tensor, layout: StreamLayout, backend: str) -> list[Tensor]:
    out = attention(q, k, v, layout, backend=backend)
    assert out.dtype == q.dtype and out.shape == q.shape
    return [out, *torch.autograd.grad(out, (q, k, v), grad)]


def hold(ours: list[Tensor], plain: list[Tensor], truth: list[Tensor]) -> None:
    """Error against float64 at most 2x that of the plain implementation in the same dtype; gradients 3x (flash-attention)."""
    scale = max(c.norm() for c in truth)  # a gradient may be exactly zero: a softmax over one key
    for number, (a, b, c) in enumerate(zip(ours, plain, truth)):
        allowed = (2 if number == 0 else 3) * (b.double() - c).norm() + 2 * torch.finfo(a.dtype).eps * scale
        assert (a.double() - c).norm() <= allowed, f"output {number}"


def skip_unless_supported(backend: str, q: Tensor, k: Tensor, v: Tensor, layout: StreamLayout) -> None:
    reason = dict(why(q, k, v, layout))[backend]
    if reason != "runs":
        pytest.skip(f"{backend} {reason}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize(("backend", "device"), PLACES)
def test_backend_is_as_exact_as_the_plain_implementation(backend: str, name: str, dtype: torch.dtype, device: str) -> None:
    layout = LAYOUTS[name](device)
    for heads in HEADS.values():
        q, k, v, grad = inputs(layout, heads, dtype)
        skip_unless_supported(backend, q, k, v, layout)
        plain = results(q, k, v, grad, layout, "reference")
        exact = [x.detach().double().requires_grad_(x.requires_grad) for x in (q, k, v, grad)]
        hold(results(q, k, v, grad, layout, backend), plain, results(*exact, layout, "reference"))


@pytest.mark.gpu
@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("backend", ["triton", "cuda", "hopper"])
def test_our_kernels_in_the_widths_of_models(backend: str, dtype: torch.dtype, width: int, name: str) -> None:
    """And a step repeats to the last bit."""
    layout = LAYOUTS[name]("cuda")
    q, k, v, grad = inputs(layout, (4, 2, width), dtype)
    skip_unless_supported(backend, q, k, v, layout)
    exact = [x.detach().double().requires_grad_(x.requires_grad) for x in (q, k, v, grad)]
    first, again = (results(q, k, v, grad, layout, backend) for _ in range(2))
    hold(first, results(q, k, v, grad, layout, "reference"), results(*exact, layout, "reference"))
    assert all(torch.equal(a, b) for a, b in zip(first, again))


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 10**6),
    st.lists(st.integers(1, 70), min_size=1, max_size=6),
    st.one_of(st.none(), st.integers(1, 80)),
    st.sampled_from([64, 500, 4096]),
    st.sampled_from([256, 64 * 512]),
)
def test_any_plan_of_any_stream_is_exact(seed: int, lengths: list[int], window: int | None, keys: int, area: int) -> None:
    """Small limits force every kind of piece: split groups, a group of one, chunks run in place."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("weft.kernels.chunks.PIECE_KEYS", keys)
        patch.setattr("weft.kernels.chunks.BATCHED_AREA", area)
        layout = build(lengths, window, landmarks=0.1, blocks=0.3, seed=seed, most=3)
        q, k, v, grad = inputs(layout, (4, 2, 8), torch.float64)
        ours = results(q, k, v, grad, layout, "sdpa")
    for a, b in zip(ours, results(q, k, v, grad, layout, "reference")):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", LAYOUTS)
def test_reference_is_the_textbook_formula(name: str) -> None:
    layout = LAYOUTS[name]("cpu")
    q, k, v, _ = inputs(layout, (2, 1, 8), torch.float64)
    mask = layout.dense_mask()
    expect = torch.nn.functional.scaled_dot_product_attention(
        q.transpose(0, 1), k.transpose(0, 1).expand(2, -1, -1), v.transpose(0, 1).expand(2, -1, -1), attn_mask=mask
    )
    torch.testing.assert_close(attention(q, k, v, layout, backend="reference"), expect.transpose(0, 1))


@pytest.mark.parametrize("backend", ["reference", "sdpa"])
def test_gradients_are_right_in_float64(backend: str) -> None:
    layout = build([9, 1, 13], 5, landmarks=0.3, blocks=0.5)
    q, k, v, _ = inputs(layout, (4, 2, 3), torch.float64)
    assert torch.autograd.gradcheck(lambda *x: attention(*x, layout, backend=backend, scale=0.7), (q, k, v))


def test_large_single_chunks_and_small_batches_are_both_planned() -> None:
    pieces = chunk_plan(LAYOUTS["split pieces"]("cpu"), 6, 3, 16).pieces + chunk_plan(build([5000], None), 6, 3, 16).pieces
    assert {type(piece) for piece in pieces} == {Single, Batched}


@pytest.mark.parametrize("name", LAYOUTS)
def test_pieces_cover_every_query_once_and_little_more(name: str) -> None:
    layout = LAYOUTS[name]("cpu")
    plan = chunk_plan(layout, 4, 2, 16)
    covered = torch.zeros(len(layout) * 4 + 1, dtype=torch.int64)
    for piece in plan.pieces:
        if isinstance(piece, Single):
            covered[piece.queries.start * 4 : piece.queries.stop * 4] += 1
        else:
            covered.index_add_(0, piece.put_q, torch.ones_like(piece.put_q))
    assert bool((covered[:-1] == 1).all())
    assert plan.area >= layout.pairs
    assert chunk_plan(layout, 4, 2, 16) is plan


def test_unmasked_chunks_carry_no_mask() -> None:
    document = torch.arange(4, dtype=torch.int32).repeat_interleave(300)
    layout = StreamLayout.build(document, document < 0, document, None)
    assert all(piece.mask is None for piece in chunk_plan(layout, 2, 2, 16).pieces)


@pytest.mark.parametrize("name", ["landmarks", "documents", "long"])
def test_pieces_through_autograd_are_exact_too(name: str) -> None:
    """The path that devices other than the CPU take, run here."""
    from weft.kernels.sdpa import _by_autograd

    layout = LAYOUTS[name]("cpu")
    q, k, v, grad = inputs(layout, (6, 3, 16), torch.float64)
    out = _by_autograd(q, k, v, chunk_plan(layout, 6, 3, 16), 0.25)
    ours = [out, *torch.autograd.grad(out, (q, k, v), grad)]
    for a, b in zip(ours, results(q, k, v, grad, layout, "reference")):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("backend", ["reference", "sdpa"])
def test_log_sum_exp_merges_two_halves(backend: str) -> None:
    """Attention over all keys = the halves weighted by their log-sum-exp."""
    layout = build([50], None)
    q, k, v, _ = inputs(layout, (4, 2, 16), torch.float64)
    out, lse = attention(q, k, v, layout, backend=backend, return_lse=True)
    score = torch.einsum("ihk,jhk->ihj", q, k.repeat_interleave(2, 1)) / 4
    expect = score.masked_fill(~layout.dense_mask()[:, None], float("-inf")).logsumexp(-1)
    torch.testing.assert_close(lse, expect)
    assert not lse.requires_grad and out.requires_grad


def test_strided_inputs_give_the_same() -> None:
    """q, k, v cut out of one projection, as a model does."""
    layout = LAYOUTS["landmarks"]("cpu")
    fused = torch.randn(len(layout), 8, 16, requires_grad=True)
    parts = fused.split([4, 2, 2], 1)
    a = attention(*parts, layout)
    b = attention(*(x.contiguous() for x in parts), layout)
    assert torch.equal(a, b)
    for x, y in zip(torch.autograd.grad(a.sum(), fused), torch.autograd.grad(b.sum(), fused)):
        assert torch.equal(x, y)


def programs_of_flex(layouts: list[StreamLayout]) -> int:
    """Programs that were compiled to attend over these layouts, each held to the truth."""
    counted = torch._dynamo.utils.counters["stats"]
    before = counted["unique_graphs"]
    for layout in layouts:
        q, k, v, _ = (x.detach() for x in inputs(layout, (4, 2, 16), torch.float32))
        ours, plain = (attention(q, k, v, layout, backend=b) for b in ("flex", "reference"))
        truth = attention(q.double(), k.double(), v.double(), layout, backend="reference")
        hold([ours], [plain], [truth])
    return counted["unique_graphs"] - before


def test_flex_agrees_forward_on_a_cpu_and_compiles_once() -> None:
    """A new layout is new data, not a new program: otherwise training would meet the recompile limit."""
    kinds: list[dict[str, float]] = [{}, {"landmarks": 0.2}, {"blocks": 0.8}, {"landmarks": 0.3, "most": 3}]
    assert programs_of_flex([build([100, 31], 17, "cpu", **kind) for kind in kinds]) <= 1  # type: ignore[arg-type]


@pytest.mark.slow
def test_flex_takes_other_lengths_with_a_second_program() -> None:
    names = ("one causal document", "landmarks", "images", "few landmarks kept", "window")
    assert programs_of_flex([LAYOUTS[name]("cpu") for name in names]) <= 2


def test_flex_refuses_a_backward_on_a_cpu() -> None:
    layout = build([20], None)
    q, k, v, _ = inputs(layout, (2, 2, 16), torch.float32)
    with pytest.raises(AttentionError, match="no backward on a CPU"):
        attention(q, k, v, layout, backend="flex")
    assert dict(why(q.detach(), k.detach(), v.detach(), layout))["flex"] == "runs"


def test_every_backend_says_why_not() -> None:
    layout = build([20], None)
    q, k, v, _ = inputs(layout, (2, 2, 16), torch.float64)
    reasons = dict(why(q, k, v, layout))
    assert set(reasons) == set(BACKENDS) and reasons["sdpa"] == reasons["reference"] == "runs"
    assert "float64" in reasons["flex"] and "cpu" in reasons["xformers"]


def test_the_choice_is_forced_by_argument_then_context_then_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    layout = build([20], None)
    q, k, v, _ = inputs(layout, (2, 2, 16), torch.float32)
    ran: list[str] = []

    def spy(name: str) -> object:
        ran.append(name)
        return importer(name)

    importer = dispatcher._module
    monkeypatch.setattr(dispatcher, "_module", spy)

    def last(**options: str) -> str:
        ran.clear()
        attention(q, k, v, layout, **options)  # type: ignore[call-overload]
        return ran[-1]

    assert last() == "sdpa"
    monkeypatch.setenv("WEFT_ATTENTION", "reference")
    assert last() == "reference"
    with use_backend("sdpa"):
        assert last() == "sdpa"
        assert last(backend="reference") == "reference"
    assert last() == "reference"
    monkeypatch.setenv("WEFT_ATTENTION", "quick")
    with pytest.raises(AttentionError, match="'quick' is unknown"):
        attention(q, k, v, layout)


def test_auto_says_once_what_runs(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatcher, "_said", set())
    layout = build([20], None)
    q, k, v, _ = inputs(layout, (2, 2, 16), torch.float32)
    with caplog.at_level(logging.INFO):
        attention(q, k, v, layout)
        attention(q, k, v, layout)
    assert [r.getMessage() for r in caplog.records] == ["attention on cpu in torch.float32 runs on backend sdpa"]


def test_autocast_computes_in_the_lower_precision() -> None:
    layout = LAYOUTS["window"]("cpu")
    q, k, v, grad = inputs(layout, (4, 2, 16), torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out = attention(q, k, v, layout)
    assert out.dtype == torch.bfloat16
    assert torch.autograd.grad(out, q, grad.bfloat16())[0].dtype == torch.float32


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # torch._dynamo looks at it after a graph break
def test_a_compiled_caller_gives_the_same_result() -> None:
    layout = LAYOUTS["landmarks"]("cpu")
    q, k, v, _ = inputs(layout, (4, 2, 16), torch.float32)
    block = torch.compile(lambda q, k, v: attention(q * 2, k, v, layout, backend="reference") + 1, backend="eager")
    assert torch.equal(block(q, k, v), attention(q * 2, k, v, layout, backend="reference") + 1)


def test_a_compiled_caller_stays_whole_and_serves_every_layout() -> None:
    """Values, gradients and the log-sum-exp to the bit, in one graph, with the plan of a layout made once."""

    def caller(q: Tensor, k: Tensor, v: Tensor, layout: StreamLayout) -> tuple[Tensor, Tensor]:
        out, lse = attention(q * 2, k, v, layout, return_lse=True)
        return out + 1, lse

    whole = torch.compile(caller, backend="aot_eager", fullgraph=True, dynamic=True)
    for name in ("landmarks", "images", "documents"):
        layout = LAYOUTS[name]("cpu")
        q, k, v, grad = inputs(layout, (4, 2, 16), torch.float32)
        found = []
        for function in (whole, caller):
            out, lse = function(q, k, v, layout)
            found.append([out, lse, *torch.autograd.grad(out, (q, k, v), grad)])
            assert not lse.requires_grad
        assert all(torch.equal(a, b) for a, b in zip(*found)), name
        plans = attention_operator._layout([getattr(layout, part) for part in attention_operator.NAMES]).plans
        assert len(plans) == 1


def test_what_was_derived_from_a_layout_goes_with_it() -> None:
    layout = LAYOUTS["window"]("cpu")
    q, k, v, _ = (x.detach() for x in inputs(layout, (2, 1, 16), torch.float32))
    attention_operator.run(q, k, v, layout, 0.25, "sdpa")
    held = len(attention_operator._met)
    del layout
    assert len(attention_operator._met) == held - 1


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # torch's own check looks at it
def test_the_operator_is_well_made() -> None:
    layout = LAYOUTS["landmarks"]("cpu")
    q, k, v, grad = inputs(layout, (2, 1, 16), torch.float32)
    tensors = [getattr(layout, part) for part in attention_operator.NAMES]
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(attention_operator.operator, (q, k, v, tensors, 0.25, "sdpa"), test_utils=checks)
    out, lse = attention_operator.operator(q, k, v, tensors, 0.25, "sdpa")
    held = [x.detach() for x in (grad, q, k, v, out, lse)]
    torch.library.opcheck(attention_operator.operator_backward, (*held, tensors, 0.25, "sdpa"), test_utils=checks)


def test_a_compiled_caller_hears_why_a_named_backend_cannot_run() -> None:
    layout = LAYOUTS["window"]("cpu")
    q, k, v, _ = (x.detach() for x in inputs(layout, (2, 1, 16), torch.float32))
    with pytest.raises(AttentionError, match="'triton' was asked for but"):
        attention_operator.run(q, k, v, layout, 0.25, "triton")


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (((20, 4, 8), (20, 3, 8), (20, 3, 8)), "multiple of kv heads"),
        (((20, 4, 8), (20, 2, 4), (20, 2, 4)), r"q \[T H K\]"),
        (((19, 4, 8), (19, 2, 8), (19, 2, 8)), "layout of 20 tokens"),
        (((1, 20, 4, 8), (20, 2, 8), (20, 2, 8)), r"q \[T H K\]"),
    ],
)
def test_wrong_shapes_are_named(shapes: tuple[tuple[int, ...], ...], message: str) -> None:
    with pytest.raises(AttentionError, match=message):
        attention(*(torch.zeros(s) for s in shapes), build([20], None))  # type: ignore[call-overload]


def test_mixed_dtypes_are_named() -> None:
    q = torch.zeros(20, 2, 8)
    with pytest.raises(AttentionError, match=r"k torch\.bfloat16"):
        attention(q, q.bfloat16(), q, build([20], None))
