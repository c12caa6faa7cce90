"""The training loop: one step after another until the run's end, whatever happens to the process in between.

    batches -> agreement (counts, signals) -> forward + backward -> agreement (finite?) -> update or skip -> router bias
            -> average -> figures, alarms -> evaluation -> checkpoint

A step is a pure function of (state, step), so a process killed anywhere and started again writes the same weights and
the same `metrics.jsonl`. A batch with a not finite loss or gradient is skipped by all ranks together, by a branch:
nothing is multiplied by zero. After three in a row the weights go back to the last checkpoint and training goes on
BEHIND the bad batches (PaLM's recipe, arXiv 2204.02311, section 5.1): replaying the same steps from there would arrive
at the same place.
"""

from __future__ import annotations

import logging
import math
import threading
from pathlib import Path

import torch

from weft.tokenizers.pack import Batch
from weft.tokenizers.vocabulary import MODALITIES
from weft.training.batches import LOST, Ahead
from weft.training.engine import Exchange, Outcome
from weft.training.health import DONE, Heartbeat, WeightsDiffer
from weft.training.horizon import Horizon
from weft.training.pace import Pace
from weft.training.parts import Moment, Parts, RunResult
from weft.training.record import Record
from weft.training.run_state import PATIENCE, RunState
from weft.training.schedule import factor
from weft.training.signals import Terminated, on_sigterm

log = logging.getLogger("weft.training")


class Loop:
    """One run."""

    def __init__(self, parts: Parts) -> None:
        self.parts, self.config, self.engine = parts, parts.config, parts.engine
        self.folder, self.first = Path(self.config.folder), self.engine.world.first
        self.state = RunState(parts)
        self.record = Record(self.config, self.engine)
        self.pace = Pace()
        self.heart = Heartbeat(self.folder, self.engine.world.rank)
        self.horizon = Horizon(self.folder / "horizon.json", self.config.max_steps, self.config.max_seconds)
        self.ahead = Ahead(parts.source, self.engine.world.rank, self.engine.world.size, self.config.data.prefetch > 0)
        self.metrics: dict[str, float] = {}
        self.probe_batch: Batch | None = None
        self.signalled = threading.Event()

    def run(self, keep: bool = True) -> RunResult:
        """Resume, train, save `final/` (unless `keep` is False: a dry run writes no weights).

        Raises `Terminated`, `TrainingDiverged`, `DiskFullError` or what the data raised.
        """
        with on_sigterm(self.signalled):
            try:
                self._open()
                while self._step():
                    pass
                self._evaluate(last=True)
                if keep:
                    self._same_weights()
                    self.state.finish(self.record.flush(), self.pace.elapsed_s())
                self.record.summary(self.state.progress, self.metrics, self.pace.elapsed_s())
                self.heart.beat(self.state.progress.step, DONE, force=True)
            finally:
                self.ahead.close()
                self.record.close()
        return RunResult(self.folder, self.metrics, self.state.progress.step)

    def _open(self) -> None:
        resumed = self.state.resume()
        if resumed is None:  # earlier decisions belong to a run that cannot be continued
            self.horizon.forget(self.first)
        self.metrics = self.record.open(self.state.progress, resumed)
        self.pace.resume(self.state.progress.elapsed_s)

    # ---- one step ----------------------------------------------------------------------------------------------------------

    def _step(self) -> bool:
        """Take one step; False at the end of the run."""
        progress = self.state.progress
        step, total = progress.step, self.horizon.total(progress.step)
        if total is not None and step >= total:
            return False
        if not self.parts.source.has(step):
            self.record.say(f"the data ends at step {step}")
            return False
        self.heart.beat(step, "training")
        batches, swap = self._agree(step)
        stop, over, proposal, trouble = swap.flags[:4]
        if stop:
            self._save()
            raise Terminated
        if trouble:
            raise RuntimeError(f"another rank could not prepare step {step}; its own message says why")
        if over:
            self.record.say(f"the time budget is spent at step {step}")
            return False
        if proposal > 0:
            self.horizon.record(step, int(proposal), self.first)
            total = int(proposal)
        outcome = self.engine.forward_backward(batches, swap.whole)
        lr = self._update(outcome, total) if outcome.finite else self._skip(step)
        progress.step += 1
        progress.tokens += int(swap.whole[0].real)
        self._report(step, total, outcome, swap, lr)
        if progress.in_a_row >= PATIENCE:
            number = self.state.roll_back()
            self.record.event(step, f"rollback: weights of step {number}, data goes on at step {step + 1}")
        self._evaluate()
        every = self.config.monitors.agree_every
        if every and self.state.progress.step % every == 0:
            self._same_weights()
        if self.state.progress.step % self.config.checkpoint.every == 0 and not self.state.progress.in_a_row:
            self._save()
        return True

    def _agree(self, step: int) -> tuple[list[Batch], Exchange]:
        """This step's batches and what all ranks know about it. A rank whose data fails tells the others before it raises."""
        elapsed = self.pace.elapsed_s()
        proposal = self.horizon.decide(step, elapsed, self.pace.step_s(step)) if self.first else None
        flags = [float(self.signalled.is_set()), float(self.horizon.over_time(elapsed)), float(proposal or 0)]
        try:
            batches = self.ahead.batches(step)
        except BaseException:
            if self.engine.world.size > 1:
                accumulate = max(1, self.config.data.micro_batches // self.engine.world.size)
                self.engine.exchange([None] * accumulate, [*flags, 1.0, *(0.0 for _ in LOST)])
            raise
        lost = self.ahead.counts(step) or {}
        return batches, self.engine.exchange(list(batches), [*flags, 0.0, *(float(lost.get(name, 0)) for name in LOST)])

    def _update(self, outcome: Outcome, total: int | None) -> float:
        progress = self.state.progress
        lr = self.engine.step(factor(self.config.schedule, progress.applied, total))
        self.engine.model.update_router_bias(outcome.load.to(self.engine.device))
        progress.applied += 1
        progress.in_a_row = 0
        if self.state.ema is not None:
            self.state.ema.update(self.engine.weights())
        return lr

    def _skip(self, step: int) -> float:
        self.engine.skip()
        self.state.progress.skipped += 1
        self.state.progress.in_a_row += 1
        log.warning("step %d has a loss or gradient that is not finite: skipped on all ranks", step)
        return 0.0

    # ---- what is said ------------------------------------------------------------------------------------------------------

    def _report(self, step: int, total: int | None, outcome: Outcome, swap: Exchange, lr: float) -> None:
        applied, monitors = outcome.finite, self.state.monitors
        figures = {"lr": lr, "grad_norm": outcome.grad_norm, **outcome.metrics, "applied": float(applied)}
        figures |= {f"grad_norm/{part}": norm for part, norm in outcome.part_norms.items()}
        figures |= monitors.share(dict(zip(MODALITIES, swap.whole[0].tokens))) | self._lost(step, swap)
        alarms: list[str] = [] if applied else [f"skipped: step {step} is not finite"]
        if applied:
            more, alarms = monitors.step(step, outcome.metrics, outcome.grad_norm, outcome.load, outcome.growth)
            figures |= more
        if self.config.monitors.probe_every and (step + 1) % self.config.monitors.probe_every == 0:
            more, rung = self._probe()
            figures |= more
            alarms += rung
        self.metrics |= figures
        if (step + 1) % self.config.tracking.every == 0 or not applied or alarms:
            self.record.row(step, figures)
        for alarm in alarms:
            self.record.event(step, alarm)
        self.pace.mark(step, self.state.progress.tokens)
        self.record.show(step, total, figures, self.state.progress.lost, self.pace)
        moment = Moment(step, total, applied, figures, alarms, self.engine.model, self.folder)
        for callback in self.parts.callbacks:
            callback(moment)

    def _lost(self, step: int, swap: Exchange) -> dict[str, float]:
        """What the data of this step had to cut, drop or replace on all ranks; added to the run's totals."""
        if self.ahead.counts(step) is None:
            return {}
        lost = dict(zip(LOST, swap.sums[-len(LOST) :]))
        totals = self.state.progress.lost
        totals.update({name: totals.get(name, 0) + int(n) for name, n in lost.items()})
        return {f"data/{name}": n for name, n in lost.items()}

    # ---- now and then --------------------------------------------------------------------------------------------------------

    def _probe(self) -> tuple[dict[str, float], list[str]]:
        if self.probe_batch is None:
            fixed = self.parts.validation or self.parts.source.batches(0, self.engine.world.rank, self.engine.world.size)
            self.probe_batch = fixed[0].to(self.engine.device)
        with self.engine.gathered() as model:
            return ({}, []) if model is None else self.state.monitors.probe(model, self.probe_batch)

    def _evaluate(self, last: bool = False) -> None:
        """Held-out figures when they are due, and after the last step; never twice for one step, not even after a kill."""
        progress, every = self.state.progress, self.config.evaluation.every
        if progress.evaluated == progress.step or not (last or (every and progress.step % every == 0)):
            return
        progress.evaluated = progress.step
        self.heart.beat(progress.step, "evaluation", force=True)
        figures: dict[str, float] = {}
        if self.parts.validation:
            figures = {f"eval/{k}": v for k, v in self.engine.evaluate(self.parts.validation).items()}
            progress.score = figures["eval/loss"] if math.isfinite(figures["eval/loss"]) else None
        if self.parts.evaluate is not None:
            with self.engine.gathered() as model, torch.no_grad():
                if model is not None:
                    figures |= {f"eval/{k}": float(v) for k, v in self.parts.evaluate(model, progress.step).items()}
        if figures:
            self.metrics |= figures
            self.record.row(progress.step - 1, figures)
            self.record.say(f"step {progress.step}: " + "  ".join(f"{k} {v:.4g}" for k, v in figures.items()))

    def _same_weights(self) -> None:
        """Stop on all ranks before a damaged copy of the weights reaches a checkpoint or another step."""
        try:
            self.engine.check_weights()
        except WeightsDiffer as error:
            self.record.event(self.state.progress.step - 1, str(error))
            raise

    def _save(self) -> None:
        self.heart.beat(self.state.progress.step, "saving", force=True)
        self._same_weights()
        self.state.save(self.record.flush(), self.pace.elapsed_s())
