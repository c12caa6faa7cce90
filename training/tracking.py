"""Where metrics go: JSONL always, TensorBoard if it is installed, MLflow and W&B as extras, one protocol for all.

`metrics.jsonl` holds only what the seed determines, so that a killed and resumed run writes the same bytes as one that was
never killed; clock-dependent figures (tokens/s, MFU) go to `speed.jsonl`.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import math
import os
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, Protocol

from weft.training.checkpoint import replace_file

log = logging.getLogger("weft.training")
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


def last_figures(path: Path, tail: int = 2**16) -> dict[str, float]:
    """The latest value of each figure in the last `tail` bytes of a metrics file."""
    with open(path, "rb") as file:
        file.seek(max(0, path.stat().st_size - tail))
        lines = file.read().split(b"\n")[:-1]
    found: dict[str, float] = {}
    for line in lines[1:] if len(lines) > 1 and not lines[0].startswith(b"{") else lines:
        row = json.loads(line)
        found |= {k: float(v) for k, v in row.items() if k != "step" and isinstance(v, int | float)}
    return found


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
    """Scalars in MLflow: an SQLite file in the run's folder, or wherever MLFLOW_TRACKING_URI points.

    known: the id of the run that an earlier start of the same training began, or None.
    """

    def __init__(self, folder: Path, name: str, config: dict[str, Any], known: str | None) -> None:
        mlflow = _module("mlflow", "pip install 'weft[mlflow]'")
        if "MLFLOW_TRACKING_URI" not in os.environ:
            mlflow.set_tracking_uri(f"sqlite:///{(folder / 'mlflow.db').resolve()}")
            if mlflow.get_experiment_by_name("weft") is None:  # else MLflow puts a folder `mlruns` wherever one stands
                mlflow.create_experiment("weft", artifact_location=(folder / "mlflow").resolve().as_uri())
        mlflow.set_experiment("weft")
        self.id = str(mlflow.start_run(run_id=known, run_name=None if known else name).info.run_id)
        if known is None:
            mlflow.log_params({key: str(value)[:500] for key, value in flat(config).items()})
        self._mlflow = mlflow

    def log(self, step: int, values: dict[str, float]) -> None:
        """Record scalars of one step."""
        self._mlflow.log_metrics({key: value for key, value in values.items() if math.isfinite(value)}, step=step)

    def close(self) -> None:
        """End the run."""
        self._mlflow.end_run()


class WandB:
    """Scalars in Weights & Biases; offline unless WANDB_MODE says otherwise (`wandb sync RUN/wandb/offline-run-*` sends)."""

    def __init__(self, folder: Path, name: str, config: dict[str, Any], known: str | None) -> None:
        wandb = _module("wandb", "pip install 'weft[wandb]'")
        os.environ.setdefault("WANDB_MODE", "offline")
        self.id = known or secrets.token_hex(4)
        self._run = wandb.init(project="weft", name=name, dir=str(folder), config=config, id=self.id, resume="allow")

    def log(self, step: int, values: dict[str, float]) -> None:
        """Record scalars of one step."""
        self._run.log(values, step=step)

    def close(self) -> None:
        """End the run."""
        self._run.finish()


class Expendable:
    """A tracker that may fail without costing the run: it is named once and left out from then on."""

    def __init__(self, name: str, tracker: Tracker) -> None:
        self.name, self.tracker = name, tracker
        self._failed = False

    def log(self, step: int, values: dict[str, float]) -> None:
        """Record scalars of one step."""
        self._try(lambda: self.tracker.log(step, values))

    def close(self) -> None:
        """Release."""
        self._try(self.tracker.close)

    def _try(self, call: Callable[[], None]) -> None:
        if self._failed:
            return
        try:
            call()
        except Exception as error:  # whatever a network or a database can raise
            self._failed = True
            log.warning("%s failed and gets no more figures of this run (metrics.jsonl has all): %s", self.name, error)


def flat(tree: dict[str, Any], before: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}."""
    out: dict[str, Any] = {}
    for key, value in tree.items():
        out |= flat(value, f"{before}{key}.") if isinstance(value, dict) else {f"{before}{key}": value}
    return out


def _module(name: str, repair: str) -> Any:
    if importlib.util.find_spec(name) is None:
        raise ModuleNotFoundError(f"tracking asks for {name}, which is not installed; run: {repair}")
    return importlib.import_module(name)


def open_trackers(
    names: tuple[Name, ...], folder: Path, run: str, resumed_at: int | None, config: dict[str, Any] | None = None
) -> list[Tracker]:
    """The trackers beside JSONL. TensorBoard is a default, so it is left out where it is not installed; the others raise.

    resumed_at: the step that a resumed run goes on at; its trackers then continue the runs that `trackers.json` names.
    """
    book = folder / "trackers.json"
    known = json.loads(book.read_text()) if resumed_at is not None and book.exists() else {}
    found: list[Tracker] = []
    for name in names:
        if name == "tensorboard":
            if importlib.util.find_spec("tensorboard") is not None:
                found.append(Expendable(name, TensorBoard(folder / "tensorboard", resumed_at)))
            continue
        tracker = (MLflow if name == "mlflow" else WandB)(folder, run, config or {}, known.get(name))
        known[name] = tracker.id
        found.append(Expendable(name, tracker))
    if known:
        replace_file(book, json.dumps(known) + "\n")
    return found
