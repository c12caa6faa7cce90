"""One run file under every launcher: the plain command, torchrun and DeepSpeed's own, with the same losses."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.training.data_world import documents, tokenizer, write_manifest
from tests.training.test_train import RUN
from weft.training.checkpoint import checkpoints, verify
from weft.training.data.prepare import prepare
from weft.training.tracking import read_jsonl
from weft.training.train import main

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "weft.training.train"]


def deepspeed() -> list[str]:
    """DeepSpeed's launcher on two processes of this machine."""
    pytest.importorskip("deepspeed", reason="pip install 'weft[deepspeed]'")
    return [str(Path(sys.executable).parent / "deepspeed"), "--num_accelerators", "2", "--module", "weft.training.train"]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of 24 documents, a tokenizer, a run file for four experts, and the run of one plain process."""
    folder = tmp_path_factory.mktemp("launchers")
    prepare(write_manifest(folder / "media", documents(24)), folder / "shards")
    tokenizer().save(folder / "tokenizer")
    (folder / "run.yaml").write_text(RUN.format(root=folder).replace("experts: 3", "experts: 4"))
    assert main([str(folder / "run.yaml"), f"folder={folder}/plain"]) == 0
    return folder


def start(launcher: list[str], root: Path, name: str, *overrides: str) -> subprocess.Popen[str]:
    """The command a user types, on two processes."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    split = launcher.index("--module") if "--module" in launcher else launcher.index("-m", 3)
    flag = "--master_port" if "--module" in launcher else "--master-port"
    command = [
        *launcher[:split],
        flag,
        str(port),
        *launcher[split:],
        str(root / "run.yaml"),
        f"folder={root}/{name}",
        *overrides,
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONPATH": os.getcwd()}
    return subprocess.Popen(command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def finish(process: subprocess.Popen[str], timeout_s: float = 600) -> str:
    """Its output, if it ended well."""
    text, _ = process.communicate(timeout=timeout_s)
    assert process.returncode == 0, text[-4000:]
    return text


def losses(folder: Path) -> list[float]:
    return [row["loss"] for row in read_jsonl(folder / "metrics.jsonl") if "loss" in row]


def test_torchrun_with_divided_experts_equals_the_plain_command(root):
    finish(start(TORCHRUN, root, "torchrun", "engine.expert_parallel=2"))
    assert losses(root / "torchrun") == pytest.approx(losses(root / "plain"), rel=1e-4)
    verify(root / "torchrun" / "final")


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    ("name", "overrides"),
    [("zero1", ("engine.zero_stage=1",)), ("experts", ("engine.zero_stage=2", "engine.expert_parallel=2"))],
)
def test_deepspeed_launcher_equals_the_plain_command(root, name, overrides):
    finish(start(deepspeed(), root, f"deepspeed_{name}", "engine.kind=deepspeed", *overrides))
    assert losses(root / f"deepspeed_{name}") == pytest.approx(losses(root / "plain"), rel=1e-4)
    verify(root / f"deepspeed_{name}" / "final")


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_deepspeed_launcher_is_stopped_saves_and_goes_on_in_a_plain_process(root):
    """SIGTERM to the launcher reaches the ranks, which save; a plain process then finishes the run."""
    folder = root / "stopped"
    process = start(deepspeed(), root, "stopped", "engine.kind=deepspeed", "max_steps=400", "checkpoint.every=400")
    deadline = time.monotonic() + 600
    while not (folder / "metrics.jsonl").exists() or len(losses(folder)) < 3:
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0][-4000:]
        time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=300)
    saved = checkpoints(folder / "checkpoints")
    assert len(saved) == 1
    step = int(saved[0].name.split("-")[1])
    assert main([str(root / "run.yaml"), f"folder={folder}", f"max_steps={step + 2}"]) == 0
    rows = [row["step"] for row in read_jsonl(folder / "metrics.jsonl") if "loss" in row]
    assert rows == list(range(step + 2))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_deepspeed_engine_needs_no_launcher(root):
    """The plain command in one process with engine.kind deepspeed."""
    command = [
        sys.executable,
        "-m",
        "weft.training.train",
        str(root / "run.yaml"),
        f"folder={root}/alone",
        "engine.kind=deepspeed",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env={**os.environ, "DS_ACCELERATOR": "cpu"})
    assert done.returncode == 0, done.stderr[-4000:]
    assert losses(root / "alone") == pytest.approx(losses(root / "plain"), rel=1e-4)
