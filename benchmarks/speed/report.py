"""One way to time, print and save for every speed script.

In: calls that do the same work, ours and the rival's. Out: medians taken in turn (ours, rival, ours, rival ...), a table, and
a JSON file `{"machine", "versions", "command", "rows"}`. A ratio above 1 always means that ours is better. Nothing here fails
because something is slow: it reports.

    args = speed_parser("attention", "what is compared").parse_args()
    start(args)
    time_s = measure({"ours": f, "rival": g}, rounds=5 if args.quick else 20)
    finish([compare("fwd+bwd L=2048", time_s["ours"], time_s["rival"], must=3.0)], args)
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

PACKAGES = ("torch", "numpy", "transformers", "xformers", "triton", "deepspeed")


@dataclass(frozen=True)
class Row:
    """One line of the table. `ratio` > 1: ours is better."""

    name: str
    ours: float | None
    rival: float | None
    unit: str
    ratio: float | None
    must: float | None = None
    aim: float | None = None
    error: float | str | None = None
    """Largest relative difference between the two results, or what went wrong."""
    note: str = ""
    extra: dict[str, float] = field(default_factory=dict)


def compare(
    name: str,
    ours: float | None,
    rival: float | None,
    *,
    unit: str = "ms",
    must: float | None = None,
    aim: float | None = None,
    error: float | str | None = None,
    more_is_better: bool = False,
    note: str = "",
    extra: Mapping[str, float] | None = None,
) -> Row:
    """A row from two figures. Times come in seconds and are stored in `unit` (s, ms or us); other units stay as they are."""
    factor = {"ms": 1e3, "us": 1e6}.get(unit, 1.0)
    ratio = None
    if ours and rival:
        ratio = ours / rival if more_is_better else rival / ours
    ours, rival = (None if x is None else x * factor for x in (ours, rival))
    return Row(name, ours, rival, unit, ratio, must, aim, error, note, dict(extra or {}))


def measure(
    calls: Mapping[str, Callable[[], object]], rounds: int, warmup: int = 1, budget_s: float | None = None
) -> dict[str, float]:
    """Median seconds of each call, taken in turn so that a busy machine hurts all of them alike.

    `budget_s` ends the rounds early (never before the third).
    """
    times = samples(calls, rounds, warmup, budget_s)
    return {name: statistics.median(values) for name, values in times.items()}


def samples(
    calls: Mapping[str, Callable[[], object]], rounds: int, warmup: int = 1, budget_s: float | None = None
) -> dict[str, list[float]]:
    """Every sample of `measure`, for a script that wants more than the median."""
    for _ in range(warmup):
        for call in calls.values():
            call()
    times: dict[str, list[float]] = {name: [] for name in calls}
    begin = time.perf_counter()
    for done in range(rounds):
        for name, call in calls.items():
            times[name].append(_seconds(call))
        if budget_s is not None and done >= 2 and time.perf_counter() - begin > budget_s:
            break
    return times


def _seconds(call: Callable[[], object]) -> float:
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.synchronize()
    begin = time.perf_counter()
    call()
    if cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def peak_bytes(call: Callable[[], object]) -> int:
    """Highest number of bytes that torch held above the start of `call`: on the GPU if there is one, else on the CPU."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    cpu = torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[cpu], profile_memory=True, acc_events=True) as profile:
        call()
    held = peak = 0
    events = profile.profiler.kineto_results.events()  # type: ignore[union-attr]
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def relative_error(ours: torch.Tensor, truth: torch.Tensor) -> float:
    """|ours - truth| / |truth|, both as float64 vectors."""
    ours, truth = ours.detach().double(), truth.detach().double()
    return float((ours - truth).norm() / truth.norm().clamp_min(1e-300))


def speed_parser(name: str, description: str) -> argparse.ArgumentParser:
    """The flags of every speed script; add your own to what it returns."""
    parser = argparse.ArgumentParser(prog=f"python -m weft.benchmarks.speed.{name}", description=description)
    parser.add_argument("--quick", action="store_true", help="small sizes, within 45 s on 2 cores")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the rows here")
    parser.add_argument("--threads", type=int, default=None, help="CPU threads of both sides (default: torch's own)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the random data")
    return parser


def start(args: argparse.Namespace) -> None:
    """Set threads and seed as the flags say; call it before making data."""
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    args.load_before = _load()


def finish(rows: Sequence[Row], args: argparse.Namespace) -> dict[str, object]:
    """Print the table, write the JSON file if asked, and return what was written."""
    result: dict[str, object] = {
        "machine": machine(getattr(args, "load_before", None)),
        "versions": versions(),
        "command": command(),
        "rows": [asdict(row) for row in rows],
    }
    print_table(rows, str(result["machine"]))
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return result


def machine(load_before: float | None = None) -> dict[str, object]:
    """What the figures were taken on, and how busy it was. A load above the number of threads means: read ratios only."""
    return {
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "system": platform.platform(),
        "load_before": load_before,
        "load_after": _load(),
    }


def versions() -> dict[str, str]:
    """Python and every package of `PACKAGES` that is installed."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def command() -> str:
    """The command that makes these rows again."""
    return " ".join(["python", "-m", f"weft.benchmarks.speed.{Path(sys.argv[0]).stem}", *sys.argv[1:]])


def print_table(rows: Sequence[Row], title: str = "") -> None:
    """The rows as text: name, ours, rival, ratio, what was asked for."""
    if title:
        print(title)
    width = max([len(row.name) for row in rows], default=4)
    print(f"{'name':{width}}  {'ours':>10} {'rival':>10} {'unit':6} {'ratio':>7} {'must':>6} {'aim':>6}  error")
    for row in rows:
        figures = f"{_figure(row.ours):>10} {_figure(row.rival):>10} {row.unit:6} {_figure(row.ratio):>7}"
        goals = f"{_figure(row.must):>6} {_figure(row.aim):>6}"
        print(f"{row.name:{width}}  {figures} {goals}  {_figure(row.error)} {row.note}".rstrip())


def _figure(value: float | str | None) -> str:
    if value is None:
        return "-"
    return value if isinstance(value, str) else f"{value:.4g}"


def _load() -> float | None:
    try:
        return round(os.getloadavg()[0], 2)
    except OSError:
        return None


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor())
