"""Figures arrive where they are sent: JSONL, TensorBoard, MLflow, W&B, a terminal, pictures."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import struct
import subprocess
import sys
import termios
import warnings
from pathlib import Path

import numpy as np
import pytest

from tests.training.runs import config, go
from weft.training.plots import draw, smooth
from weft.training.tracking import Expendable, JsonLines, last_figures, open_trackers, read_jsonl

STEADY = {"schedule": {"kind": "constant", "warmup_steps": 0}, "monitors": {"probe_every": 0}}


def test_rows_are_cut_where_the_checkpoint_was_and_read_without_a_torn_line(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    rows = JsonLines(path)
    rows.log(0, {"loss": 1.5})
    size = rows.flush()
    rows.log(1, {"loss": float("nan")})
    rows.close()
    assert read_jsonl(path) == [{"step": 0, "loss": 1.5}, {"step": 1, "loss": None}]
    again = JsonLines(path)
    again.rewind(size)
    again.log(1, {"loss": 0.5})
    again.close()
    with open(path, "ab") as file:
        file.write(b'{"step": 2, "lo')
    assert read_jsonl(path) == [{"step": 0, "loss": 1.5}, {"step": 1, "loss": 0.5}]
    assert last_figures(path) == {"loss": 0.5}
    longer = JsonLines(path)
    with pytest.raises(OSError, match="restore it or start a new folder"):
        longer.rewind(10**6)
    longer.close()


def resumed(folder: Path, tracker: str) -> list[tuple[int, float]]:
    """A run of 3 steps, then of 6 in the same folder; (step, loss) as JSONL has them."""
    for steps in (3, 6):
        go(config(folder, max_steps=steps, tracking={"trackers": [tracker]}, **STEADY))
    return [(row["step"], row["loss"]) for row in read_jsonl(folder / "metrics.jsonl") if "loss" in row]


def test_tensorboard_files_read_back(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="pip install 'weft[track]'")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    expected = resumed(tmp_path, "tensorboard")
    found = EventAccumulator(str(tmp_path / "tensorboard"))
    found.Reload()
    assert {"loss", "lr", "grad_norm", "loss/text", "token_share/image"} <= set(found.Tags()["scalars"])
    assert [(e.step, pytest.approx(e.value)) for e in found.Scalars("loss")] == expected


def test_mlflow_continues_its_run(tmp_path: Path) -> None:
    mlflow = pytest.importorskip("mlflow", reason="pip install 'weft[mlflow]'")
    here = set(os.listdir())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # MLflow and its database warn about their own future
        expected = resumed(tmp_path, "mlflow")
        client = mlflow.MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
        (experiment,) = [e for e in client.search_experiments() if e.name == "weft"]
        (run,) = client.search_runs([experiment.experiment_id])
        assert run.info.run_id == json.loads((tmp_path / "trackers.json").read_text())["mlflow"]
        assert run.data.params["optimizer.lr"] == "0.003" and run.info.status == "FINISHED"
        history = client.get_metric_history(run.info.run_id, "loss")
    assert [(m.step, pytest.approx(m.value)) for m in history] == expected
    assert set(os.listdir()) == here


def records(data: bytes, block: int = 32768) -> list[bytes]:
    """Records of a .wandb file: seven bytes of header, then LevelDB's log format."""
    found, held, at = [], b"", 7
    while at + 7 <= len(data):
        if block - at % block < 7:
            at += block - at % block
            continue
        _, size, kind = struct.unpack("<IHB", data[at : at + 7])
        held += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # whole, or the last part
            found.append(held)
            held = b""
    return found


def test_wandb_writes_offline_and_continues_its_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb", reason="pip install 'weft[wandb]'")
    from wandb.proto import wandb_internal_pb2

    monkeypatch.setenv("WANDB_SILENT", "true")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = resumed(tmp_path, "wandb")
    files = sorted((tmp_path / "wandb").glob("offline-run-*/*.wandb"), key=lambda p: p.stat().st_mtime_ns)
    name = json.loads((tmp_path / "trackers.json").read_text())["wandb"]
    assert len(files) == 2 and all(p.name == f"run-{name}.wandb" for p in files)
    found = []
    for path in files:
        for data in records(path.read_bytes()):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(data)
            items = {(i.key or "/".join(i.nested_key)): json.loads(i.value_json) for i in record.history.item}
            if "loss" in items:
                found.append((items["_step"], pytest.approx(items["loss"])))
    assert found == expected


def test_a_missing_tracker_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for name in ("mlflow", "wandb"):
        with pytest.raises(ModuleNotFoundError, match=rf"pip install 'weft\[{name}\]'"):
            open_trackers((name,), tmp_path, "run", None)  # type: ignore[arg-type]
    assert open_trackers(("tensorboard",), tmp_path, "run", None) == []


def test_a_tracker_that_fails_does_not_cost_the_run(caplog: pytest.LogCaptureFixture) -> None:
    class Broken:
        calls = 0

        def log(self, step: int, values: dict[str, float]) -> None:
            self.calls += 1
            raise ConnectionError("the server is away")

        def close(self) -> None:
            raise AssertionError("it was left out before")

    inner = Broken()
    tracker = Expendable("mlflow", inner)
    for step in range(3):
        tracker.log(step, {"loss": 1.0})
    tracker.close()
    assert inner.calls == 1
    assert [r.getMessage() for r in caplog.records] == [
        "mlflow failed and gets no more figures of this run (metrics.jsonl has all): the server is away"
    ]


LIVE = """
import sys
from pathlib import Path
from tests.training.runs import config, go
go(config(Path(sys.argv[1]), max_steps=8, tracking={"panel": "auto"}, monitors={"probe_every": 0}))
"""


def in_terminal(command: list[str], rows: int = 40, columns: int = 100) -> str:
    """What a program writes to a real (pseudo-)terminal of that size."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
    env = {**os.environ, "TERM": "xterm-256color", "PYTHONPATH": os.getcwd()}
    for name in ("NO_COLOR", "CI", "COLUMNS", "LINES"):
        env.pop(name, None)
    process = subprocess.Popen(command, stdin=slave, stdout=slave, stderr=subprocess.PIPE, env=env)
    os.close(slave)
    data = b""
    while True:
        try:
            part = os.read(master, 65536)
        except OSError:  # the other end was closed
            break
        if not part:
            break
        data += part
    error = process.communicate()[1].decode()
    assert process.returncode == 0, error[-2000:]
    os.close(master)
    return data.decode()


def test_a_terminal_gets_a_live_panel(tmp_path: Path) -> None:
    text = in_terminal([sys.executable, "-c", LIVE, str(tmp_path / "run")])
    assert "\x1b[" in text and "\x1b[1A" in text  # redrawn in place
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)
    last = plain[plain.rindex("weft train") :]
    for word in ("step", "8 / 8", "loss", "loss/text", "lr", "grad_norm", "tokens/s", "time left"):
        assert word in last, last
    assert not any(len(line) > 100 for line in last.replace("\r", "\n").splitlines())


def test_elsewhere_plain_lines_are_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    go(config(tmp_path, max_steps=3, tracking={"panel": "auto", "plain_every_s": 0.0}, **STEADY))
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]
    assert [line.split()[1] for line in lines] == ["1/3", "2/3", "3/3"]
    assert all("loss" in line and "eta" in line and "\x1b" not in line for line in lines)


def test_pictures_show_the_run(tmp_path: Path) -> None:
    from PIL import Image

    go(config(tmp_path, max_steps=12, monitors={"probe_every": 4, "router_every": 4}))
    found = {path.stem: path for path in draw(tmp_path)}
    names = {
        "loss",
        "loss_by_modality",
        "learning_rate",
        "grad_norm",
        "router",
        "token_share",
        "modality_use",
        "speed",
        "z_loss",
    }
    assert set(found) == names
    for path in found.values():
        pixels = np.asarray(Image.open(path).convert("RGB"))
        assert pixels.shape[:2] == (450, 800)
        assert (pixels < 200).any(-1).mean() > 0.005, path  # something is drawn
    assert smooth([1.0, 2.0, 3.0, 4.0], 2) == [1.0, 1.5, 2.5, 3.5]
