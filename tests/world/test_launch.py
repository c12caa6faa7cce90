"""The process that started the ranks takes them along when it is told to end."""

from __future__ import annotations

import signal
import subprocess
import sys

SCRIPT = """
import time
from weft.benchmarks.world.quickstart import ended_by_signal
try:
    with ended_by_signal():
        print("training", flush=True)
        time.sleep(60)
finally:
    print("ranks ended", flush=True)
"""


def test_a_terminated_quickstart_unwinds() -> None:
    with subprocess.Popen([sys.executable, "-c", SCRIPT], stdout=subprocess.PIPE, text=True) as work:
        assert work.stdout is not None and work.stdout.readline() == "training\n"
        work.send_signal(signal.SIGTERM)
        assert work.stdout.read() == "ranks ended\n" and work.wait(20) == 128 + signal.SIGTERM
