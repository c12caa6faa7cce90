"""The training loop: one step after another until the run's end, whatever happens to the process in between.

    batches -> agreement (counts, signals) -> forward + backward -> agreement (finite?) -> update or skip -> router bias ->
    average
            -> figures, alarms -> evaluation -> checkpoint

A step is a pure function of (state, step), so a process killed anywhere and started again writes the same weights and
the same `metrics.jsonl`. A batch with a not finite loss or gradient is skipped by all ranks together, by a branch:
nothing is multiplied by zero. After three in a row the weights go back to the last checkpoint and training goes on
BEHIND the bad batches (PaLM's recipe, arXiv 2204.02311, section 5.1): replaying the same steps from there would arrive
at the same place.
"""

from __future__ import annotations

import logging
import math
import signal
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from weft.model.transformer import Transformer
from weft.tokenizers.pack import Batch
from weft.tokenizers.vocabulary import MODALITIES
from weft.training import state
from weft.training.batches import Ahead, Batches
from weft.training.checkpoint import DiskFullError, checkpoints, newest_valid, prune, publish, recover, step_folder, step_of
from weft.training.config import RunConfig
from weft.training.distributed import agree, barrier
from weft.training.ema import Ema
from weft.training.engine import Engine, Exchange, Outcome, to_device
from weft.training.horizon import MEASURE, Horizon
from weft.training.monitors import Monitors
from weft.training.panel import Panel, Silent, open_panel
from weft.training.schedule import factor
from weft.training.tracking import JsonLines, Tracker, open_trackers

log = logging.getLogger("weft.training")
PATIENCE = 3
"""Skipped steps in a row before a roll-back, and roll-backs without a new checkpoint before the run stops."""


class TrainingDiverged(ValueError):
    """Loss or gradients stay not finite after going back to the last checkpoint."""


class Terminated(SystemExit):
    """SIGTERM arrived: a checkpoint was saved, the exit status is 143."""

    def __init__(self) -> None:
        super().__init__(143)


@dataclass(frozen=True)
class Moment:
    """What a callback sees after a step."""

    step: int
    total: int | None
    applied: bool
    metrics: dict[str, float]
    alarms: list[str]
    model: Transformer
    folder: Path


Callback = Callable[[Moment], None]
Evaluate = Callable[[Transformer, int], dict[str, float]]


@dataclass(frozen=True)
class RunResult:
    """What `train` returns."""

    folder: Path
    metrics: dict[str, float]
    """The last step's figures, and the last evaluation's."""
    steps: int


@dataclass
class Parts:
    """Everything a loop needs, built."""

    config: RunConfig
    engine: Engine
    source: Batches
    tokenizer: state.SavesItself | None = None
    validation: list[Batch] = field(default_factory=list)
    evaluate: Evaluate | None = None
    callbacks: Sequence[Callback] = ()
    lora_scale: float = 1.0


class Loop:
    """One run."""

    def __init__(self, parts: Parts) -> None:
        self.parts = parts
        self.config = config = parts.config
        self.engine = parts.engine
        self.folder = Path(config.folder)
        self.saved = self.folder / "checkpoints"
        self.first = self.engine.world.first
        self.ahead = Ahead(parts.source, self.engine.world.rank, self.engine.world.size, config.data.prefetch > 0)
        self.horizon = Horizon(self.folder / "horizon.json", config.max_steps, config.max_seconds)
        self.monitors = Monitors(config.monitors)
        self.progress = state.Progress()
        self.ema = Ema(self.engine.weights(), config.checkpoint.ema) if config.checkpoint.ema else None
        self.metrics: dict[str, float] = {}
        self.panel: Panel = Silent()
        self.trackers: list[Tracker] = []
        self.rows: JsonLines | None = None
        self.speed: JsonLines | None = None
        self.probe_batch: Batch | None = None
        self.signalled = threading.Event()
        self.clock = time.monotonic()
        self.marks: list[tuple[int, float, int]] = []  # (step, time, tokens): the last minute, for speed

    # ---- one run -----------------------------------------------------------------------------------------------------------

    def run(self) -> RunResult:
        """Resume, train, save `final/`. Raises `Terminated`, `TrainingDiverged`, `DiskFullError` or what the data raised."""
        with _on_sigterm(self.signalled):
            try:
                self._open()
                while self._step():
                    pass
                self._finish()
            finally:
                self._close()
        return RunResult(self.folder, self.metrics, self.progress.step)

    def _open(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        if self.first:
            recover(self.folder)
            recover(self.saved)
        barrier()
        resumed = self._resume() if self.config.checkpoint.resume == "auto" else None
        if self.first:
            if resumed is None and (checkpoints(self.saved) or (self.folder / "metrics.jsonl").exists()):
                self._start_over()
            self.rows = JsonLines(self.folder / "metrics.jsonl")
            self.rows.rewind(self.progress.metrics_bytes)
            self.speed = JsonLines(self.folder / "speed.jsonl")
            tracking = self.config.tracking
            self.trackers = open_trackers(
                tracking.trackers, self.folder, self.folder.name, None if resumed is None else self.progress.step
            )
            self.panel = open_panel(tracking.panel, tracking.plain_every_s, self.first)
            if resumed is not None:
                self.panel.say(f"continuing from {resumed} at step {self.progress.step}")
        self.clock = time.monotonic() - self.progress.elapsed_s

    def _start_over(self) -> None:
        """No checkpoint is valid or wanted: earlier rows and decisions belong to a run that cannot be continued."""
        if self.config.checkpoint.resume == "never" and checkpoints(self.saved):
            raise FileExistsError(
                f"{self.folder} holds a run and checkpoint.resume is never; choose another folder or resume: auto"
            )
        for name in ("metrics.jsonl", "horizon.json"):
            (self.folder / name).unlink(missing_ok=True)
        self.horizon.decisions.clear()

    def _resume(self) -> Path | None:
        found = newest_valid(self.saved) if self.first else None
        number = int(agree([float(step_of(found) or 0) if found else -1.0])[0])
        if number < 0:
            return None
        folder = step_folder(self.saved, number)
        self._restore(folder)
        return folder

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

    # ---- one step ----------------------------------------------------------------------------------------------------------

    def _step(self) -> bool:
        """Take one step; False at the end of the run."""
        step = self.progress.step
        total = self.horizon.total(step)
        if total is not None and step >= total:
            return False
        if not self.parts.source.has(step):
            self.panel.say(f"the data ends at step {step}")
            return False
        batches, swap = self._agree(step)
        stop, over, proposal, trouble = swap.flags
        if stop:
            self._save()
            raise Terminated
        if trouble:
            raise RuntimeError(f"another rank could not prepare step {step}; its own message says why")
        if over:
            self.panel.say(f"the time budget is spent at step {step}")
            return False
        if proposal > 0:
            self.horizon.record(step, int(proposal), self.first)
            total = int(proposal)
        outcome = self.engine.forward_backward(batches, swap.whole)
        lr = self._update(outcome, total) if outcome.finite else self._skip(step)
        self.progress.step += 1
        self.progress.tokens += int(swap.whole[0].real)
        self._record(step, total, outcome, swap, lr)
        if self.progress.in_a_row >= PATIENCE:
            self._roll_back()
        self._evaluate()
        if self.progress.step % self.config.checkpoint.every == 0 and not self.progress.in_a_row:
            self._save()
        return True

    def _agree(self, step: int) -> tuple[list[Batch], Exchange]:
        """This step's batches and what all ranks know about it. A rank whose data fails tells the others before it raises."""
        elapsed = time.monotonic() - self.clock
        proposal = self.horizon.decide(step, elapsed, self._step_seconds(step)) if self.first else None
        flags = [float(self.signalled.is_set()), float(self.horizon.over_time(elapsed)), float(proposal or 0), 0.0]
        try:
            batches = self.ahead.batches(step)
        except BaseException:
            if self.engine.world.size > 1:
                accumulate = max(1, self.config.data.micro_batches // self.engine.world.size)
                self.engine.exchange([None] * accumulate, [*flags[:3], 1.0])
            raise
        return batches, self.engine.exchange(list(batches), flags)

    def _update(self, outcome: Outcome, total: int | None) -> float:
        lr = self.engine.step(factor(self.config.schedule, self.progress.applied, total))
        self.engine.model.update_router_bias(outcome.load.to(self.engine.device))
        self.progress.applied += 1
        self.progress.in_a_row = 0
        if self.ema is not None:
            self.ema.update(self.engine.weights())
        return lr

    def _skip(self, step: int) -> float:
        self.engine.skip()
        self.progress.skipped += 1
        self.progress.in_a_row += 1
        log.warning("step %d has a loss or gradient that is not finite: skipped on all ranks", step)
        return 0.0

    def _roll_back(self) -> None:
        behind, skipped, rollbacks = self.progress.step, self.progress.skipped, self.progress.rollbacks + 1
        barrier()
        found = newest_valid(self.saved) if self.first else None
        number = int(agree([float(step_of(found) or 0) if found else -1.0])[0])
        if number < 0 or rollbacks > PATIENCE:
            reason = "there is no checkpoint to go back to" if number < 0 else f"going back {PATIENCE} times did not help"
            raise TrainingDiverged(
                f"loss or gradients were not finite in {PATIENCE} steps up to step {behind - 1} and {reason}; "
                "lower optimizer.lr or look at these batches"
            )
        tokens, size = self.progress.tokens, self.progress.metrics_bytes
        self._restore(step_folder(self.saved, number))
        self.progress.step, self.progress.skipped, self.progress.rollbacks = behind, skipped, rollbacks
        self.progress.tokens, self.progress.metrics_bytes = tokens, size
        self.progress.in_a_row = 0
        self._event(behind - 1, f"rollback: weights of step {number}, data goes on at step {behind}")

    # ---- what is written -----------------------------------------------------------------------------------------------------

    def _record(self, step: int, total: int | None, outcome: Outcome, swap: Exchange, lr: float) -> None:
        applied = outcome.finite
        figures = {"lr": lr, "grad_norm": outcome.grad_norm, **outcome.metrics, "applied": float(applied)}
        figures |= self.monitors.share(dict(zip(MODALITIES, swap.whole[0].tokens)))
        alarms: list[str] = [] if applied else [f"skipped: step {step} is not finite"]
        if applied:
            more, alarms = self.monitors.step(step, outcome.metrics, outcome.grad_norm, outcome.load, outcome.growth)
            figures |= more
        if self.config.monitors.probe_every and (step + 1) % self.config.monitors.probe_every == 0:
            more, rung = self._probe()
            figures |= more
            alarms += rung
        self.metrics |= figures
        every = self.config.tracking.every
        if self.first and ((step + 1) % every == 0 or not applied or alarms):
            self._write(step, figures)
        for alarm in alarms:
            self._event(step, alarm)
        self._show(step, total, figures)
        moment = Moment(step, total, applied, figures, alarms, self.engine.model, self.folder)
        for callback in self.parts.callbacks:
            callback(moment)

    def _write(self, step: int, figures: dict[str, float]) -> None:
        if self.rows is not None:
            self.rows.log(step, figures)
        for tracker in self.trackers:
            tracker.log(step, {k: v for k, v in figures.items() if math.isfinite(v)})

    def _event(self, step: int, text: str) -> None:
        if self.first:
            log.warning("step %d: %s", step, text)
        if self.rows is not None:
            self.rows.write({"step": step, "event": text})

    def _step_seconds(self, step: int) -> float | None:
        """Seconds per step over the marked past; None until enough steps were taken."""
        marks = [mark for mark in self.marks if mark[0] >= min(MEASURE[0], step)]
        if len(marks) < 2 or marks[-1][0] == marks[0][0]:
            return None
        return (marks[-1][1] - marks[0][1]) / (marks[-1][0] - marks[0][0])

    def _show(self, step: int, total: int | None, figures: dict[str, float]) -> None:
        now = time.monotonic()
        self.marks.append((step, now, self.progress.tokens))
        while len(self.marks) > 16 and now - self.marks[0][1] > 60.0:
            self.marks.pop(0)
        seconds = self._step_seconds(step)
        rate = (self.progress.tokens - self.marks[0][2]) / max(1e-9, now - self.marks[0][1]) if len(self.marks) > 1 else 0.0
        shown = {k: v for k, v in figures.items() if k.startswith("loss") or k in ("lr", "grad_norm")}
        shown["tokens/s"] = rate
        if self.first and self.speed is not None and (step % 20 == 0 or step < 3):
            self.speed.log(
                step, {"tokens_per_s": rate, "step_s": seconds or 0.0, "elapsed_s": now - self.clock, **self._mfu(rate)}
            )
        self.panel.show(step + 1, total, {**shown, **self._mfu(rate)}, seconds and total and seconds * (total - step - 1))

    def _mfu(self, rate: float) -> dict[str, float]:
        from weft.training.plan import mfu

        share = mfu(self.engine.model.config, rate / self.engine.world.size, self.engine.device, self.config.data.length)
        return {} if share is None else {"mfu": share}

    # ---- now and then --------------------------------------------------------------------------------------------------------

    def _probe(self) -> tuple[dict[str, float], list[str]]:
        if self.probe_batch is None:
            fixed = self.parts.validation or self.parts.source.batches(0, self.engine.world.rank, self.engine.world.size)
            self.probe_batch = to_device(fixed[0], self.engine.device)
        with self.engine.gathered() as model:
            return ({}, []) if model is None else self.monitors.probe(model, self.probe_batch)

    def _evaluate(self, last: bool = False) -> None:
        every = self.config.evaluation.every
        due = every and self.progress.step % every == 0
        if last == bool(due):  # the last step is evaluated once: here at the end, or when it was due anyway
            return
        figures: dict[str, float] = {}
        if self.parts.validation:
            figures = {f"eval/{k}": v for k, v in self.engine.evaluate(self.parts.validation).items()}
            self.progress.score = figures["eval/loss"]
        if self.parts.evaluate is not None:
            with self.engine.gathered() as model:
                if model is not None:
                    figures |= {f"eval/{k}": float(v) for k, v in self.parts.evaluate(model, self.progress.step).items()}
        if figures:
            self.metrics |= figures
            self._write(self.progress.step - 1, figures)
            self.panel.say(f"step {self.progress.step}: " + "  ".join(f"{k} {v:.4g}" for k, v in figures.items()))

    def _save(self) -> None:
        self.progress.elapsed_s = time.monotonic() - self.clock
        self.progress.metrics_bytes = self.rows.flush() if self.rows else 0
        rollbacks, self.progress.rollbacks = self.progress.rollbacks, 0
        shot = state.snapshot(self.engine, self.progress, self.monitors.state(), self.ema, self._extra())
        failed: BaseException | None = None
        if self.first:
            model, where = self.engine.model.config.to_dict(), step_folder(self.saved, self.progress.step)
            try:
                state.save(where, shot, model, self.parts.tokenizer, self.parts.lora_scale)
                prune(self.saved, self.config.checkpoint.keep_last, self.config.checkpoint.keep_best)
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

    def _extra(self) -> dict[str, Any]:
        return {**self._identity(), "config": state.jsonable(state.plain(self.config)), "score": self.progress.score}

    def _finish(self) -> None:
        self._evaluate(last=True)
        if not (checkpoints(self.saved) and step_folder(self.saved, self.progress.step).exists()):
            self._save()
        weights = self.engine.weights()
        if self.ema is not None:
            weights = {**weights, **self.ema.average}
        if self.first:
            model = self.engine.model.config.to_dict()
            publish(
                self.folder / "final",
                lambda draft: state.write_inference_files(draft, weights, model, self.parts.tokenizer, self.parts.lora_scale),
            )
            if self.rows is not None:
                self.rows.flush()
            if self.config.tracking.plots:
                from weft.training.plots import draw

                draw(self.folder)
        barrier()

    def _close(self) -> None:
        self.ahead.close()
        self.panel.close()
        for sink in (*self.trackers, self.rows, self.speed):
            if sink is not None:
                sink.close()


class _on_sigterm:
    """SIGTERM sets an event while the loop runs; the loop ends the step, saves and leaves with 143."""

    def __init__(self, event: threading.Event) -> None:
        self.event = event

    def __enter__(self) -> None:
        self.main = threading.current_thread() is threading.main_thread()
        if self.main:
            self.before = signal.signal(signal.SIGTERM, lambda *_: self.event.set())

    def __exit__(self, *_: object) -> None:
        if self.main:
            signal.signal(signal.SIGTERM, self.before)
