"""The GPU table's inputs and its truth, and that it invents nothing where there is no GPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from weft.benchmarks.speed import gpu
from weft.benchmarks.speed.report import compare
from weft.kernels.attention import attention
from weft.kernels.layout import StreamLayout


def test_every_row_of_the_table_is_there_once() -> None:
    names = [case.name for case in gpu.cases(quick=False)]
    assert len(set(names)) == len(names) == 4 * 2 * 3 * 2 * 2
    assert {case.stream for case in gpu.cases(quick=True)} == set(gpu.STREAMS)


@pytest.mark.parametrize("kind", gpu.STREAMS)
def test_streams_hold_what_they_are_named_for(kind: str) -> None:
    layout = gpu.stream_layout(kind, 16384, 512, "cpu")
    at = torch.arange(len(layout))
    assert len(layout) == 16384 and len(layout.cu_seqlens()) > 2
    assert bool((layout.end_key > at + 1).any()) == (kind in ("image+text", "video"))
    assert bool((layout.dies > at + 5000).any()) == (kind in ("image+text", "video"))


def test_exact_rows_are_the_reference() -> None:
    at = torch.arange(60, dtype=torch.int32)
    layout = StreamLayout.build(at // 37, at % 7 == 0, torch.where(at // 5 == 2, 0, -1), 9)
    q, k = torch.randn(60, 6, 16), torch.randn(60, 2, 16)
    queries = torch.tensor([0, 12, 59, 38])
    expect = attention(q.double(), k.double(), k.double(), layout, backend="reference")[queries]
    torch.testing.assert_close(gpu.exact_rows(q, k, k, layout, queries), expect)


def test_without_a_gpu_nothing_is_measured(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    assert gpu.main(["--json", str(tmp_path / "a.json")]) == 0
    assert "not measured" in capsys.readouterr().out and not (tmp_path / "a.json").exists()


def test_the_plot_draws_what_was_measured(tmp_path: Path) -> None:
    extra = {"triton_useful_tflops": 2.0, "flex_useful_tflops": 1.0}
    gpu.plot([compare("a", 1.0, 2.0, extra=extra), compare("loss", 1.0, 2.0)], tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 1000
