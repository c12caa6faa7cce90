"""The GPU table: contenders that do the same work are timed in turn, and every one that was not is listed with its reason.

In: for each line, contenders as functions that build a call or raise `NotMeasured`. Out: `Line`s, as text, as JSON with date,
chip, driver, versions and command, and as a plot. A contender that fails does not take the others along: its message is its
entry.
Times are medians between two GPU events around one call after the L2 cache was overwritten; on a CPU (smoke runs) wall time.
"""

from __future__ import annotations

import datetime
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from weft.benchmarks.speed.report import Row, machine, peak_bytes, versions

FLUSH_BYTES = 256 << 20  # larger than any L2 cache
SMOKE = "CPU SMOKE RUN: it shows that the script works; no figure here says anything about a GPU"
Call = Callable[[], list[Tensor]]


class NotMeasured(RuntimeError):
    """Why a contender takes no part in a line."""


@dataclass(frozen=True)
class Figure:
    """One contender's entry. `status` is empty if it was measured, else why not."""

    status: str = ""
    ms: float | None = None
    useful_tflops: float | None = None
    of_matmul: float | None = None
    """Useful rate over this run's own matmul rate."""
    peak_mib: float | None = None
    error: dict[str, float] = field(default_factory=dict)
    """Relative error of each checked output against the reference."""


@dataclass(frozen=True)
class Goal:
    """What ours should reach over a rival: a ratio of times above 1 means that ours is faster."""

    rival: str
    must: float
    aim: float


@dataclass(frozen=True)
class Line:
    """One row of the table."""

    group: str
    name: str
    figures: dict[str, Figure]
    ours: str | None = None
    """The contender that goals speak of: the fastest of ours that ran."""
    goals: tuple[Goal, ...] = ()
    note: str = ""
    extra: dict[str, float | str | None] = field(default_factory=dict)

    def ratio(self, rival: str) -> float | None:
        """Time of the rival over ours."""
        ours, theirs = (self.figures.get(name or "", Figure()).ms for name in (self.ours, rival))
        return theirs / ours if ours and theirs else None


@dataclass(frozen=True)
class Bench:
    """How this run measures."""

    device: str
    rounds: int
    matmul_tflops: float
    budget_s: float = 30.0
    """One line's rounds end here, never before the third."""


def line(
    bench: Bench, group: str, name: str, contenders: Mapping[str, Callable[[], Call]], *, flops: float | None = None,
    check: Callable[[list[Tensor]], dict[str, float]] | None = None, unchecked: Sequence[str] = (), ours: Sequence[str] = (),
    goals: Sequence[Goal] = (), note: str = "", extra: Mapping[str, float | str | None] | None = None,
) -> Line:  # fmt: skip
    """Build, check and time every contender. `unchecked` ones do other work (another mask), so their error means nothing."""
    figures: dict[str, Figure] = {}
    calls: dict[str, Call] = {}
    errors: dict[str, dict[str, float]] = {}
    for who, make in contenders.items():
        try:
            call = make()
            first = call()
            errors[who] = check(first) if check and who not in unchecked else {}
            del first
            calls[who] = call
        except NotMeasured as reason:
            figures[who] = Figure(f"not measured: {reason}" if "not installed" not in str(reason) else str(reason))
        except Exception as error:  # a library that breaks on one line must not end the run
            figures[who] = Figure(f"failed: {type(error).__name__}: {_first_line(error)}")
    seconds = medians(bench, calls)
    for who, value in seconds.items():
        rate = flops / value / 1e12 if flops else None
        share = rate / bench.matmul_tflops if rate and bench.matmul_tflops else None
        peak = peak_bytes(calls[who]) / 2**20 if bench.device == "cuda" else None
        figures[who] = Figure("", value * 1e3, rate, share, peak, errors[who])
    ran = [who for who in ours if who in seconds]
    best = min(ran, key=lambda who: seconds[who]) if ran else None
    ordered = {who: figures[who] for who in contenders}
    return Line(group, name, ordered, best, tuple(goals), note, dict(extra or {}))


def medians(bench: Bench, calls: Mapping[str, Call], warmup: int = 2) -> dict[str, float]:
    """Median seconds of each call, taken in turn."""
    flush = torch.empty(FLUSH_BYTES if bench.device == "cuda" else 0, dtype=torch.int8, device=bench.device)
    for _ in range(warmup):
        for call in calls.values():
            call()
    times: dict[str, list[float]] = {who: [] for who in calls}
    begin = time.perf_counter()
    for done in range(bench.rounds):
        for who, call in calls.items():
            times[who].append(_seconds(call, flush))
        if done >= 2 and time.perf_counter() - begin > bench.budget_s:
            break
    return {who: statistics.median(values) for who, values in times.items()}


def _seconds(call: Call, flush: Tensor) -> float:
    if flush.device.type != "cuda":
        begin = time.perf_counter()
        call()
        return time.perf_counter() - begin
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    flush.zero_()
    first.record()
    call()
    last.record()
    torch.cuda.synchronize()
    return first.elapsed_time(last) / 1e3


def matmul_rate(bench: Bench) -> float:
    """TFLOP/s of one bfloat16 product of 8192^3 (256^3 on a CPU) of random numbers in this process."""
    size = 8192 if bench.device == "cuda" else 256
    a, b = (torch.randn(size, size, device=bench.device, dtype=torch.bfloat16) for _ in range(2))
    return 2 * size**3 / medians(bench, {"matmul": lambda: [a @ b]}, warmup=3)["matmul"] / 1e12


def from_row(row: Row, group: str) -> Line:
    """A row of the other speed scripts as a line of this table."""
    ms = {"s": 1e3, "us": 1e-3}.get(row.unit, 1.0)
    timed = row.unit in ("s", "ms", "us")
    missing = f"not measured: {row.note}" if row.note else "not measured"
    figures = {who: Figure("", value * ms) if value is not None and timed else Figure(missing)
               for who, value in (("ours", row.ours), ("rival", row.rival))}  # fmt: skip
    extra: dict[str, float | str | None] = {**row.extra, "error": row.error}
    if not timed:
        extra |= {f"ours_{row.unit}": row.ours, f"rival_{row.unit}": row.rival}
    goals = (Goal("rival", row.must, row.aim or row.must),) if row.must else ()
    return Line(group, row.name, figures, "ours", goals, row.note, extra)


def document(lines: Sequence[Line], bench: Bench, smoke: bool) -> dict[str, object]:
    """Everything that the JSON file holds."""
    return {
        "what": SMOKE if smoke else "weft GPU kernels against the libraries, one run, same random inputs, medians",
        "smoke": smoke,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "chip": torch.cuda.get_device_name() if bench.device == "cuda" else None,
        "driver": driver() if bench.device == "cuda" else None,
        "cuda": torch.version.cuda,
        "machine": machine(),
        "versions": versions(),
        "command": " ".join(["python", "-m", "weft.benchmarks.speed.gpu", *sys.argv[1:]]),
        "matmul_tflops": bench.matmul_tflops,
        "rows": [asdict(one) | {"ratios": {goal.rival: one.ratio(goal.rival) for goal in one.goals}} for one in lines],
    }


def driver() -> str | None:
    """Version of the NVIDIA driver."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.split("\n")[0].strip()
    except (OSError, subprocess.SubprocessError):
        return None


def text(lines: Sequence[Line], bench: Bench, smoke: bool) -> str:
    """The table."""
    out = [SMOKE] if smoke else [f"{torch.cuda.get_device_name()}, driver {driver()}, torch {torch.__version__}"]
    out.append(f"bfloat16 matmul in this run: {bench.matmul_tflops:.3g} TFLOP/s; x: time over that of the fastest of ours (*)")
    for one in lines:
        out += ["", f"[{one.group}] {one.name}" + (f"  ({one.note})" if one.note else "")]
        for who, figure in one.figures.items():
            out.append(_entry(who, figure, one, () if smoke else one.goals))
        out += [f"  {key}: {_short(value)}" for key, value in one.extra.items() if value is not None]
    return "\n".join(out)


def _entry(who: str, figure: Figure, one: Line, goals: Sequence[Goal]) -> str:
    mark = "*" if who == one.ours else " "
    if figure.ms is None:
        return f" {mark}{who:<24} {figure.status}"
    ratio = one.ratio(who)
    words = [f" {mark}{who:<24} {figure.ms:9.4g} ms", f"{ratio:6.3g}x" if ratio else " " * 7]
    if figure.useful_tflops is not None:
        words.append(f"{figure.useful_tflops:8.3g} useful TFLOP/s ({_short(figure.of_matmul)} of matmul)")
    if figure.peak_mib is not None:
        words.append(f"{figure.peak_mib:8.4g} MiB")
    words += [f"{name} error {value:.1e}" for name, value in figure.error.items()]
    words += [f"must {goal.must:g} aim {goal.aim:g}" for goal in goals if goal.rival == who]
    return "  ".join(words)


def _short(value: float | str | None) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def write(path: Path, lines: Sequence[Line], bench: Bench, smoke: bool) -> None:
    """The JSON file; after every line, so that an interrupted run keeps what it measured."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(document(lines, bench, smoke), indent=1) + "\n", encoding="utf-8")
    part.replace(path)


def plot(lines: Sequence[Line], path: Path, smoke: bool) -> None:
    """Time of every contender over that of ours, one group of bars per line (log scale; to the right of 1 ours is faster)."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shown = [one for one in lines if one.ours and one.figures[one.ours].ms]
    names = list(dict.fromkeys(who for one in shown for who, figure in one.figures.items() if figure.ms))
    figure, axes = plt.subplots(figsize=(11, 1.6 + 0.14 * max(1, len(shown)) * max(2, len(names))))
    for place, who in enumerate(names):
        bars = [(i + place * 0.8 / len(names), one.ratio(who)) for i, one in enumerate(shown)]
        known = [(at, ratio) for at, ratio in bars if ratio]
        axes.barh([at for at, _ in known], [ratio for _, ratio in known], 0.8 / len(names), label=who)
    axes.set_yticks([i + 0.4 for i in range(len(shown))], [f"{one.group}: {one.name}" for one in shown], fontsize=7)
    axes.invert_yaxis()
    axes.axvline(1.0, color="black", linewidth=0.8)
    axes.set_xscale("log")
    axes.set_xlabel("time over ours (1 = ours, the fastest of our kernels in that line)")
    if names:
        axes.legend(fontsize=7)
    if smoke:
        axes.set_title(SMOKE, fontsize=8, color="red")
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [""])[0][:160]
