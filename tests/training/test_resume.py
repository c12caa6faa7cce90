"""A run that is killed, stopped or poisoned is the run that was not."""

from __future__ import annotations

import contextlib
import os
import random
import select
import signal
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.training.runs import config, data, fingerprint, go, sha
from tests.training.synthetic import FEATURES, mixed_streams, small_model
from weft.tokenizers.pack import Batch, collate
from weft.training.checkpoint import CheckpointError, checkpoints
from weft.training.config import RunConfig
from weft.training.parts import Moment
from weft.training.run_state import TrainingDiverged
from weft.training.signals import Terminated
from weft.training.tracking import read_jsonl

SHORT = 5  # steps of the run that is killed


class Wrapped:
    """The run's data, to be changed on the way."""

    def __init__(self, run: RunConfig) -> None:
        self.inner = data(run)

    def batches(self, step: int, rank: int, world: int) -> list[Batch]:
        return self.inner.batches(step, rank, world)

    def has(self, step: int) -> bool:
        return self.inner.has(step)

    def identity(self) -> dict[str, object]:
        return self.inner.identity()

    def close(self) -> None:
        self.inner.close()


def child(run: RunConfig) -> int:
    """Run in a forked copy of this process, which has imported everything already; returns its pid."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        go(run, validation=[collate([mixed_streams(2, seed=9)], 128, FEATURES)])
        code = 0
    except SystemExit as ended:
        code = int(ended.code or 0)
    finally:
        os._exit(code)


def end(pid: int, after_s: float) -> int | None:
    """Kill `pid` after a while; the exit status if it was faster."""
    watch = os.pidfd_open(pid)
    if not select.select([watch], [], [], after_s)[0]:
        os.kill(pid, signal.SIGKILL)
    os.close(watch)
    _, status = os.waitpid(pid, 0)
    code = os.waitstatus_to_exitcode(status)
    return None if code == -signal.SIGKILL else code


def short(folder: Path) -> RunConfig:
    """Five steps, a checkpoint every two, everything on; the last evaluation stands before the last checkpoint."""
    checks = {"checkpoint": {"ema": 0.9, "every": 2, "keep_best": 1}, "evaluation": {"every": 3}}
    small = {"micro_batches": 1, "batch_tokens": 128}
    return config(folder, max_steps=SHORT, **checks, data=small, monitors={"probe_every": 3, "router_every": 2})


def kill_until(folder: Path, kills: int, seed: int, reference: dict[str, str], longest_s: float) -> int:
    """SIGKILL at random times, start again, and hold every finished run against the reference; returns finished runs."""
    draw, done, finished = random.Random(seed), 0, 0
    while done < kills:
        run = short(folder / str(finished))
        code = end(child(run), draw.uniform(0, longest_s))
        if code is None:
            done += 1
            continue
        assert code == 0, f"a resumed run failed with {code}"
        assert fingerprint(run.folder, SHORT) == reference
        finished += 1
    run = short(folder / str(finished))
    assert end(child(run), 240.0) == 0
    assert fingerprint(run.folder, SHORT) == reference
    return finished + 1


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, str], float]:
    """An uninterrupted run, and how long it took."""
    torch.manual_seed(0)
    run = config(tmp_path_factory.mktemp("whole"), checkpoint={"ema": 0.9})
    start = time.monotonic()
    go(run)
    return fingerprint(run.folder), time.monotonic() - start


@pytest.fixture(scope="module")
def short_reference(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, str], float]:
    """The same for the run that is killed: here first, so that every child inherits what a first run sets up."""
    torch.manual_seed(0)
    validation = [collate([mixed_streams(2, seed=9)], 128, FEATURES)]
    go(short(tmp_path_factory.mktemp("first")), validation=validation)
    run = short(tmp_path_factory.mktemp("short"))
    start = time.monotonic()
    assert end(child(run), 240.0) == 0
    return fingerprint(run.folder, SHORT), time.monotonic() - start


@pytest.fixture
def memory(tmp_path: Path) -> Iterator[Path]:
    """A folder in memory where there is one: SIGKILL loses nothing that was written, so that no disk has to be waited for."""
    shared = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=shared if os.access(shared, os.W_OK) else tmp_path) as folder:
        yield Path(folder)


def test_hundred_kills_anywhere_change_nothing(short_reference, memory):
    marks, seconds = short_reference
    assert kill_until(memory, 100, 1, marks, 0.6 * seconds) >= 1


@pytest.mark.slow
def test_thousand_kills_change_nothing(short_reference, memory):
    marks, seconds = short_reference
    assert kill_until(memory, 1000, 2, marks, 0.6 * seconds) >= 1


def test_three_chained_resumes_see_every_batch_once_and_in_order(tmp_path):
    seen: list[tuple[int, int]] = []

    class Watched(Wrapped):
        def batches(self, step: int, rank: int, world: int) -> list[Batch]:
            found = self.inner.batches(step, rank, world)
            seen.append((step, int(sum(b.ids.sum() for b in found))))
            return found

    whole = config(tmp_path / "whole", max_steps=12, monitors={"probe_every": 0})
    go(whole, source=Watched(whole))
    expected, seen[:] = list(seen), []
    for steps in (3, 6, 9, 12):
        part = config(tmp_path / "parts", max_steps=steps, schedule={"kind": "constant"}, monitors={"probe_every": 0})
        go(part, source=Watched(part))
    assert seen == expected
    assert [step for step, _ in seen] == list(range(12))


def test_sigterm_saves_and_exits_143_then_resumes_exactly(reference, tmp_path):
    marks, _ = reference
    run = config(tmp_path / "run", checkpoint={"ema": 0.9})

    def stop_at_five(moment: Moment) -> None:
        if moment.step == 4:
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Terminated) as ended:
        go(run, callbacks=[stop_at_five])
    assert ended.value.code == 143
    assert checkpoints(run.folder / "checkpoints")[-1].name == "step-00000005"
    go(run)
    assert fingerprint(run.folder) == marks


def test_damaged_newest_checkpoint_falls_back_to_the_one_before(reference, tmp_path):
    marks, _ = reference
    run = config(tmp_path / "run", checkpoint={"ema": 0.9})
    go(run)
    newest = checkpoints(run.folder / "checkpoints")[-1]
    raw = bytearray((newest / "optimizer.safetensors").read_bytes())
    raw[-1] ^= 1
    (newest / "optimizer.safetensors").write_bytes(raw)
    go(run)
    assert fingerprint(run.folder) == marks


def test_a_run_whose_checkpoints_are_all_damaged_is_not_begun_anew_in_silence(tmp_path):
    run = config(tmp_path / "run", max_steps=3)
    go(run)
    rows = (run.folder / "metrics.jsonl").read_bytes()
    for folder in checkpoints(run.folder / "checkpoints"):
        (folder / "trainer.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"none of the checkpoints in .* verifies .*choose another folder to begin anew"):
        go(run)
    assert (run.folder / "metrics.jsonl").read_bytes() == rows


# ---- poison ----------------------------------------------------------------------------------------------------------------


class Poisoned(Wrapped):
    """Steps of `bad` carry NaN; with `leave_out` they are not there at all."""

    def __init__(self, run: RunConfig, bad: set[int], where: str, leave_out: bool = False) -> None:
        super().__init__(run)
        self.bad, self.where, self.leave_out = bad, where, leave_out

    def batches(self, step: int, rank: int, world: int) -> list[Batch]:
        if self.leave_out:
            good = [s for s in range(64) if s not in self.bad]
            return self.inner.batches(good[step], rank, world)
        first, *rest = self.inner.batches(step, rank, world)
        if step in self.bad and self.where == "weight":
            first = replace(first, weight=first.weight.masked_fill(first.weight > 0, float("nan")))
            assert bool(first.weight.isnan().any())
        if step in self.bad and self.where == "input":
            first = replace(first, features={k: torch.full_like(v, float("nan")) for k, v in first.features.items()})
        return [first, *rest]


def tensors(folder: Path, step: int) -> dict[str, torch.Tensor]:
    at = folder / "checkpoints" / f"step-{step:08d}"
    return {**load_file(at / "model.safetensors"), **load_file(at / "optimizer.safetensors")}


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("where", ["input", "expert", "loss", "gradient"])
def test_poisoned_batch_leaves_the_run_that_never_saw_it(where, tmp_path):
    bad = {4}
    steady = {"schedule": {"kind": "constant", "warmup_steps": 0}, "monitors": {"probe_every": 0}}
    clean = config(tmp_path / "clean", max_steps=7, **steady)
    go(clean, source=Poisoned(clean, bad, where, leave_out=True))

    run = config(tmp_path / "run", max_steps=8, **steady)
    model = small_model()
    now = {"step": 0}
    hooks = []
    if where == "expert":
        experts = model.routers()[0].experts

        def break_expert(module, args, out):
            return out + float("nan") if now["step"] in bad else out

        hooks.append(experts.register_forward_hook(break_expert))
    if where == "gradient":

        def break_gradient(grad):
            return grad * float("nan") if now["step"] in bad else grad

        hooks.append(model.blocks[0].attention_norm.weight.register_hook(break_gradient))

    def tell(moment: Moment) -> None:
        now["step"] = moment.step + 1

    kind = {"input": "input", "loss": "weight"}.get(where, "none")
    with contextlib.ExitStack() as stack:
        for hook in hooks:
            stack.callback(hook.remove)
        go(run, source=Poisoned(run, bad, kind), model=model, callbacks=[tell])
    assert equal(tensors(run.folder, 8), tensors(clean.folder, 7))
    rows = read_jsonl(run.folder / "metrics.jsonl")
    assert [row["step"] for row in rows if row.get("applied") == 0.0] == [4]


def test_three_poisoned_steps_roll_back_and_continue_behind_them(tmp_path):
    run = config(tmp_path / "run", max_steps=9, schedule={"kind": "constant"}, monitors={"probe_every": 0})
    go(run, source=Poisoned(run, {4, 5, 6}, "input"))
    events = [row["event"] for row in read_jsonl(run.folder / "metrics.jsonl") if "event" in row]
    assert any("rollback: weights of step 3, data goes on at step 7" in event for event in events)
    other = config(tmp_path / "other", max_steps=5, schedule={"kind": "constant"}, monitors={"probe_every": 0})
    go(other, source=Poisoned(other, {3, 4, 5, 6}, "input", leave_out=True))
    assert equal(tensors(run.folder, 9), tensors(other.folder, 5))


def test_poison_without_end_stops_with_a_sentence(tmp_path):
    run = config(tmp_path / "run", max_steps=40, monitors={"probe_every": 0})
    with pytest.raises(TrainingDiverged, match=r"lower optimizer\.lr"):
        go(run, source=Poisoned(run, set(range(4, 40)), "input"))


def test_prefetch_thread_changes_nothing(reference, tmp_path):
    marks, _ = reference
    run = config(tmp_path / "run", checkpoint={"ema": 0.9}, data={"prefetch": 1})
    go(run)
    assert {k: v for k, v in fingerprint(run.folder).items()} == marks


def test_time_budget_ends_in_time_and_a_resume_keeps_its_decision(tmp_path):
    """The budget is that of some thirty steps of this machine as busy as it is: the first decision needs twelve."""
    start = time.monotonic()
    go(config(tmp_path / "measured", max_steps=6, monitors={"probe_every": 0}))
    budget_s = max(2.0, 5 * (time.monotonic() - start))
    run = config(tmp_path / "run", max_steps=None, max_seconds=budget_s, monitors={"probe_every": 0}, checkpoint={"every": 5})
    start = time.monotonic()
    first = go(run)
    assert time.monotonic() - start < 2 * budget_s + 4  # and what a busy machine adds to the last step and the save
    assert first.steps > 12
    again = go(run)
    assert again.steps >= first.steps - 1
    rows = [row["step"] for row in read_jsonl(run.folder / "metrics.jsonl")]
    assert rows == sorted(rows)
    assert np.all(np.diff(sorted(set(rows))) == 1)


def test_another_seed_or_model_is_refused(tmp_path):
    run = config(tmp_path / "run", max_steps=3)
    go(run)
    with pytest.raises(ValueError, match="another seed"):
        go(config(tmp_path / "run", max_steps=6, seed=1))
    with pytest.raises(ValueError, match=r"another model|size mismatch"):
        go(config(tmp_path / "run", max_steps=6), model=small_model(expert_width=32))
    assert sha(run.folder / "final" / "model.safetensors")
