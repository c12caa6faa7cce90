"""What a run carries from one step to the next, on its way to the disk and back.

In memory: counters, the monitors' windows, an average of the weights, and the engine's weights and moments. On disk: the
folders below `checkpoints/`, and `final/`. Every method is called by all ranks; rank 0 alone touches the disk.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from weft.training import state
from weft.training.checkpoint import (
    CheckpointError,
    DiskFullError,
    checkpoints,
    newest_valid,
    prune,
    publish,
    recover,
    step_folder,
    step_of,
)
from weft.training.distributed import agree, barrier
from weft.training.ema import Ema
from weft.training.health import check_same_run
from weft.training.monitors import Monitors
from weft.training.parts import Parts

log = logging.getLogger("weft.training")
PATIENCE = 3
"""Skipped steps in a row before a roll-back, and roll-backs without a new checkpoint before the run stops."""


SAME = ("max_steps", "max_seconds", "loss", "optimizer", "schedule", "checkpoint", "evaluation", "monitors", "finetune")
"""Parts of the config that ranks must agree on, besides what a checkpoint is bound to."""


class TrainingDiverged(ValueError):
    """Loss or gradients stay not finite after going back to the last checkpoint."""


class RunState:
    """The state of one run."""

    def __init__(self, parts: Parts) -> None:
        self.parts, self.config, self.engine = parts, parts.config, parts.engine
        self.folder = Path(parts.config.folder)
        self.saved = self.folder / "checkpoints"
        self.progress = state.Progress()
        self.monitors = Monitors(parts.config.monitors)
        decay = parts.config.checkpoint.ema
        self.ema = Ema(self.engine.weights(), decay) if decay else None

    @property
    def first(self) -> bool:
        """Whether this rank touches the disk."""
        return self.engine.world.first

    def resume(self) -> Path | None:
        """Tidy up after a crash, then go on from the newest valid checkpoint if the config says so; the folder it was.

        Raises `RunsDiffer` if ranks were started with different runs, and `CheckpointError` if no checkpoint verifies.
        """
        config = state.plain(self.config)
        engine = {name: value for name, value in config["engine"].items() if name not in ("device", "threads")}
        check_same_run({**self._identity(), **{name: config[name] for name in SAME}, "engine": engine})
        if self.first:
            self.folder.mkdir(parents=True, exist_ok=True)
            recover(self.folder)
            recover(self.saved)
        barrier()
        if self.config.checkpoint.resume == "never":
            if agree([float(self.first and bool(checkpoints(self.saved)))])[0]:
                raise FileExistsError(
                    f"{self.folder} holds a run and checkpoint.resume is never; choose another folder or resume: auto"
                )
            return None
        folder = self._newest()
        if folder is not None:
            self._restore(folder)
        elif agree([float(self.first and bool(checkpoints(self.saved)))])[0]:
            raise CheckpointError(
                f"none of the checkpoints in {self.saved} verifies (the log says what each lacks); restore one of them, or "
                "choose another folder to begin anew"
            )
        return folder

    def save(self, metrics_bytes: int, elapsed_s: float) -> None:
        """Publish a checkpoint and delete those that need not be kept; a full disk stops the run or is waited out."""
        self.progress.metrics_bytes, self.progress.elapsed_s = metrics_bytes, elapsed_s
        rollbacks, self.progress.rollbacks = self.progress.rollbacks, 0
        shot = state.snapshot(self.engine, self.progress, self.monitors.state(), self.ema, self._extra())
        failed: BaseException | None = None
        if self.first:
            try:
                self._publish(shot)
            except BaseException as error:
                failed = error
        if not agree([float(failed is not None)])[0]:
            return
        self.progress.rollbacks = rollbacks
        if failed is not None and not isinstance(failed, DiskFullError):
            raise failed
        if self.config.checkpoint.on_full_disk == "stop":
            raise failed or DiskFullError("rank 0 had no room for a checkpoint; its own message says where")
        log.warning("%s", failed or "rank 0 had no room for a checkpoint")

    def roll_back(self) -> int:
        """Weights, moments and windows of the last checkpoint; the data goes on BEHIND the bad steps. Returns its step.

        Raises `TrainingDiverged` if there is no checkpoint, or if going back did not help before.
        """
        now = self.progress
        barrier()
        folder = self._newest()
        if folder is None or now.rollbacks + 1 > PATIENCE:
            reason = "there is no checkpoint to go back to" if folder is None else f"going back {PATIENCE} times did not help"
            raise TrainingDiverged(
                f"loss or gradients were not finite in {PATIENCE} steps up to step {now.step - 1} and {reason}; "
                "lower optimizer.lr or look at these batches"
            )
        self._restore(folder)
        then = self.progress
        number, then.in_a_row = then.step, 0
        then.rollbacks = now.rollbacks + 1
        for name in ("step", "skipped", "tokens", "metrics_bytes", "lost", "evaluated"):
            setattr(then, name, getattr(now, name))
        return number

    def finish(self, metrics_bytes: int, elapsed_s: float) -> None:
        """The last checkpoint, unless it is there, and `final/` for inference."""
        if agree([float(self.first and not step_folder(self.saved, self.progress.step).exists())])[0]:
            self.save(metrics_bytes, elapsed_s)
        weights = self.engine.weights()
        if self.ema is not None:
            weights = {**weights, **self.ema.average}
        if not self.first:
            return
        model, parts = self.engine.model.config.to_dict(), self.parts
        publish(
            self.folder / "final",
            lambda draft: state.write_inference_files(draft, weights, model, parts.tokenizer, parts.lora_scale),
        )

    def _publish(self, shot: state.Snapshot) -> None:
        where, keep = step_folder(self.saved, self.progress.step), self.config.checkpoint
        state.save(where, shot, self.engine.model.config.to_dict(), self.parts.tokenizer, self.parts.lora_scale)
        prune(self.saved, keep.keep_last, keep.keep_best, where)

    def _newest(self) -> Path | None:
        """The newest checkpoint whose every byte verifies; the same on every rank."""
        found = newest_valid(self.saved) if self.first else None
        number = int(agree([float(step_of(found) or 0) if found else -1.0])[0])
        return None if number < 0 else step_folder(self.saved, number)

    def _restore(self, folder: Path) -> None:
        self.progress, windows = state.restore(folder, self.engine, self.ema, self._identity())
        self.monitors.load_state(windows)

    def _identity(self) -> dict[str, Any]:
        tokenizer = self.parts.tokenizer
        return {
            "seed": self.config.seed,
            "model": state.jsonable(self.engine.model.config.to_dict()),
            "tokenizer": tokenizer.digest() if tokenizer is not None else None,
            "data": state.jsonable(self.parts.source.identity()),
        }

    def _extra(self) -> dict[str, Any]:
        return {**self._identity(), "config": state.jsonable(state.plain(self.config)), "score": self.progress.score}
