"""Environments as a task shows them: which one, what a policy sees of it, and what is taken away or spoilt.

In: a control task, a variant. Out: an environment whose observations are segments (`Sensor` [1 C] or `Image`), and what was
known of each episode when it began (`opening`), which slices may be cut by. A removed observation is a reading of missing
values or a grey picture, so that time goes on. Noise is measured against each channel's spread in random play; a late clock
shows the observation of that many seconds ago.
"""

from __future__ import annotations

import hashlib
import os
import sys
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from itertools import combinations
from typing import Any

import numpy as np

from weft.benchmarks.harness.corrupt import TABLE, corrupt
from weft.benchmarks.harness.questions import Variant
from weft.benchmarks.harness.task import Control, Task, TaskError
from weft.tokenizers.segment import Image, Segment, Sensor

PROBE_STEPS = 200
"""Steps of random play behind the spread of a channel."""


def make_env(task: Task, render: bool = False) -> Any:
    """One gymnasium environment of the task, as it is."""
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
    except (gymnasium.error.Error, ModuleNotFoundError) as error:
        raise TaskError(f"environment {task.data.environment!r} cannot be made ({error}); install what registers it") from error
    if pixels:
        from gymnasium.wrappers import AddRenderObservation

        env = AddRenderObservation(env, render_only=True)
    return env


def begin(env: Any, seed: int) -> tuple[Any, Any]:
    """The episode with this seed, whatever was played before: some wrappers (Meta-World's choice of a goal) draw from the
    environment's generator before they pass the seed on, so the generator is set first."""
    from gymnasium.utils.seeding import np_random

    env.unwrapped.np_random = np_random(seed)[0]
    first: tuple[Any, Any] = env.reset(seed=seed)
    return first


def observer(control: Control) -> Callable[[Any], Segment]:
    """How an observation is shown, see `Control.observe`."""
    how, _, key = control.observe.partition(":")

    def picture(frame: Any) -> Segment:
        pixels = np.asarray(frame, np.uint8)
        return Image(_resized(pixels, control.frame) if control.frame else pixels)

    def numbers(values: list[Any]) -> Segment:
        flat = np.concatenate([np.asarray(v, np.float64).reshape(-1) for v in values])
        return Sensor(flat[None], rate_hz=control.rate_hz, kind=control.kind)

    if control.observe == "state":
        return lambda seen: numbers([seen])
    if control.observe in ("pixels", "frame"):
        return picture
    if how == "pixels" and key:
        return lambda seen: picture(seen[key])
    if how == "key" and key:
        return lambda seen: numbers([seen[name] for name in key.split("+")])
    raise TaskError(f"control.observe is {control.observe!r}; use state, pixels, frame, key:NAME, key:NAME+NAME or pixels:NAME")


def _resized(pixels: np.ndarray, size: tuple[int, ...]) -> np.ndarray:
    """Frames of a game are large: the mean over the pixels that one takes the place of."""
    import PIL.Image

    return np.asarray(PIL.Image.fromarray(pixels).resize((size[1], size[0]), PIL.Image.Resampling.BOX))


def opening(seen: Any, info: Any) -> dict[str, Any]:
    """What is said of an episode when it begins: words and whole numbers of its first observation and of `info`."""
    found: dict[str, Any] = {}
    for source in (info, seen):
        for name, value in source.items() if isinstance(source, dict) else ():
            if isinstance(value, np.generic):
                value = value.item()
            if isinstance(value, str | int | bool):
                found[str(name)] = value
    return found


class Shown:
    """An environment whose observations are segments, spoilt as the variant says, the same way in every run."""

    def __init__(self, task: Task, variant: Variant, seed: int, spread: np.ndarray | None, openings: dict[int, Any]) -> None:
        assert task.control is not None
        self.env, self.control, self.variant = make_env(task), task.control, variant
        self.action_space = self.env.action_space
        self.look, self.seed, self.spread, self.openings = observer(task.control), seed, spread, openings
        late = variant.corruption.level if variant.corruption and variant.corruption.kind == "skew" else 0.0
        self.recent: deque[Segment] = deque(maxlen=1 + round(late * task.control.rate_hz))
        self.rng = np.random.default_rng(0)

    def reset(self, *, seed: int) -> tuple[Segment, Any]:
        """The first observation of the episode with this seed."""
        seen, info = begin(self.env, seed)
        self.rng = np.random.default_rng(list(hashlib.sha256(f"{self.seed}/{seed}".encode()).digest()[:8]))
        self.recent.clear()
        self.openings[seed] = opening(seen, info)
        return self._show(seen), info

    def step(self, action: Any) -> tuple[Segment, float, bool, bool, Any]:
        """As gymnasium's."""
        seen, reward, terminated, truncated, info = self.env.step(action)
        return self._show(seen), reward, terminated, truncated, info

    def close(self) -> None:
        """As gymnasium's."""
        self.env.close()

    def _show(self, seen: Any) -> Segment:
        self.recent.append(self.look(seen))
        segment, spoilt = self.recent[0], self.variant.corruption
        if segment.modality in self.variant.drop:
            return _blank(segment)
        if spoilt is None or spoilt.kind == "skew":
            return segment
        if spoilt.kind == "noise" and isinstance(segment, Sensor):
            values = np.asarray(segment.values, np.float64)
            spread = np.ones(values.shape[1]) if self.spread is None else self.spread
            return replace(segment, values=values + self.rng.normal(0, 1, values.shape) * spoilt.level * spread)
        return corrupt(segment, spoilt, self.rng)


def _blank(segment: Segment) -> Segment:
    if isinstance(segment, Sensor):
        return replace(segment, values=np.full(np.shape(segment.values), np.nan))
    assert isinstance(segment, Image)
    return replace(segment, pixels=np.full(np.shape(segment.pixels), 128, np.uint8))


def spread_of(task: Task) -> np.ndarray | None:
    """float64 [C]: standard deviation of each channel in PROBE_STEPS steps of random play; None for pictures."""
    assert task.control is not None
    env = Shown(task, Variant(), 0, None, {})
    try:
        env.action_space.seed(task.control.first_seed)
        rows: list[np.ndarray] = []
        over = True
        while len(rows) < PROBE_STEPS:
            if over:
                segment, _ = env.reset(seed=task.control.first_seed + 1_000_000 + len(rows))
                over = False
            else:
                segment, _, terminated, truncated, _ = env.step(env.action_space.sample())
                over = terminated or truncated
            if not isinstance(segment, Sensor):
                return None
            rows.append(np.asarray(segment.values, np.float64)[0])
        return np.asarray(np.std(rows, axis=0))
    finally:
        env.close()


def removals(task: Task) -> list[Variant]:
    """Instruction, observations and demonstrations, each and in pairs; the clock and past actions stay."""
    assert task.control is not None
    have = [_modality(task.control)]
    have += ["text"] if task.control.instruction else []
    have += ["demonstrations"] if task.shots else []
    every = [drop for size in (1, 2) for drop in combinations(sorted(have), size)]
    return [Variant(f"without {' and '.join(drop)}", drop) for drop in every]


def spoilt(task: Task) -> list[Variant]:
    """Noise, blurred pictures or lost readings, and observations that come late, at the levels of the table."""
    assert task.control is not None
    kinds = ("noise", "dropout", "skew") if _modality(task.control) == "sensor" else ("blur", "noise", "skew")
    rows = [c for c in TABLE if c.kind in kinds and (c.kind != "skew" or round(c.level * task.control.rate_hz) > 0)]
    return [Variant(c.name, corruption=c) for c in rows]


def _modality(control: Control) -> str:
    return "image" if control.observe == "frame" or control.observe.startswith("pixels") else "sensor"
