"""The Triton kernels without a GPU: under the interpreter, and as machine code for sm_80 and sm_90."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kernels.test_attention import LAYOUTS, build
from weft.kernels.attention import why
from weft.kernels.layout import StreamLayout
from weft.kernels.triton_plan import TileSize, TileSizes, interval_plan

ROOT = Path(__file__).parents[2]
FOLDER = Path(__file__).parent / "interpreted"


@pytest.mark.parametrize("name", sorted(path.stem for path in FOLDER.glob("*.py")))
def test_parity_under_the_interpreter(name: str) -> None:
    """In a process of its own: Triton decides at import whether it interprets."""
    pytest.importorskip("triton", reason="triton is not installed")
    path = FOLDER / f"{name}.py"
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(path)]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout and "skipped" not in done.stdout


def test_without_a_gpu_it_says_so() -> None:
    layout = build([20], None)
    q = torch.zeros(20, 2, 16)
    assert "needs an NVIDIA GPU, found cpu" in dict(why(q, q, q, layout))["triton"]
    assert "float64" in dict(why(q.double(), q.double(), q.double(), layout))["triton"]
    narrow = q[..., :8].contiguous()
    assert "head width" in dict(why(narrow, narrow, narrow, layout))["triton"]


def visited(layout: StreamLayout, sizes: TileSizes) -> list[torch.Tensor]:
    """How often each (query, key) pair is counted by each table, with the kernels' element tests; full tiles without any."""
    plan, total = interval_plan(layout, sizes), len(layout)
    born, near, dies, at = plan.spans
    place = torch.arange(total)
    truth = layout.dense_mask()
    counts = []
    for table, size in zip(plan.tables[:2], (sizes.forward, sizes.query_grad)):
        count = torch.zeros(total, total, dtype=torch.int32)
        for tile, begin, full_begin, full_end, end, first, last in table.tolist():
            rows = slice(tile * size.queries, min((tile + 1) * size.queries, total))
            for low, high, full in ((begin, full_begin, False), (full_begin, full_end, True), (full_end, end, False)):
                high = low + -(-(high - low) // size.keys) * size.keys if high > low else low
                count[rows, low:high] += 1 if full else truth[rows, low:high].int()
            marks = at[first:last].long()
            marks = marks[marks < begin]
            count[rows, marks] += truth[rows][:, marks].int()
        counts.append(count)
    count, size = torch.zeros(total, total, dtype=torch.int32), sizes.key_grad
    for table, low_of, high_of, keys in ((plan.tables[2], born, near, place), (plan.tables[3], near, dies, at.long())):
        for tile, begin, full_begin, full_end, end in table.tolist():
            of_tile = keys[tile * size.keys : (tile + 1) * size.keys]
            of_tile = of_tile[of_tile < total]
            for low, high, full in ((begin, full_begin, False), (full_begin, full_end, True), (full_end, end, False)):
                high = low + -(-(high - low) // size.queries) * size.queries if high > low else low
                query = torch.arange(low, min(high, total))
                seen = (low_of[of_tile][None] <= query[:, None]) & (query[:, None] < high_of[of_tile][None])
                count[query[:, None], of_tile[None]] += torch.ones_like(seen).int() if full else seen.int()
    return [*counts, count]


def hold_cover(layout: StreamLayout, sizes: TileSizes) -> None:
    truth = layout.dense_mask().int()
    for name, count in zip(("forward", "query gradient", "key gradient"), visited(layout, sizes)):
        assert torch.equal(count, truth), name


SIZES = TileSizes(TileSize(16, 8), TileSize(8, 16), TileSize(16, 8))


@pytest.mark.parametrize("name", LAYOUTS)
def test_tables_visit_every_visible_pair_exactly_once(name: str) -> None:
    hold_cover(LAYOUTS[name]("cpu"), SIZES)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 10**6), st.lists(st.integers(1, 60), min_size=1, max_size=5), st.one_of(st.none(), st.integers(1, 50)),
    st.one_of(st.none(), st.integers(0, 4)), st.booleans(), st.sampled_from([4, 16]), st.sampled_from([4, 8, 32]),
)  # fmt: skip
def test_any_stream_is_visited_exactly_once(
    seed: int, lengths: list[int], window: int | None, most: int | None, last: bool, queries: int, keys: int
) -> None:
    layout = build(lengths, window, landmarks=0.15, blocks=0.4, longest=25, most=most, last=last, seed=seed)
    size = TileSize(queries, keys)
    hold_cover(layout, TileSizes(size, size, size))


def test_full_tiles_exist_and_the_longest_rows_come_first() -> None:
    layout = build([400, 30, 90], 64, landmarks=0.02)
    plan = interval_plan(layout, SIZES)
    assert interval_plan(layout, SIZES) is plan
    for table in plan.tables:
        assert bool((table[:, 3] >= table[:, 2]).all())
        work = table[:, 4] - table[:, 1] + (table[:, 6] - table[:, 5] if table.shape[1] == 7 else 0)
        assert bool((work[1:] <= work[:-1]).all())
    assert all(int((t[:, 3] - t[:, 2]).sum()) > 1000 for t in plan.tables[:3])


def test_a_plain_key_is_walked_over_its_window_only() -> None:
    """A landmark in a key tile must not make the whole tile meet every later query."""
    layout = build([600], 32, landmarks=0.1)
    table = interval_plan(layout, SIZES).tables[2]
    assert int((table[:, 4] - table[:, 1]).max()) <= 32 + 2 * 16 + 8
