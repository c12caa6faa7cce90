"""Control: episodes of any gymnasium environment, from numbers or pixels, with demonstrations as prompts.

In: a model with `rollout`, a control task, its demonstrations. Out: one record per episode, keyed by its seed. An environment
that crashes fails its own episodes only; they are counted, with the return of random play where that is known. Observations
are what a policy may know; the return never enters a prompt.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from weft.benchmarks.harness.environments import Shown, begin, make_env, spread_of
from weft.benchmarks.harness.media_files import FRAMES, write_png
from weft.benchmarks.harness.metrics import normalised_return
from weft.benchmarks.harness.questions import SLOT, Variant, words
from weft.benchmarks.harness.record_file import RecordFile
from weft.benchmarks.harness.samples import Sample
from weft.benchmarks.harness.task import Task, TaskError
from weft.inference.rollout import EpisodeSpec
from weft.tokenizers.segment import Image, Segment, Sensor

Record = dict[str, Any]


def returns_scale(task: Task, root: Path) -> dict[str, float] | None:
    """Returns of random play and of the expert, from the task or from the file that it names."""
    control = task.control
    assert control is not None
    if control.random is not None and control.expert is not None:
        return {"random": control.random, "expert": control.expert}
    if control.scale is None:
        return None
    name, _, path = control.scale.partition("#")
    try:
        value = json.loads((root / name).read_text(encoding="utf-8"))
        for step in filter(None, path.split("/")):
            value = value[step]
        return {name: float(_mean(value[name])) for name in ("random", "expert")}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise TaskError(f"control.scale {control.scale!r} does not lead to random and expert returns ({error!r})") from None


def _mean(value: Any) -> Any:
    """A number, or the mean of an object with mean and spread (JAT's table of scores)."""
    return value["mean"] if isinstance(value, dict) else value


def play(
    model: Any,
    task: Task,
    root: Path,
    pool: Sequence[Sample],
    file: RecordFile,
    variant: Variant,
    *,
    episodes: int,
    seed: int,
    batch: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Record]:
    """Play what is not on file yet; the records of all episodes, by seed."""
    control = task.control
    assert control is not None
    seeds = [control.first_seed + i for i in range(episodes)]
    scale = returns_scale(task, root)
    if "normalised_return" in task.metrics and scale is None:
        raise TaskError(f"task {task.name!r} normalises returns; give control.random and control.expert, or control.scale")
    open_seeds = [s for s in seeds if not file.has(str(s), task.digest())]
    player = _Player(model, task, pool, variant, seed) if open_seeds else None
    # What is said or shown at the start depends on the episode: then each is played alone.
    own = (task.pick == "similar" and task.shots) or SLOT.search(control.instruction or "")
    done = len(seeds) - len(open_seeds)
    for part in _runs(open_seeds, 1 if own else batch):
        assert player is not None
        found = player.episodes(part)
        file.add([{**record, "digest": task.digest()} for record in found])
        done += len(part)
        progress(done, len(seeds))
    return [_scored(file.records[str(s)], scale) for s in seeds]


def chance(task: Task, root: Path, episodes: int) -> list[Record]:
    """Records of the same episodes played by drawing actions."""
    control, scale = task.control, returns_scale(task, root)
    records: list[Record] = []
    assert control is not None
    for seed in range(control.first_seed, control.first_seed + episodes):
        env = make_env(task)
        try:
            begin(env, seed)
            env.action_space.seed(seed)
            total, length, over = 0.0, 0, False
            while not over and length < control.max_steps:
                _, reward, terminated, truncated, _ = env.step(env.action_space.sample())
                total, length, over = total + float(reward), length + 1, bool(terminated or truncated)
            record: Record = {"key": str(seed), "scores": {"return": total, "length": float(length)}}
        except Exception as error:
            record = {"key": str(seed), "failed": f"{type(error).__name__}: {error}".splitlines()[0]}
        finally:
            env.close()
        records.append(_scored(record, scale))
    return records


def _runs(seeds: Sequence[int], size: int) -> list[list[int]]:
    """Consecutive seeds, at most `size` together."""
    runs: list[list[int]] = []
    for seed in seeds:
        if runs and len(runs[-1]) < size and seed == runs[-1][-1] + 1:
            runs[-1].append(seed)
        else:
            runs.append([seed])
    return runs


def _scored(record: Record, scale: dict[str, float] | None) -> Record:
    """A record with its place on the scale, which is not on file: a file of returns may have been corrected since."""
    if scale is None:
        return record
    if record.get("failed"):
        return {**record, "scores": {"return": scale["random"]}}
    place = float(normalised_return([record["scores"]["return"]], scale["random"], scale["expert"])[0])
    return {**record, "scores": {**record["scores"], "normalised_return": place}}


def _demonstrations(task: Task, pool: Sequence[Sample], seed: int) -> list[list[Segment]]:
    """Whole documents of the pool: `shots` drawn ones, or all where the nearest will be chosen."""
    if not task.shots:
        return []
    if len(pool) < task.shots:
        raise TaskError(f"{task.shots} demonstrations are asked for, the training documents hold {len(pool)}")
    drawn = np.random.default_rng([seed, 21]).permutation(len(pool))[: task.shots]
    return [list(pool[int(i)].load().segments) for i in (range(len(pool)) if task.pick == "similar" else drawn)]


class _Player:
    """Rolls episodes of one variant out and isolates the ones that crash."""

    def __init__(self, model: Any, task: Task, pool: Sequence[Sample], variant: Variant, seed: int) -> None:
        assert task.control is not None
        self.model, self.task, self.control, self.variant, self.seed = model, task, task.control, variant, seed
        shown = "demonstrations" not in variant.drop
        self.shown = _demonstrations(task, pool, seed) if shown else []
        self.instruction = None if "text" in variant.drop else self.control.instruction
        self.spec = EpisodeSpec(self.control.kind, self.control.rate_hz, self.instruction, history=self.control.history)
        similar = task.pick == "similar" and self.shown
        self.vectors = model.embed([self._opening(d) for d in self.shown]) if similar else None
        self.noisy = variant.corruption is not None and variant.corruption.kind == "noise"
        self.spread: np.ndarray | None = None
        self.openings: dict[int, Any] = {}

    def _opening(self, demonstration: list[Segment]) -> Any:
        return next((s for s in demonstration if isinstance(s, Sensor | Image)), demonstration[0])

    def _env(self) -> Shown:
        return Shown(self.task, self.variant, self.seed, self.spread, self.openings)

    def episodes(self, seeds: list[int]) -> list[Record]:
        """Records of consecutive seeds."""
        try:
            if self.noisy and self.spread is None:
                self.spread = spread_of(self.task)
            played = self.model.rollout(
                self._env,
                self._instructed(seeds[0]),
                len(seeds),
                demonstrations=self._chosen(seeds[0]),
                max_steps=self.control.max_steps,
                seed=seeds[0],
                batch=len(seeds),
            )
        except TaskError:
            raise
        except Exception as error:
            if len(seeds) > 1:
                return [record for seed in seeds for record in self.episodes([seed])]
            return [self._about(seeds[0], {"failed": f"{type(error).__name__}: {error}".splitlines()[0]})]
        return [self._record(seed, episode) for seed, episode in zip(seeds, played.episodes, strict=True)]

    def _about(self, seed: int, record: Record) -> Record:
        return {"key": str(seed), "metadata": self.openings.get(seed, {}), **record}

    def _instructed(self, seed: int) -> EpisodeSpec:
        """The spec with `{mission}` in the instruction replaced by that entry of the episode's first observation."""
        if not SLOT.search(self.instruction or ""):
            return self.spec
        self._first(seed)
        return replace(self.spec, instruction=words(self.instruction or "", self.openings[seed]))

    def _first(self, seed: int) -> Segment:
        env = self._env()
        try:
            return env.reset(seed=seed)[0]
        finally:
            env.close()

    def _chosen(self, seed: int) -> list[list[Segment]]:
        """Demonstrations for an episode: those whose first observation is nearest to its own, the nearest last."""
        if self.vectors is None:
            return self.shown
        near = np.argsort(-(self.vectors @ self.model.embed([self._first(seed)])[0]), kind="stable")[: self.task.shots]
        return [self.shown[int(i)] for i in reversed(near)]

    def _record(self, seed: int, episode: Any) -> Record:
        total = episode.total
        if not np.isfinite(total):
            return self._about(seed, {"failed": "the environment gave a reward that is not finite"})
        actions = [np.asarray(action).tolist() for action in episode.actions]
        scores = {"return": total, "length": float(len(episode))}
        return self._about(seed, {"scores": scores, "actions": actions, "ended": episode.ended})


def strip(task: Task, record: Record, path: Path) -> str | None:
    """Replay an episode's actions and write FRAMES pictures side by side; None where the environment cannot be drawn."""
    actions = record.get("actions")
    if not actions:
        return None
    try:
        env = make_env(task, render=True)
    except Exception as error:
        logging.getLogger(__name__).warning("%s cannot be drawn: %s", task.name, error)
        return None
    try:
        begin(env, int(record["key"]))
        frames, wanted = (
            [np.asarray(env.render())],
            set(np.linspace(0, len(actions) - 1, FRAMES - 1).round().astype(int).tolist()),
        )
        for step, action in enumerate(actions):
            space = env.action_space
            env.step(int(action) if hasattr(space, "n") else np.asarray(action, space.dtype).reshape(space.shape))
            if step in wanted:
                frames.append(np.asarray(env.render()))
    except Exception as error:
        logging.getLogger(__name__).warning("%s cannot be drawn: %s", task.name, error)
        return None
    finally:
        env.close()
    every = max(1, frames[0].shape[0] // 120)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_png(path, np.concatenate([f[::every, ::every] for f in frames], axis=1))
    return path.name
