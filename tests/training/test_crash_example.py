"""The example that shoots a run keeps its promise, on real files and through the real commands."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_run_that_is_shot_three_times_equals_the_one_left_alone(tmp_path: Path) -> None:
    pytest.importorskip("sklearn", reason="pip install 'weft[world]'")
    command = [sys.executable, str(ROOT / "examples" / "crash_and_resume.py"), str(tmp_path), "--steps", "40"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count(" equal") == 5 and "DIFFERENT" not in done.stdout
    assert "SIGTERM: exit status 143" in done.stdout and done.stdout.count("exit status -9") == 2
    assert (tmp_path / "data.html").exists() and (tmp_path / "shot" / "plots" / "loss.png").exists()
