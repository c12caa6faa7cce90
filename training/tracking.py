"""Where metrics go: JSONL always, TensorBoard if it is installed, MLflow and W&B as extras, one protocol for all.

`metrics.jsonl` holds only what the seed determines, so that a killed and resumed run writes the same bytes as one that was
never killed; clock-dependent figures (tokens/s, MFU) go to `speed.jsonl`.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
from pathlib import Path
from typing import Any, Literal, Protocol

Name = Literal["tensorboard", "mlflow", "wandb"]


class Tracker(Protocol):
    """A sink for scalars."""

    def log(self, step: int, values: dict[str, float]) -> None:
        """Record scalars of one step."""
        ...

    def close(self) -> None:
        """Flush and release."""
        ...


class JsonLines:
    """One JSON object per line. `rewind(bytes)` cuts lines that a resumed run will write again."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(path, "ab", buffering=1 << 16)  # noqa: SIM115 - lives as long as the run

    def rewind(self, size: int) -> None:
        """Cut the file to `size` bytes, as it was when a checkpoint was saved."""
        self._file.flush()
        found = self.path.stat().st_size
        if found < size:
            raise OSError(
                f"{self.path} has {found} bytes but the checkpoint was saved at {size}; restore it or start a new folder"
            )
        self._file.truncate(size)
        self._file.seek(size)

    def write(self, row: dict[str, Any]) -> None:
        """Append one row; a number that is not finite becomes null."""
        self._file.write((json.dumps(_finite(row), allow_nan=False) + "\n").encode())

    def log(self, step: int, values: dict[str, float]) -> None:
        """Append the scalars of one step."""
        self.write({"step": step, **values})

    def flush(self) -> int:
        """Flush to the disk; returns the size in bytes."""
        self._file.flush()
        os.fsync(self._file.fileno())
        return self._file.tell()

    def close(self) -> None:
        """Flush and close."""
        if not self._file.closed:
            self.flush()
            self._file.close()


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """All complete rows of a JSONL file; a torn last line is left out."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []:
        if line.endswith("\n"):
            rows.append(json.loads(line))
    return rows


class TensorBoard:
    """Scalars for `tensorboard --logdir RUN/tensorboard`."""

    def __init__(self, folder: Path, resumed_at: int | None) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=resumed_at)

    def log(self, step: int, values: dict[str, float]) -> None:
        """Record scalars of one step."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Flush and close."""
        self._writer.close()


class MLflow:
    """Scalars in MLflow's local store, or wherever MLFLOW_TRACKING_URI points."""

    def __init__(self, folder: Path, name: str) -> None:
        mlflow = _module("mlflow", "pip install mlflow")
        if "MLFLOW_TRACKING_URI" not in os.environ:
            mlflow.set_tracking_uri(f"sqlite:///{(folder / 'mlflow.db').resolve()}")
        mlflow.set_experiment("weft")
        mlflow.start_run(run_name=name)
        self._mlflow = mlflow

    def log(self, step: int, values: dict[str, float]) -> None:
        """Record scalars of one step."""
        self._mlflow.log_metrics({key: value for key, value in values.items() if math.isfinite(value)}, step=step)

    def close(self) -> None:
        """End the run."""
        self._mlflow.end_run()


class WandB:
    """Scalars in Weights & Biases; offline unless WANDB_MODE says otherwise."""

    def __init__(self, folder: Path, name: str) -> None:
        wandb = _module("wandb", "pip install wandb")
        os.environ.setdefault("WANDB_MODE", "offline")
        self._run = wandb.init(project="weft", name=name, dir=str(folder))

    def log(self, step: int, values: dict[str, float]) -> None:
        """Record scalars of one step."""
        self._run.log(values, step=step)

    def close(self) -> None:
        """End the run."""
        self._run.finish()


def _module(name: str, repair: str) -> Any:
    if importlib.util.find_spec(name) is None:
        raise ModuleNotFoundError(f"tracking asks for {name}, which is not installed; run: {repair}")
    return importlib.import_module(name)


def open_trackers(names: tuple[Name, ...], folder: Path, run: str, resumed_at: int | None) -> list[Tracker]:
    """The trackers beside JSONL. TensorBoard is a default, so it is left out where it is not installed; the others raise."""
    found: list[Tracker] = []
    for name in names:
        if name == "tensorboard":
            if importlib.util.find_spec("tensorboard") is not None:
                found.append(TensorBoard(folder / "tensorboard", resumed_at))
        elif name == "mlflow":
            found.append(MLflow(folder, run))
        else:
            found.append(WandB(folder, run))
    return found
