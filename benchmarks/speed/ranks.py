"""A function on several ranks joined by gloo, in forked children of a process that has imported everything.

In: a function of no arguments. Out: what it returned on every rank, as JSON carries it. A group costs its work and not the
start of its interpreters, which for torch and DeepSpeed is ten seconds of a core each. The parent must have no process group
and, as every parent that forks, no OpenMP threads (`OMP_NUM_THREADS=1` or `torch.set_num_threads(1)` before it computes).
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


class RankFailed(RuntimeError):
    """A rank raised, died or took too long; the message holds the end of every rank's output."""


def on_ranks(work: Callable[[], Any], ranks: int = 2, limit_s: float = 900.0) -> list[Any]:
    """work() on every rank, by rank. Raises `RankFailed`; the other ranks are killed then, and no process is left."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory(prefix="weft-ranks-") as folder:
        world = {"WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "DS_ACCELERATOR": "cpu"}
        running = {_fork(work, Path(folder), {**world, "RANK": rank, "LOCAL_RANK": rank}) for rank in range(ranks)}
        deadline, failed = time.monotonic() + limit_s, ""
        try:
            while running and not failed:
                for pid in list(running):
                    done, status = os.waitpid(pid, os.WNOHANG)
                    if done:
                        running.discard(pid)
                        failed = failed or ("a rank failed" if status else "")
                if time.monotonic() > deadline:
                    failed = failed or f"a rank took more than {limit_s:g} s"
                time.sleep(0.01)
        finally:
            for pid in running:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
        if failed:
            said = [Path(f"{folder}/{rank}.log").read_text(errors="replace")[-6000:] for rank in range(ranks)]
            raise RankFailed("\n".join([failed, *said]))
        return [json.loads(Path(f"{folder}/{rank}.json").read_text()) for rank in range(ranks)]


def _fork(work: Callable[[], Any], folder: Path, world: dict[str, Any]) -> int:
    """One rank as a child that writes `RANK.json` and `RANK.log`; its pid."""
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        with open(folder / f"{world['RANK']}.log", "wb") as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
        sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115 - ends with the process
        os.environ.update({name: str(value) for name, value in world.items()})
        from weft.training import distributed

        warnings.simplefilter("ignore")
        torch.set_num_threads(1)
        found = json.dumps(work())
        (folder / f"{world['RANK']}.json").write_text(found)
        distributed.barrier()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # no teardown: under gloo it aborts now and then
