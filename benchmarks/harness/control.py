"""Control: episodes of any gymnasium environment, from numbers or pixels, with demonstrations as prompts.

In: a model with `rollout`, a control task, its demonstrations. Out: one record per episode, keyed by its seed. An environment
that crashes fails its own episodes only; they are counted, with the return of random play where that is known. Observations
are what a policy may know; the return never enters a prompt.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from weft.benchmarks.harness.media_files import write_png
from weft.benchmarks.harness.metrics import normalised_return
from weft.benchmarks.harness.questions import SLOT, words
from weft.benchmarks.harness.record_file import RecordFile
from weft.benchmarks.harness.samples import Sample
from weft.benchmarks.harness.task import Task, TaskError
from weft.inference.rollout import EpisodeSpec
from weft.tokenizers.segment import Image, Segment, Sensor

Record = dict[str, Any]
FRAMES = 8
"""Pictures of a strip."""


def make_env(task: Task, render: bool = False) -> Any:
    """One environment of the task."""
    try:
        import gymnasium
    except ModuleNotFoundError:
        raise ModuleNotFoundError("control tasks need gymnasium; pip install 'weft[control]'") from None
    assert task.control is not None and task.data.environment is not None
    if sys.platform == "linux" and not os.environ.get("DISPLAY"):  # both are read when a renderer is first imported
        os.environ.setdefault("SDL_VIDEODRIVER", "dummy")
        os.environ.setdefault("MUJOCO_GL", "egl")
    pixels = task.control.observe == "pixels"
    options = {**({"render_mode": "rgb_array"} if pixels or render else {}), **task.data.make}
    try:
        env = gymnasium.make(task.data.environment, **options)
    except gymnasium.error.Error as error:
        raise TaskError(f"environment {task.data.environment!r} cannot be made ({error}); install what registers it") from error
    if pixels:
        from gymnasium.wrappers import AddRenderObservation

        env = AddRenderObservation(env, render_only=True)
    return env


def observer(observe: str) -> Callable[[Any], Any] | None:
    """How an observation is shown, see `Control.observe`."""
    how, _, key = observe.partition(":")
    if observe == "state":
        return None
    if observe == "pixels":
        return lambda frame: Image(np.asarray(frame, np.uint8))
    if how == "pixels" and key:
        return lambda seen: Image(np.asarray(seen[key], np.uint8))
    if how == "key" and key:
        names = key.split("+")
        return lambda seen: np.concatenate([np.asarray(seen[name], np.float64).reshape(-1) for name in names])
    raise TaskError(f"control.observe is {observe!r}; use state, pixels, key:NAME, key:NAME+NAME or pixels:NAME")


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
        for step in path.split("/"):
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
    *,
    episodes: int,
    shots: int,
    seed: int,
    batch: int,
) -> list[Record]:
    """Play what is not on file yet; the records of all episodes, by seed."""
    control = task.control
    assert control is not None
    seeds = [control.first_seed + i for i in range(episodes)]
    scale = returns_scale(task, root)
    if "normalised_return" in task.metrics and scale is None:
        raise TaskError(f"task {task.name!r} normalises returns; give control.random and control.expert, or control.scale")
    player = _Player(model, task, _demonstrations(task, pool, shots, seed), shots)
    open_seeds = [s for s in seeds if not file.has(str(s), task.digest())]
    # What is said or shown at the start depends on the episode: then each is played alone.
    own = (task.pick == "similar" and shots) or SLOT.search(control.instruction or "")
    size = 1 if own else batch
    for part in _runs(open_seeds, size):
        found = player.episodes(part)
        for record in found:
            _score(record, scale)
            record["digest"] = task.digest()
        file.add(found)
    return [file.records[str(s)] for s in seeds]


def _runs(seeds: Sequence[int], size: int) -> list[list[int]]:
    """Consecutive seeds, at most `size` together."""
    runs: list[list[int]] = []
    for seed in seeds:
        if runs and len(runs[-1]) < size and seed == runs[-1][-1] + 1:
            runs[-1].append(seed)
        else:
            runs.append([seed])
    return runs


def _score(record: Record, scale: dict[str, float] | None) -> None:
    if record.get("failed"):
        record["scores"] = {"return": scale["random"]} if scale else {}
        return
    total = record["scores"]["return"]
    if scale:
        record["scores"]["normalised_return"] = float(normalised_return([total], scale["random"], scale["expert"])[0])


def _demonstrations(task: Task, pool: Sequence[Sample], shots: int, seed: int) -> list[list[Segment]]:
    """Whole documents of the pool: `shots` drawn ones, or all where the nearest will be chosen."""
    if not shots:
        return []
    if len(pool) < shots:
        raise TaskError(f"{shots} demonstrations are asked for, the training documents hold {len(pool)}")
    rows = range(len(pool)) if task.pick == "similar" else np.random.default_rng([seed, 21]).permutation(len(pool))[:shots]
    return [list(pool[int(i)].load().segments) for i in rows]


class _Player:
    """Rolls episodes out and isolates the ones that crash."""

    def __init__(self, model: Any, task: Task, shown: list[list[Segment]], shots: int) -> None:
        assert task.control is not None
        self.model, self.task, self.shown, self.shots = model, task, shown, shots
        self.control = task.control
        look = observer(self.control.observe)
        self.spec = EpisodeSpec(
            self.control.kind, self.control.rate_hz, self.control.instruction, observe=look, history=self.control.history
        )
        similar = task.pick == "similar" and shots
        self.vectors = model.embed([self._opening(d) for d in shown]) if similar else None

    def _opening(self, demonstration: list[Segment]) -> Any:
        return next((s for s in demonstration if isinstance(s, Sensor | Image)), demonstration[0])

    def episodes(self, seeds: list[int]) -> list[Record]:
        """Records of consecutive seeds."""
        try:
            played = self.model.rollout(
                lambda: make_env(self.task),
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
            return [{"key": str(seeds[0]), "failed": f"{type(error).__name__}: {error}".splitlines()[0]}]
        return [self._record(seed, episode) for seed, episode in zip(seeds, played.episodes, strict=True)]

    def _instructed(self, seed: int) -> EpisodeSpec:
        """The spec with `{mission}` in the instruction replaced by that entry of the episode's first observation."""
        if not SLOT.search(self.control.instruction or ""):
            return self.spec
        return replace(self.spec, instruction=words(self.control.instruction or "", self._first(seed)))

    def _first(self, seed: int) -> Any:
        env = make_env(self.task)
        try:
            return env.reset(seed=seed)[0]
        finally:
            env.close()

    def _chosen(self, seed: int) -> list[list[Segment]]:
        """Demonstrations for an episode: those whose first observation is nearest to its own, the nearest last."""
        if self.vectors is None:
            return self.shown
        seen = self._first(seed)
        first = self.spec.observe(seen) if self.spec.observe else seen
        if not isinstance(first, Segment):
            first = Sensor(np.asarray(first, np.float64).reshape(1, -1), rate_hz=self.control.rate_hz, kind=self.control.kind)
        near = np.argsort(-(self.vectors @ self.model.embed([first])[0]), kind="stable")[: self.shots]
        return [self.shown[int(i)] for i in reversed(near)]

    def _record(self, seed: int, episode: Any) -> Record:
        total = episode.total
        if not np.isfinite(total):
            return {"key": str(seed), "failed": "the environment gave a reward that is not finite"}
        actions = [np.asarray(action).tolist() for action in episode.actions]
        scores = {"return": total, "length": float(len(episode))}
        return {"key": str(seed), "scores": scores, "actions": actions, "ended": episode.ended}


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
        env.reset(seed=int(record["key"]))
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
