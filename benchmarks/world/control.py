"""Four classic environments, their scripted experts, and demonstrations that teach a clone to recover.

In: an environment's name and seeds. Out: returns of any policy, and short fragments (observations [n C], actions [n D]).

The experts are short formulas: a linear-quadratic regulator (CartPole, upright Pendulum) and energy shaping (Pendulum,
MountainCarContinuous, Acrobot; Astrom and Furuta, "Swinging up a pendulum by energy control", Automatica 36, 2000).
Their continuous actions are rounded to a few levels, because a level is learnt from fewer examples than a real number and
the return stays the same. `measure` gives both ends of the normalised return.

Demonstrations follow DART (Laskey et al., arXiv 1703.09327): the state is disturbed by bursts of random actions, the label is
always what the expert does there. A fragment never contains a disturbed action except before its first observation, so
executed action and label agree and a model that reads its own past actions sees what it saw in training.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

Policy = Callable[[np.ndarray], np.ndarray | int]


@dataclass(frozen=True)
class Plant:
    """One environment as the world describes it."""

    name: str
    step_s: float
    """Seconds per environment step: the spacing of its sensor readings."""
    channels: tuple[str, ...]
    units: tuple[str, ...]
    choices: int | None = None
    """Discrete actions, None for a box."""
    low: float = 0.0
    high: float = 0.0
    burst: int = 8
    """Longest run of random actions, steps."""
    episode: int = 120
    """Steps of one demonstration episode."""

    @property
    def rate_hz(self) -> float:
        """Readings per second."""
        return 1.0 / self.step_s

    def space(self) -> dict[str, Any]:
        """The action space as a manifest writes it."""
        return {"n": self.choices} if self.choices else {"low": [self.low], "high": [self.high]}


PLANTS: dict[str, Plant] = {
    plant.name: plant
    for plant in (
        Plant("CartPole-v1", 0.02, ("position", "speed", "angle", "turn"), ("m", "m/s", "rad", "rad/s"), choices=2, burst=12),
        Plant("Pendulum-v1", 0.05, ("cosine", "sine", "turn"), ("1", "1", "rad/s"), low=-2.0, high=2.0, burst=20),
        # gymnasium gives this environment no physical time step; it is drawn at 30 frames per second.
        Plant("MountainCarContinuous-v0", 1 / 30, ("position", "speed"), ("1", "1/step"), low=-1.0, high=1.0, burst=25),
        Plant(
            "Acrobot-v1",
            0.2,
            ("cosine 1", "sine 1", "cosine 2", "sine 2", "turn 1", "turn 2"),
            ("1", "1", "1", "1", "rad/s", "rad/s"),
            choices=3,
            burst=8,
        ),
    )
}


def cartpole_expert(reading: np.ndarray) -> int:
    """Push towards the side to which the regulator leans."""
    return int(reading @ np.array([0.3, 0.6, 6.0, 1.5]) > 0)


def pendulum_expert(reading: np.ndarray) -> np.ndarray:
    """Pump energy to that of the upright rest, catch with a regulator near the top; torque -2, 0 or 2 N m."""
    cosine, sine, turn = (float(v) for v in reading)
    angle = np.arctan2(sine, cosine)
    surplus = turn * turn / 6 - 5 * (1 - cosine)  # energy above the upright rest, J (m = 1 kg, l = 1 m, g = 10 m/s2)
    if cosine > 0.8 and abs(5 * angle + turn) < 4:
        torque = -(6 * angle + 1.5 * turn)
    else:
        torque = -5 * surplus * (1 if turn >= 0 else -1)
    return np.array([np.clip(2 * round(torque / 2), -2, 2)], np.float32)


def mountain_car_expert(reading: np.ndarray) -> np.ndarray:
    """Push along the motion with 0.6, and a little early back to the valley: a clone that errs there cannot get stuck."""
    return np.array([0.6 if reading[1] >= 0.03 * (reading[0] + 0.52) else -0.6], np.float32)


def acrobot_expert(reading: np.ndarray) -> int:
    """Full torque of the elbow against the shoulder's swing and along the elbow's own."""
    return 2 if 0.5 * reading[5] - reading[4] > 0 else 0


EXPERTS: dict[str, Policy] = {
    "CartPole-v1": cartpole_expert,
    "Pendulum-v1": pendulum_expert,
    "MountainCarContinuous-v0": mountain_car_expert,
    "Acrobot-v1": acrobot_expert,
}


def make(name: str) -> Any:
    """The gymnasium environment. Raises ModuleNotFoundError with the command that installs it."""
    try:
        import gymnasium
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("the control tasks need gymnasium: pip install 'weft[control]'") from error
    return gymnasium.make(name)


def random_policy(name: str, seed: int) -> Policy:
    """Uniform actions, the zero of the normalised return."""
    plant, draw = PLANTS[name], np.random.default_rng([seed, 11])
    choices = plant.choices
    if choices is not None:
        return lambda _: int(draw.integers(choices))
    return lambda _: draw.uniform(plant.low, plant.high, 1).astype(np.float32)


def episode_returns(name: str, policy: Policy, episodes: int, first_seed: int = 100_000) -> np.ndarray:
    """Undiscounted return of each episode [episodes]; episode k starts from seed first_seed + k."""
    environment, found = make(name), []
    for k in range(episodes):
        reading, _ = environment.reset(seed=first_seed + k)
        total, over = 0.0, False
        while not over:
            reading, reward, done, cut, _ = environment.step(policy(reading))
            total, over = total + float(reward), done or cut
        found.append(total)
    return np.array(found)


def measure(name: str, episodes: int = 100, first_seed: int = 100_000) -> dict[str, float]:
    """Mean return of the random policy and of the expert: the 0 and the 100 of the normalised return.

    Measure on the seeds on which the policy in question ran: the start of an episode moves its return more than the policy.
    """
    return {
        "random": float(episode_returns(name, random_policy(name, 0), episodes, first_seed).mean()),
        "expert": float(episode_returns(name, EXPERTS[name], episodes, first_seed).mean()),
    }


def normalised(value: float, scale: dict[str, float]) -> float:
    """Return on the scale where random is 0 and the expert 100."""
    return 100 * (value - scale["random"]) / (scale["expert"] - scale["random"])


@dataclass(frozen=True)
class Episode:
    """One disturbed demonstration: readings [n C], the expert's labels [n D], and where another action was executed [n]."""

    readings: np.ndarray
    labels: np.ndarray
    disturbed: np.ndarray
    reward: float


def demonstrate(environment: Any, plant: Plant, seed: int, *, disturb: bool = True) -> Episode:
    """Run the expert for at most `plant.episode` steps; bursts of one random action throw it off course."""
    draw = np.random.default_rng([seed, 12])
    expert, wild = EXPERTS[plant.name], random_policy(plant.name, seed)
    reading, _ = environment.reset(seed=seed)
    readings, labels, disturbed, reward, left, held = [], [], [], 0.0, 0, wild(reading)
    for _ in range(plant.episode):
        if disturb and left == 0 and draw.random() < 1.0 / plant.burst:
            left, held = int(draw.integers(1, plant.burst + 1)), wild(reading)
        label = expert(reading)
        action = held if left else label
        readings.append(np.asarray(reading, np.float32))
        labels.append(np.atleast_1d(label))
        disturbed.append(bool(np.any(np.atleast_1d(action) != np.atleast_1d(label))))
        left = max(left - 1, 0)
        reading, gain, done, cut, _ = environment.step(action)
        reward += float(gain)
        if done or cut:
            break
    return Episode(np.stack(readings), np.stack(labels), np.array(disturbed), reward)


def fragments(name: str, count: int, seed: int, lengths: dict[int, float]) -> list[tuple[np.ndarray, np.ndarray]]:
    """`count` windows (readings [n C], labels [n D]) of disturbed episodes, n drawn by the weights in `lengths`.

    Only the last step of a window may have been disturbed, so every action that a later step can see is the expert's own.
    """
    plant, environment = PLANTS[name], make(name)
    draw = np.random.default_rng([seed, 13])
    sizes = draw.choice(list(lengths), size=count, p=np.array(list(lengths.values())) / sum(lengths.values()))
    found: list[tuple[np.ndarray, np.ndarray]] = []
    episode = 0
    while len(found) < count:
        # One episode in four is undisturbed: the states that a good clone will mostly visit.
        run = demonstrate(environment, plant, seed + episode, disturb=episode % 4 != 0)
        episode += 1
        for first in np.sort(draw.permutation(len(run.readings))[: max(1, len(run.readings) // 2)]):
            n = int(sizes[min(len(found), count - 1)])
            if len(found) < count and first + n <= len(run.readings) and not run.disturbed[first : first + n - 1].any():
                found.append((run.readings[first : first + n], run.labels[first : first + n]))
    return found
