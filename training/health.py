"""Is every rank alive, and do the ranks still hold the same weights?

Heartbeat: each rank keeps `heartbeat/rank-N.json` {rank, host, pid, step, phase, time_s}, so that whoever watches a run sees
which rank stopped, where and when: `python -m weft.training.health RUN --after 120` names the stalled ones and exits with 1.

Agreement: before the first step ranks compare what they were started with. Weights that several ranks hold are compared bit
by bit through one int64 sum per tensor. A flipped bit (silent data corruption: every week or two on large machines, arXiv
2312.11805, section 4) changes the sum of its tensor for sure; the ranks outside the majority are named.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import socket
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from weft.training.distributed import gather_integers, world

FOLDER = "heartbeat"
DONE = "done"
"""The last phase of a rank: its silence is no alarm."""


class WeightsDiffer(RuntimeError):
    """Ranks hold different bits where they must hold the same; the message names tensor and ranks."""


class Heartbeat:
    """One small file per rank, replaced at most every `every_s` seconds unless the phase changes to a long one."""

    def __init__(self, folder: Path, rank: int, every_s: float = 1.0) -> None:
        self.path = folder / FOLDER / f"rank-{rank}.json"
        self.every_s = every_s
        self.rank = rank
        self.last = float("-inf")

    def beat(self, step: int, phase: str, force: bool = False) -> None:
        """Say that this rank is about to do `phase` of `step`. A full disk is no reason to stop a run."""
        now = time.monotonic()
        if not force and now - self.last < self.every_s:
            return
        self.last = now
        said = {"rank": self.rank, "host": socket.gethostname(), "pid": os.getpid(), "step": step, "phase": phase}
        draft = self.path.with_suffix(".tmp")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            draft.write_text(json.dumps({**said, "time_s": time.time()}) + "\n", encoding="utf-8")
            os.replace(draft, self.path)
        except OSError:
            pass


def heartbeats(run: Path) -> list[dict[str, object]]:
    """The last word of every rank of a run, by rank; unreadable files are left out."""
    found = []
    for path in (run / FOLDER).glob("rank-*.json"):
        try:
            found.append(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError):
            continue
    return sorted(found, key=lambda said: int(said.get("rank", 0)))


def stalled(run: Path, after_s: float, now_s: float | None = None) -> list[str]:
    """One sentence per rank that has been silent for more than `after_s` seconds or is steps behind the first of them."""
    now_s = time.time() if now_s is None else now_s
    said = heartbeats(run)
    foremost = max((int(str(one["step"])) for one in said), default=0)
    lines = []
    for one in said:
        age = now_s - float(str(one["time_s"]))
        step = int(str(one["step"]))
        if age > after_s and one["phase"] != DONE:
            behind = f", {foremost - step} steps behind" if step < foremost else ""
            who = f"rank {one['rank']} on {one['host']} (pid {one['pid']})"
            lines.append(f"{who}: {age:.0f} s in {one['phase']} of step {step}{behind}")
    return lines


def digests(tensors: Mapping[str, Tensor]) -> Tensor:
    """int64 [N] on the CPU, one per tensor in the order of names: the sum of its bits read as integers. Any one flipped bit
    changes it."""
    sums = [_bits(tensors[name]).sum(dtype=torch.int64) for name in sorted(tensors)]
    return torch.stack(sums).cpu() if sums else torch.zeros(0, dtype=torch.int64)


def _bits(tensor: Tensor) -> Tensor:
    words = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.uint8}
    return tensor.detach().contiguous().view(-1).view(words[tensor.element_size()])


def disagreements(names: Sequence[str], rows: Tensor, holders: Sequence[int]) -> list[str]:
    """Digests [W N] of all ranks -> a sentence per tensor whose bits differ between ranks that must agree.

    holders [W]: ranks with the same number hold the same tensors (experts divided over ranks have several numbers).
    """
    lines = []
    for i, name in enumerate(names):
        for holder in sorted(set(holders)):
            ranks = [r for r, h in enumerate(holders) if h == holder]
            values = [int(rows[r, i]) for r in ranks]
            common, votes = Counter(values).most_common(1)[0]
            if votes == len(ranks):
                continue
            odd = [r for r, v in zip(ranks, values) if v != common] if 2 * votes > len(ranks) else ranks
            verb = "differs from the others" if 2 * votes > len(ranks) else "do not agree"
            lines.append(f"{name}: rank {', '.join(map(str, odd))} {verb}")
    return lines


class RunsDiffer(ValueError):
    """Ranks were started with different runs."""


def check_same_run(facts: Mapping[str, Any]) -> None:
    """Raise `RunsDiffer` on every rank unless all ranks hold the same JSON data under every name. Every rank calls it.

    A machine with an older copy of the shards, or a decoder that was too slow there while the first documents were measured,
    would otherwise train on another division of the data, in silence.
    """
    if world().size == 1:
        return
    names = sorted(facts)
    words = [hashlib.sha256(json.dumps(facts[name], sort_keys=True).encode()).digest()[:8] for name in names]
    rows = gather_integers(torch.tensor([int.from_bytes(word, "little", signed=True) for word in words]))
    if lines := disagreements(names, rows, [0] * len(rows)):
        raise RunsDiffer(
            f"ranks were started with different runs: {'; '.join(lines)}. Give every rank the same run file, overrides, "
            "tokenizer and shards, then start again"
        )


def check_agreement(common: Mapping[str, Tensor], divided: Mapping[str, Tensor], index: int) -> None:
    """Raise `WeightsDiffer` on every rank if replicated tensors differ anywhere. Every rank calls it; one process has no peer.

    common: tensors that all ranks hold. divided: tensors that ranks with the same `index` hold.
    """
    if world().size == 1:
        return
    mine = torch.cat([torch.tensor([index]), digests(common), digests(divided)])
    rows = gather_integers(mine)
    split = 1 + len(common)
    lines = disagreements(sorted(common), rows[:, 1:split], [0] * len(rows))
    lines += disagreements(sorted(divided), rows[:, split:], rows[:, 0].tolist())
    if lines:
        more = f" (and {len(lines) - 3} more tensors)" if len(lines) > 3 else ""
        raise WeightsDiffer(
            f"ranks hold different weights: {'; '.join(lines[:3])}{more}. Memory or a link is faulty there: take that machine "
            "out and start the run again, it goes on from the last checkpoint"
        )


def main(arguments: Sequence[str] | None = None) -> int:
    """Print every rank's last word; 1 if any is stalled."""
    parser = argparse.ArgumentParser(prog="python -m weft.training.health", description="Which rank stopped, and where.")
    parser.add_argument("run", type=Path, help="run folder")
    parser.add_argument("--after", type=float, default=120.0, help="seconds of silence that count as stalled")
    found = parser.parse_args(arguments)
    said = heartbeats(found.run)
    if not said:
        print(f"error: {found.run / FOLDER} holds no heartbeat; point to the folder of a run that has started", file=sys.stderr)
        return 2
    for one in said:
        age = time.time() - float(str(one["time_s"]))
        print(f"rank {one['rank']} {one['host']} step {one['step']} {one['phase']}, {age:.0f} s ago")
    late = stalled(found.run, found.after)
    for line in late:
        print(f"stalled: {line}")
    return 1 if late else 0


if __name__ == "__main__":
    sys.exit(main())
