"""The GPU kernels against the libraries: one process, the same random inputs, medians, every row whether it won or lost.

    python -m weft.benchmarks.speed.gpu [--quick] [--only attention,loss,...] [--json FILE] [--plot FILE] [--text FILE]

Groups: attention, loss, moe, norm, decode, step. `useful` counts visible pairs (or own ids) only; this run's own matmul rate is
measured first, to divide by. A rival that is not installed, a mask that it cannot say, and what failed are listed with their
reason. Needs an NVIDIA GPU; `--smoke` runs every group on a CPU in tiny shapes to show that the script works, nothing more.
"""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from weft.benchmarks.speed import gpu_attention, gpu_layers, gpu_step
from weft.benchmarks.speed.gpu_table import SMOKE, Bench, Figure, Line, from_row, matmul_rate, plot, text, write
from weft.benchmarks.speed.report import speed_parser, start

NO_GPU = "not measured: no NVIDIA GPU is here (torch.cuda.is_available() is false); --smoke tries the script on a CPU"


def attention_lines(bench: Bench, args: argparse.Namespace) -> Iterator[Line]:
    """Every case."""
    cases = gpu_attention.smoke_cases() if args.smoke else gpu_attention.cases(args.quick)
    variants = gpu_attention.FLEX[:2] if args.quick else gpu_attention.FLEX
    for case in cases:
        yield gpu_attention.attention_line(bench, case, variants)


def loss_lines(bench: Bench, args: argparse.Namespace) -> Iterator[Line]:
    """One size, or a small one."""
    if args.smoke:
        yield gpu_layers.loss_line(bench, 60, 24, gpu_layers.SMOKE_SLICES)
    else:
        yield gpu_layers.loss_line(bench, 4096 if args.quick else 32768, 2048)


def moe_lines(bench: Bench, args: argparse.Namespace) -> Iterator[Line]:
    """Three shapes of experts, or one."""
    shapes = gpu_layers.SMOKE_MOE if args.smoke else gpu_layers.MOE[:1] if args.quick else gpu_layers.MOE
    yield from gpu_layers.moe_lines(bench, shapes)


def norm_lines(bench: Bench, args: argparse.Namespace) -> Iterator[Line]:
    """Both head widths."""
    for width in (64, 128):
        yield gpu_layers.norm_line(bench, 20 if args.smoke else 32768, width)


def decode_lines(bench: Bench, args: argparse.Namespace) -> Iterator[Line]:
    """What `gpu_decode.py` measures."""
    if importlib.util.find_spec("weft.benchmarks.speed.gpu_decode") is None:
        yield Line("decode", "windowed decode", {"ours": Figure("not measured: weft has no decode kernel yet")})
        return
    from weft.benchmarks.speed import gpu_decode

    for row in gpu_decode.rows(bench.device, rounds=bench.rounds, quick=args.quick or args.smoke):
        yield from_row(row, "decode")


def step_lines(bench: Bench, args: argparse.Namespace) -> Iterator[Line]:
    """One training step."""
    yield gpu_step.step_line(bench, 300 if args.smoke else 16384, args.smoke)


GROUPS: dict[str, Callable[[Bench, argparse.Namespace], Iterator[Line]]] = {
    "attention": attention_lines,
    "loss": loss_lines,
    "moe": moe_lines,
    "norm": norm_lines,
    "decode": decode_lines,
    "step": step_lines,
}


def groups(words: str) -> list[str]:
    """Names of `--only`. Raises ValueError for an unknown one."""
    chosen = [word.strip() for word in words.split(",") if word.strip()]
    for word in chosen:
        if word not in GROUPS:
            raise ValueError(f"--only knows {', '.join(GROUPS)}; found {word!r}")
    return chosen or list(GROUPS)


def run(args: argparse.Namespace) -> tuple[Bench, list[Line]]:
    """Every line; what is asked for is written after each."""
    chosen = groups(args.only)
    device = "cpu" if args.smoke else "cuda"
    rounds = 2 if args.smoke else 20 if args.quick else 50
    bench = Bench(device, rounds, matmul_rate(Bench(device, min(rounds, 30), 0.0)), args.budget)
    lines: list[Line] = []
    for group in chosen:
        for one in _guarded(group, GROUPS[group](bench, args)):
            lines.append(one)
            print(".", end="", flush=True)
            if args.json:
                write(args.json, lines, bench, args.smoke)
    left_out = [group for group in GROUPS if group not in chosen]
    lines += [Line(group, "whole group", {"all": Figure("not measured: left out by --only")}) for group in left_out]
    return bench, lines


def _guarded(group: str, lines: Iterator[Line]) -> Iterator[Line]:
    """A group whose inputs cannot be made (memory, say) is one failed line; the others go on."""
    try:
        yield from lines
    except (RuntimeError, ValueError) as error:
        reason = (str(error).splitlines() or [""])[0][:160]
        yield Line(group, "rest of the group", {"all": Figure(f"failed: {type(error).__name__}: {reason}")})
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def main(argv: list[str] | None = None) -> int:
    """0 after a run, 1 where there is no GPU to run on."""
    parser = speed_parser("gpu", (__doc__ or "").splitlines()[0])
    parser.add_argument("--plot", type=Path, metavar="FILE", help="also draw the lines as a PNG")
    parser.add_argument("--text", type=Path, metavar="FILE", help="also write the printed table here")
    parser.add_argument("--only", default="", metavar="GROUPS", help=f"some of {','.join(GROUPS)}")
    parser.add_argument("--budget", type=float, default=30.0, metavar="S", help="seconds of rounds per line")
    parser.add_argument("--smoke", "--dry-run", action="store_true", help="tiny shapes on a CPU: does the script work?")
    args = parser.parse_args(argv)
    if not args.smoke and not torch.cuda.is_available():
        print(NO_GPU)
        return 1
    start(args)
    if args.smoke:
        print(SMOKE)
    bench, lines = run(args)
    table = text(lines, bench, args.smoke)
    print("\n" + table)
    if args.json:
        write(args.json, lines, bench, args.smoke)
    if args.text:
        args.text.parent.mkdir(parents=True, exist_ok=True)
        args.text.write_text(table + "\n", encoding="utf-8")
    if args.plot:
        plot(lines, args.plot, args.smoke)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
