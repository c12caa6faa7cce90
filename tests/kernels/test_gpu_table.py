"""The GPU table: its inputs and truth, its bookkeeping, a whole dry run on a CPU, and that it invents nothing without a GPU."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from weft.benchmarks.speed import gpu, gpu_all, gpu_attention, gpu_layers, gpu_step
from weft.benchmarks.speed.gpu_table import SMOKE, Bench, Figure, Goal, Line, NotMeasured, from_row, line, plot, text
from weft.benchmarks.speed.report import compare
from weft.commands.kernels import bench as bench_command
from weft.kernels.attention import attention
from weft.kernels.layout import StreamLayout
from weft.model.count import active_params

CPU = Bench("cpu", 3, 0.5)
without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")


def test_every_row_of_the_table_is_there_once() -> None:
    names = [case.name for case in gpu_attention.cases(quick=False)]
    assert len(set(names)) == len(names) == 4 * 2 * 3 * 2 * 2
    assert {case.stream for case in gpu_attention.cases(quick=True)} == set(gpu_attention.STREAMS)
    assert all((case.heads, case.kv_heads) == (16, 4) for case in gpu_attention.cases(quick=False))


@pytest.mark.parametrize("kind", gpu_attention.STREAMS)
@pytest.mark.parametrize("length", [300, 16384])
def test_streams_hold_what_they_are_named_for(kind: str, length: int) -> None:
    layout = gpu_attention.stream_layout(kind, length, 24 if length == 300 else 512, "cpu")
    at = torch.arange(len(layout))
    assert len(layout) == length and (len(layout.cu_seqlens()) > 2 or length == 300)
    assert bool((layout.end_key > at + 1).any()) == (kind in ("image+text", "video"))
    assert bool((layout.dies > at + length // 4).any()) == (kind in ("image+text", "video"))


def test_exact_rows_are_the_reference_and_its_gradient() -> None:
    at = torch.arange(60, dtype=torch.int32)
    layout = StreamLayout.build(at // 37, at % 7 == 0, torch.where(at // 5 == 2, 0, -1), 9)
    q, k, v, grad = (torch.randn(60, n, 16, dtype=torch.float64) for n in (6, 2, 2, 6))
    queries = torch.tensor([0, 12, 59, 38])
    out = attention(q.requires_grad_(), k, v, layout, backend="reference")
    expect = out[queries], torch.autograd.grad(out, q, grad)[0][queries]
    for ours, truth in zip(gpu_attention.exact_rows(q.detach(), k, v, grad, layout, queries), expect):
        torch.testing.assert_close(ours, truth)


def test_what_is_not_measured_says_why_and_does_not_stop_the_others() -> None:
    def absent() -> Callable[[], list[torch.Tensor]]:
        raise NotMeasured("not installed (pip install nothing)")

    def unable() -> Callable[[], list[torch.Tensor]]:
        raise NotMeasured("its mask cannot say this")

    def broken() -> list[torch.Tensor]:
        raise RuntimeError("out of luck\nand more")

    made = {"ours": lambda: lambda: [torch.ones(3)], "absent": absent, "unable": unable, "broken": lambda: broken}
    check = lambda got: {"out": float(got[0].sum())}  # noqa: E731
    one = line(CPU, "g", "n", made, flops=2e9, check=check, ours=("ours",), goals=[Goal("absent", 1.1, 1.5)])
    assert [one.figures[who].status for who in made] == [
        "",
        "not installed (pip install nothing)",
        "not measured: its mask cannot say this",
        "failed: RuntimeError: out of luck",
    ]
    ours = one.figures["ours"]
    assert one.ours == "ours" and ours.error == {"out": 3.0} and one.ratio("absent") is None
    assert ours.ms and ours.useful_tflops == pytest.approx(2 / ours.ms) and ours.of_matmul == pytest.approx(4 / ours.ms)
    table = text([one], CPU, smoke=True)
    assert table.startswith(SMOKE) and "out of luck" in table and "*ours" in table


def test_a_ratio_above_one_means_that_ours_is_faster() -> None:
    one = Line("g", "n", {"a": Figure("", 2.0), "b": Figure("", 3.0)}, "a", (Goal("b", 1.1, 1.3),))
    assert one.ratio("b") == 1.5 and one.ratio("a") == 1.0
    row = compare("decode B=1", 10e-6, 20e-6, unit="us", must=1.3, note="x")
    made = from_row(row, "decode")
    assert made.ratio("rival") == pytest.approx(2.0) and made.figures["ours"].ms == pytest.approx(0.01)
    missing = from_row(compare("decode", None, None, note="no GPU"), "decode")
    assert missing.figures["ours"].status == "not measured: no GPU"


def test_the_step_has_one_to_two_billion_active_parameters_and_fits() -> None:
    config = gpu_step.step_config()
    assert 1e9 <= active_params(config) <= 2e9
    small = gpu_step.step_config(smoke=True)
    given, target, kind = gpu_step.batch(small, 300, "cpu")
    first, end = torch.tensor(small.slices)[kind].unbind(1)
    assert bool(((first <= target) & (target < end)).all()) and bool((given.two_way >= 0).any()) and bool(given.landmark.any())
    assert gpu_step.model_flops(small, given) > 0


@without_gpu
def test_without_a_gpu_nothing_is_measured(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert gpu.main(["--json", str(tmp_path / "a.json")]) == 1
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 1 and "not measured" in said[0] and not (tmp_path / "a.json").exists()
    with pytest.raises(SystemExit) as left:
        bench_command(tmp_path)
    assert left.value.code == 1 and not list(tmp_path.iterdir())


@without_gpu
def test_a_dry_run_fills_every_group_and_says_that_it_is_no_figure(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_attention, "STREAMS", ("image+text", "documents"))
    bench_command(tmp_path, dry_run=True)
    said = capsys.readouterr().out
    made = json.loads((tmp_path / "bench.json").read_text())
    assert made["smoke"] is True and made["what"] == SMOKE and made["chip"] is None and SMOKE in said
    assert {"date", "driver", "versions", "command", "matmul_tflops"} <= set(made)
    assert {row["group"] for row in made["rows"]} == set(gpu.GROUPS)
    assert (tmp_path / "bench.png").stat().st_size > 5000 and (tmp_path / "bench.txt").read_text().startswith(SMOKE)
    rows = {row["name"]: row["figures"] for row in made["rows"]}
    for name, figures in rows.items():
        assert all((figure["ms"] is None) == bool(figure["status"]) for figure in figures.values()), name
        assert not any(figure["status"].startswith("failed") for figure in figures.values()), (name, figures)
    attended = next(figures for name, figures in rows.items() if name.startswith("image+text") and "backward" in name)
    assert "needs an NVIDIA GPU" in attended["triton"]["status"] and attended["sdpa"]["error"]["dq"] < 1e-5
    assert "cannot say" in attended["varlen"]["status"]


def test_only_takes_groups_that_exist() -> None:
    assert gpu.groups("moe, loss") == ["moe", "loss"] and gpu.groups("") == list(gpu.GROUPS)
    with pytest.raises(ValueError, match="found 'los'"):
        gpu.groups("los")


def test_a_group_that_cannot_be_made_is_one_failed_line() -> None:
    def lines() -> object:
        yield Line("moe", "first", {})
        raise RuntimeError("out of memory")

    made = list(gpu._guarded("moe", lines()))  # type: ignore[arg-type]
    assert [one.name for one in made] == ["first", "rest of the group"] and "out of memory" in made[1].figures["all"].status


def test_routed_rows_are_the_layer() -> None:
    made = next(iter(gpu_layers.moe_lines(CPU, gpu_layers.SMOKE_MOE)))
    assert made.figures["grouped_mm composition"].error["out"] < 1e-5
    assert "needs an NVIDIA GPU" in made.figures["triton"].status


def test_the_plot_draws_lines_that_were_measured(tmp_path: Path) -> None:
    lines = [Line("g", "n", {"a": Figure("", 2.0), "b": Figure("", 3.0)}, "a"), Line("g", "m", {"a": Figure("not measured")})]
    plot(lines, tmp_path / "plot.png", smoke=False)
    assert (tmp_path / "plot.png").stat().st_size > 1000


def test_the_arguments_of_a_row_reach_its_contenders() -> None:
    args = argparse.Namespace(smoke=True, quick=False, only="")
    assert [one.group for one in gpu.norm_lines(CPU, args)] == ["norm", "norm"]


@without_gpu
def test_all_of_it_needs_a_gpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_all.main(["--out", str(tmp_path / "none")]) == 2
    assert "no NVIDIA GPU" in capsys.readouterr().out and not (tmp_path / "none").exists()


def test_a_step_that_fails_is_told_and_stops_no_other(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def step(name: str, program: str, dry: bool = True, may_fail: bool = False) -> gpu_all.Step:
        command = (sys.executable, "-c", program)
        return gpu_all.Step(name, command, command if dry else None, may_fail)

    made = [step("a rival", "exit(1)", may_fail=True), step("build", "exit(0)", dry=False), step("last", "print('seen')")]
    monkeypatch.setattr(gpu_all, "steps", lambda out: made)
    assert gpu_all.main(["--dry-run", "--out", str(tmp_path)]) == 0
    made.insert(1, step("parity", "exit(1)"))
    assert gpu_all.main(["--dry-run", "--out", str(tmp_path)]) == 1
    said = capsys.readouterr().out
    assert "a rival: not there" in said and "build: left out" in said and "parity: FAILED (exit 1" in said
    assert "seen" in (tmp_path / "last.log").read_text()


def test_all_of_it_is_parity_checkers_and_the_table(tmp_path: Path) -> None:
    found = {step.name: step for step in gpu_all.steps(tmp_path)}
    assert {"build", "parity", "checkers", "table"} <= set(found)
    for name in ("parity", "checkers"):
        assert "gpu" in found[name].command and "--collect-only" in (found[name].dry or ())
    assert all((gpu_all.ROOT / path).exists() for path in ("tests/kernels", gpu_all.CHECKERS, "constraints.txt"))
