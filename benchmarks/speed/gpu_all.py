"""Everything that only a machine with an NVIDIA GPU can say about the kernels, in one go; `make gpu` is this.

    python -m weft.benchmarks.speed.gpu_all [--out FOLDER] [--dry-run]

In: a checkout with the tests' packages, an NVIDIA GPU (a Hopper one, for all of it) and its toolkit. Steps, in this order:
rivals (packages that the table compares with; one that does not install is listed there as not measured), build (nvcc), parity
(every test that is marked `gpu`: each backend against float64), checkers (compute-sanitizer: memory, races, barriers), table
(all rivals, all rows). Out: in FOLDER, by default benchmarks/results/gpu-DATE, a log of each step, bench.txt, bench.json and
bench.png. A step that fails does not keep the others from running. `--dry-run` needs no GPU: it collects the tests and fills
the table from tiny shapes, marked as such, in a temporary folder.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
RIVALS = ("flash-attn-4", "liger-kernel", "sonic-moe")
CHECKERS = "tests/kernels/test_sanitizer.py"


@dataclass(frozen=True)
class Step:
    """One command. `dry`: what runs in its place without a GPU; None: nothing."""

    name: str
    command: tuple[str, ...]
    dry: tuple[str, ...] | None
    may_fail: bool = False


def steps(out: Path) -> list[Step]:
    """What is done, in order."""
    python, test = sys.executable, ("-m", "pytest", "-q", "-rs", "-m", "gpu", "--timeout", "1800", "-p", "no:cacheprovider")
    install = (python, "-m", "pip", "install", "-q", "--pre", "-c", "constraints.txt")
    parity = (python, *test, "tests/kernels", "--ignore", CHECKERS)
    checkers = (python, *test, CHECKERS)
    table = (python, "-m", "weft", "kernels", "bench", "--out", str(out))
    return [
        *(Step(f"rival {name}", (*install, name), None, may_fail=True) for name in RIVALS),
        Step("build", (python, "-m", "weft", "kernels", "build"), None),
        Step("parity", parity, (*parity, "--collect-only")),
        Step("checkers", checkers, (*checkers, "--collect-only")),
        Step("table", table, (*table, "--dry_run", "true")),
    ]


def run(step: Step, out: Path, dry: bool) -> str:
    """Run one step into its log; how it ended, in a few words."""
    command = step.dry if dry else step.command
    if command is None:
        return "left out: a dry run"
    begin = time.perf_counter()
    log = out / f"{step.name.replace(' ', '-')}.log"
    with log.open("w", encoding="utf-8") as file:
        print("$", " ".join(command), file=file, flush=True)
        code = subprocess.run(command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT).returncode
    seconds = f"{time.perf_counter() - begin:.0f} s"
    if code == 0:
        return f"done in {seconds}"
    return f"{'not there' if step.may_fail else 'FAILED'} (exit {code}, {seconds}), see {log}"


def main(argv: Sequence[str] | None = None) -> int:
    """0 if every step ended well, 1 if one failed, 2 without a GPU."""
    parser = argparse.ArgumentParser(prog="gpu_all", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=None, help="folder for logs and tables")
    parser.add_argument("--dry-run", action="store_true", help="without a GPU: collect the tests, tiny shapes for the table")
    args = parser.parse_args(argv)
    if not args.dry_run and not torch.cuda.is_available():
        print("no NVIDIA GPU is here (torch.cuda.is_available() is false); --dry-run tries the steps without one")
        return 2
    kept = ROOT / "benchmarks" / "results" / f"gpu-{date.today().isoformat()}"
    out = (args.out or (Path(tempfile.mkdtemp()) if args.dry_run else kept)).resolve()
    out.mkdir(parents=True, exist_ok=True)
    failed = False
    for step in steps(out):
        print(f"{step.name}: ", end="", flush=True)
        ended = run(step, out, args.dry_run)
        failed |= ended.startswith("FAILED")
        print(ended, flush=True)
    print(f"logs and tables are in {out}")
    return int(failed)


if __name__ == "__main__":
    raise SystemExit(main())
