"""Decoding over a paged cache in plain torch: equal to attention over whole documents, whatever the ring and the store hold."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.decoding import EPS, Run, Setting
from weft.kernels import cuda_decode
from weft.kernels.choice import ChoiceError
from weft.kernels.cuda_decode import decode_attention
from weft.kernels.paged import PagedCache, PagedError

LENGTHS = (0, 1, None, 36, 37, 38, 90, 5)
SETTINGS = {
    "landmarks": Setting(LENGTHS),
    "no landmarks": Setting(LENGTHS, every=0),
    "only landmarks": Setting(LENGTHS, every=1, window=11, max_landmarks=7),
    "all landmarks kept": Setting(LENGTHS, every=3, max_landmarks=None, window=13),
    "one landmark": Setting(LENGTHS, max_landmarks=1, every=2),
    "a window of one": Setting(LENGTHS, window=1, every=2),
    "full layers": Setting(LENGTHS, window=None),
    "pages beyond the window": Setting(LENGTHS, window=200, page=8),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_steps_equal_whole_documents(name: str) -> None:
    run = Run(SETTINGS[name], steps=9)
    step = run.new_step()
    for _ in range(9):
        out = run.step(step)
        torch.testing.assert_close(out.double(), run.truth(), atol=2e-6, rtol=2e-5)
    assert run.cache.faults() == []


def test_what_is_not_alive_is_never_read() -> None:
    """Slots of other rows and of tokens gone are NaN from the start; a step that reads one gives NaN."""
    run = Run(Setting((50, 3), window=16, every=4, max_landmarks=2), steps=30)
    step = run.new_step()
    for _ in range(30):
        assert bool(run.step(step).isfinite().all())


def test_a_token_without_a_page_is_reported() -> None:
    run = Run(Setting((15, 3), window=None), steps=2)
    run.cache.release(1)  # the row of entry 1, still in use
    run.cache.state[1, 0] = 3
    run.step(run.new_step())
    assert run.cache.faults() == [1]


def test_pages_come_and_go() -> None:
    cache = PagedCache(2, 1, 1, 1, 64, window=32, max_landmarks=4, max_length=100, page=16, pages=(4, 7))
    cache.reserve(0, 100)
    assert len(cache.local.free) == 1 and len(cache.full.free) == 0
    with pytest.raises(PagedError, match="needs 1 pages, 0 are free"):
        cache.full.reserve(1, 1, 0)
    cache.release(0)
    assert sorted(cache.local.free) == [1, 2, 3, 4] and not cache.local.table.any()
    cache.reserve(1, 17)
    assert int((cache.full.table[1] > 0).sum()) == 2
    with pytest.raises(PagedError, match="longer than max_length"):
        cache.reserve(1, 101)
    with pytest.raises(PagedError, match="row 2 does not exist"):
        cache.reserve(2, 1)
    with pytest.raises(PagedError, match="power of two"):
        PagedCache(1, 1, 1, 1, 64, window=8, max_landmarks=4, max_length=100, page=12)


def test_the_choice_is_torch_until_it_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(Setting((4,)), steps=4)
    step = run.new_step()
    arguments = (*run.fill(step), *run.weights, step, run.keys, 0)
    decode_attention(*arguments, eps=EPS)
    with pytest.raises(ChoiceError, match="asked for but needs an NVIDIA GPU"), cuda_decode.CHOICE.use("cuda"):
        decode_attention(*arguments, eps=EPS)
    monkeypatch.setenv("WEFT_DECODE", "magic")
    with pytest.raises(ChoiceError, match="choose one of auto, torch, cuda"):
        decode_attention(*arguments, eps=EPS)


def test_operators_pass_torchs_checks() -> None:
    run = Run(Setting((4, None, 40)), steps=2)
    step = run.new_step()
    q, k, v = (x.contiguous() for x in run.fill(step))
    keys = run.keys
    keys.pool.zero_()
    tensors = (
        step.position,
        step.turns,
        step.axis,
        step.rows,
        step.landmark,
        keys.state,
        keys.marked,
        keys.table,
        keys.pool[0],
    )
    numbers = (keys.window, keys.max_landmarks, keys.store, 1, 0.125, EPS)
    call = (q, k, v, *run.weights, *tensors, torch.empty_like(q), step.partial, step.arrived, *numbers)
    torch.library.opcheck(torch.ops.weft.decode_step.default, call)
    torch.library.opcheck(torch.ops.weft.decode_advance.default, (step.rows, step.landmark, keys.state, keys.marked))


@pytest.mark.gpu
@pytest.mark.parametrize("width", [64, 128])
def test_the_kernel_on_a_gpu_in_a_graph(width: int) -> None:
    """Steps replayed from one CUDA graph equal the same steps in plain torch on the CPU."""
    setting = Setting((0, 1, None, 300, 511, 512, 700), heads=8, width=width, window=512, dtype=torch.bfloat16, page=64)
    run, steps = Run(setting, steps=6), 6
    plain = run.new_step()
    cache = PagedCache(8, 2, 0, 2, width, window=512, max_landmarks=3, max_length=706, device="cuda")
    for mine, theirs in ((cache.local, run.keys),):
        for name in ("table", "pool"):
            setattr(mine, name, getattr(theirs, name).cuda())
        mine.page, mine.store = theirs.page, theirs.store
    cache.state.copy_(run.cache.state)
    cache.marked.copy_(run.cache.marked)
    step = cuda_decode.new_step(cache, len(run.rows), setting.heads)
    step.rows.copy_(run.rows)
    inputs = [x.cuda() for x in run.fill(plain)]
    weights = [w.cuda() for w in run.weights]
    reason = cuda_decode.supports(*inputs[:2], cache.local)
    if reason:
        pytest.skip(reason)
    out = torch.empty_like(inputs[0])

    def work() -> None:
        decode_attention(*inputs, *weights, step, cache.local, 1, eps=EPS, out=out, implementation="cuda")
        cuda_decode.advance(step, cache, implementation="cuda")

    before = [x.clone() for x in (cache.state, cache.marked, cache.local.pool)]
    work()
    for now, then in zip((cache.state, cache.marked, cache.local.pool), before):
        now.copy_(then)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    for _ in range(steps):
        for mine, theirs in zip(inputs, run.fill(plain)):
            mine.copy_(theirs)
        step.landmark.copy_(plain.landmark)
        step.position.copy_(plain.position)
        graph.replay()
        rounded, truth = run.step(plain), run.truth()
        error = (rounded.double() - truth).norm()
        assert (out.cpu().double() - truth).norm() <= 2 * error + 2 * torch.finfo(torch.bfloat16).eps * truth.norm()
