"""Runs a function in two processes joined by gloo, as a launcher would, and returns what rank 0 wrote.

Run as `python -m tests.training.ranks SCENARIO OUT`: one job, many scenarios, because most of a job's time is imports.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any


def launch(
    scenario: str, out: Path, ranks: int = 2, timeout_s: float = 900.0, module: str = "tests.training.scenarios"
) -> dict[str, Any]:
    """Start `ranks` processes and wait; a process that fails ends the test with its output."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    out.mkdir(parents=True, exist_ok=True)
    logs = [open(out / f"rank{r}.log", "wb") for r in range(ranks)]  # noqa: SIM115
    processes = []
    for r in range(ranks):
        env = {**os.environ, "RANK": str(r), "LOCAL_RANK": str(r), "WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1"}
        env |= {
            "MASTER_PORT": str(port),
            "OMP_NUM_THREADS": "1",
            "DS_ACCELERATOR": "cpu",
            "PYTHONFAULTHANDLER": "1",
            "PYTHONPATH": os.getcwd(),
        }
        command = [sys.executable, "-m", module, scenario, str(out)]
        processes.append(subprocess.Popen(command, env=env, stdout=logs[r], stderr=subprocess.STDOUT))
    deadline = time.monotonic() + timeout_s
    try:
        codes = [p.wait(max(0.1, deadline - time.monotonic())) for p in processes]
    except subprocess.TimeoutExpired:
        codes = [-1]
    finally:
        for p in processes:
            p.kill()
            p.wait()
        for log in logs:
            log.close()
    text = "\n".join((out / f"rank{r}.log").read_text(errors="replace")[-6000:] for r in range(ranks))
    assert codes == [0] * ranks, f"ranks ended with {codes}\n{text}"
    return json.loads((out / "result.json").read_text())
