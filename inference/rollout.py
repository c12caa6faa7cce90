"""Episodes of a gymnasium environment, acted by the model, many at once.

An episode is written as in training: an instruction if there is one, then one sensor reading and one action per step, both at
the step's time. Demonstrations are episodes that end one step before the new one begins. All episodes advance together; one
that is over leaves. Every action is legal or the episode fails with an error.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from weft.inference.errors import SessionError
from weft.inference.prompts import as_segments
from weft.inference.sampling import Sampling
from weft.inference.session import Session, Sessions, SessionSpec
from weft.inference.spaces import as_space, to_env
from weft.inference.values import is_integer
from weft.tokenizers.bundle import StreamTokenizer
from weft.tokenizers.clock import segment_start, segment_times
from weft.tokenizers.segment import Segment, Sensor


@dataclass(frozen=True)
class EpisodeSpec:
    """How an environment is written as a stream; the same as in its training documents."""

    kind: str
    """Sensor kind of the observation (its fitted scaling)."""
    rate_hz: float
    """Steps a second."""
    instruction: Any = None
    """Said before the episode: a string or segments."""
    space: Any = None
    """Action space; None = the environment's own."""
    observe: Callable[[Any], Any] | None = None
    """Observation to numbers [C], or to a segment such as `Image`; None = flatten."""
    sampling: Sampling | None = None
    """How actions are drawn; None = the most likely one."""
    full_tokens: int | None = 16_384
    landmarks: int | None = 1_024
    history: int | None = None
    """Steps of one document; then a fresh one begins, at time zero. None: the whole episode is one document."""

    def __post_init__(self) -> None:
        if self.history is not None and self.history < 1:
            raise SessionError(f"history={self.history} must be at least 1 step, or None for the whole episode")


@dataclass
class Episode:
    """What happened in one episode."""

    seed: int
    rewards: list[float] = field(default_factory=list)
    observations: list[np.ndarray] = field(default_factory=list)
    actions: list[np.ndarray] = field(default_factory=list)
    ended: bool = False
    """The environment ended it (terminated or truncated), not `max_steps`."""

    @property
    def total(self) -> float:
        """The return: the sum of rewards."""
        return float(np.sum(self.rewards))

    def __len__(self) -> int:
        return len(self.rewards)


@dataclass(frozen=True)
class Rollout:
    """All episodes, in the order of their seeds."""

    episodes: tuple[Episode, ...]

    @property
    def returns(self) -> np.ndarray:
        """float64 [episodes]."""
        return np.array([episode.total for episode in self.episodes])


def rollout(
    model: Any,
    tokenizer: StreamTokenizer,
    env: Any,
    spec: EpisodeSpec,
    episodes: int,
    demonstrations: Sequence[Any] = (),
    max_steps: int = 1000,
    seed: int = 0,
    batch: int = 64,
) -> Rollout:
    """Act in `episodes` episodes with seeds `seed`, `seed + 1`, ...; at most `batch` at a time.

    `env`: an environment id, a function that makes one environment per call, or a gymnasium vector environment.
    `demonstrations`: documents or lists of segments that every episode is prompted with. The result of an episode does not
    depend on `batch`.
    """
    if not all(is_integer(n) and n >= 1 for n in (episodes, max_steps, batch)):
        raise SessionError(f"episodes={episodes!r}, max_steps={max_steps!r} and batch={batch!r} must be integers of at least 1")
    vector = hasattr(env, "num_envs")
    batch = min(batch, env.num_envs) if vector else batch
    make = None if vector else _maker(env)
    if not isinstance(spec, EpisodeSpec):
        raise SessionError(f"a rollout needs an EpisodeSpec(kind, rate_hz), got {type(spec).__name__}")
    done: list[Episode] = []
    for first in range(0, episodes, batch):
        seeds = list(range(seed + first, seed + min(first + batch, episodes)))
        if make is None:
            done += _together(model, tokenizer, _Vector(env), spec, seeds, demonstrations, max_steps)
            continue
        envs = _Separate([make() for _ in seeds])
        try:
            done += _together(model, tokenizer, envs, spec, seeds, demonstrations, max_steps)
        finally:
            envs.close()
    return Rollout(tuple(done))


class _Separate:
    """One environment per episode."""

    def __init__(self, envs: list[Any]) -> None:
        self.envs, self.space = envs, envs[0].action_space

    def reset(self, seeds: list[int]) -> list[Any]:
        """First observations."""
        return [env.reset(seed=number)[0] for env, number in zip(self.envs, seeds)]

    def step(self, actions: dict[int, Any]) -> dict[int, tuple[Any, float, bool]]:
        """Observation, reward and whether it is over, of each environment that acts."""
        out = {}
        for i, action in actions.items():
            seen, reward, terminated, truncated, _ = self.envs[i].step(action)
            out[i] = (seen, float(reward), bool(terminated or truncated))
        return out

    def close(self) -> None:
        for env in self.envs:
            env.close()


class _Vector:
    """A gymnasium vector environment; the ones that are over go on with any action, and are not looked at."""

    def __init__(self, envs: Any) -> None:
        self.envs, self.space = envs, envs.single_action_space
        self.idle = np.zeros(self.space.shape, self.space.dtype) if hasattr(self.space, "low") else 0
        if hasattr(self.space, "low"):
            self.idle = np.clip(self.idle, self.space.low, self.space.high)

    def reset(self, seeds: list[int]) -> list[Any]:
        """First observations."""
        spare = [seeds[-1]] * (self.envs.num_envs - len(seeds))
        return list(self.envs.reset(seed=[*seeds, *spare])[0][: len(seeds)])

    def step(self, actions: dict[int, Any]) -> dict[int, tuple[Any, float, bool]]:
        """Observation, reward and whether it is over, of each environment that acts."""
        every = np.array([actions.get(i, self.idle) for i in range(self.envs.num_envs)])
        seen, reward, terminated, truncated, _ = self.envs.step(every)
        return {i: (seen[i].copy(), float(reward[i]), bool(terminated[i] or truncated[i])) for i in actions}


def _together(
    model: Any,
    tokenizer: StreamTokenizer,
    envs: _Separate | _Vector,
    spec: EpisodeSpec,
    seeds: list[int],
    shown: Sequence[Any],
    most: int,
) -> list[Episode]:
    space = as_space(spec.space if spec.space is not None else envs.space)
    first = _opening(model, tokenizer, spec, space, shown)
    specs = [_spec_of(first.spec, number) for number in seeds]
    sessions = [_begin(first, own) for own in specs]
    episodes = [Episode(number) for number in seeds]
    seen = dict(enumerate(envs.reset(seeds)))
    active = list(range(len(seeds)))
    for step in range(most):
        at = step if spec.history is None else step % spec.history
        for i in active:
            if step and not at:
                sessions[i] = _begin(first, specs[i], sessions[i].questions)
            observation = _observe(seen[i], spec)
            episodes[i].observations.append(np.asarray(getattr(observation, "values", seen[i])))
            sessions[i].push(observation, round(at / spec.rate_hz * 1e9))
        actions = dict(zip(active, Sessions([sessions[i] for i in active]).act()))
        for i, (after, reward, over) in envs.step({i: to_env(a, space, envs.space) for i, a in actions.items()}).items():
            seen[i] = after
            episodes[i].actions.append(actions[i])
            episodes[i].rewards.append(reward)
            episodes[i].ended = over
        active = [i for i in active if not episodes[i].ended]
        if not active:
            break
    return episodes


def _spec_of(spec: SessionSpec, number: int) -> SessionSpec:
    """What the sessions of the episode with this seed are about."""
    return replace(spec, sampling=replace(spec.sampling, seed=spec.sampling.seed + number))


def _begin(first: Session, spec: SessionSpec, questions: int = 0) -> Session:
    """A document of an episode, after so many earlier draws."""
    session = first.fork()
    session.spec = spec
    session.questions += questions
    return session


def _opening(model: Any, tokenizer: StreamTokenizer, spec: EpisodeSpec, space: Any, shown: Sequence[Any]) -> Session:
    """What every episode begins with, read once."""
    session = Session(
        model,
        tokenizer,
        SessionSpec(spec.instruction, space, spec.rate_hz, spec.full_tokens, spec.landmarks, spec.sampling or Sampling()),
    )
    for segments in _before(shown, spec.rate_hz):
        session.push(segments)
    session.read()
    return session


def _before(shown: Sequence[Any], rate_hz: float) -> list[list[Segment]]:
    """Demonstrations one after another, moved so that the last one ends a step before time zero."""
    step = round(1e9 / rate_hz)
    moved: list[list[Segment]] = []
    end = -step
    for demonstration in reversed(list(shown)):
        segments = list(as_segments(demonstration, "demonstration"))
        starts = [segment_start(s) for s in segments]
        if any(start is None for start in starts):
            moved.insert(0, segments)
            continue
        shift = end - max(_last(s, start or 0) for s, start in zip(segments, starts))
        timed = sorted(zip(starts, range(len(segments))), key=lambda pair: (pair[0] or 0, pair[1]))
        moved.insert(0, [replace(segments[i], start=(start or 0) + shift) for start, i in timed])
        end = min((start or 0) for start in starts) + shift - step
    return moved


def _last(segment: Segment, start: int) -> int:
    """ns of a segment's last reading or action."""
    values = getattr(segment, "values", None)
    return start if values is None else start + int(segment_times(segment, len(np.atleast_1d(np.asarray(values))))[-1])


def _observe(observation: Any, spec: EpisodeSpec) -> Segment:
    value = spec.observe(observation) if spec.observe else observation
    if isinstance(value, Segment):
        return value
    try:
        reading = np.asarray(value, np.float64).reshape(1, -1)
    except (TypeError, ValueError) as error:
        kind = type(value).__name__
        raise SessionError(
            f"an observation of type {kind} is not numbers; give EpisodeSpec(observe=...) that returns [C] or a segment"
        ) from error
    return Sensor(reading, rate_hz=spec.rate_hz, kind=spec.kind)


def _maker(env: Any) -> Callable[[], Any]:
    if callable(env) and not hasattr(env, "step"):
        return env  # type: ignore[no-any-return]
    if not isinstance(env, str):
        raise SessionError(
            f"env is a {type(env).__name__}; give an environment id, a function that makes one, or a vector environment, "
            "so that episodes run side by side"
        )
    try:
        import gymnasium
    except ModuleNotFoundError:
        raise ModuleNotFoundError("rollouts by environment id need gymnasium; pip install 'weft[control]'") from None

    def make() -> Any:
        try:
            return gymnasium.make(env)
        except (gymnasium.error.Error, ImportError) as error:
            raise SessionError(f"gymnasium does not make {env!r} ({error}); check the id, or give a function") from error

    return make
