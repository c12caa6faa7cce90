"""Makes the small datasets beside this file: `python tests/training/minari/make_minari.py` with minari[hdf5,arrow] installed.

`collect` records with minari's DataCollector, which needs jax as well.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).parent
LAYOUTS = ("hdf5", "arrow", "parquet")


def cartpole(count: int) -> list[dict[str, Any]]:
    """Random episodes of CartPole."""
    import gymnasium

    env = gymnasium.make("CartPole-v1")
    draw, found = np.random.default_rng(0), []
    for seed in range(count):
        observation, _ = env.reset(seed=seed)
        seen, done, rewards, ended, cut = [observation], [], [], [], []
        over = False
        while not over:
            action = int(draw.integers(2))
            observation, reward, terminated, truncated, _ = env.step(action)
            seen.append(observation)
            done.append(action)
            rewards.append(float(reward))
            ended.append(terminated)
            cut.append(truncated)
            over = terminated or truncated
        found.append({"observations": seen, "actions": done, "rewards": rewards, "terminations": ended, "truncations": cut})
    return found


def goal(count: int) -> list[dict[str, Any]]:
    """Episodes with joints, a camera and an instruction."""
    draw, found = np.random.default_rng(1), []
    for i in range(count):
        steps = 4 + i
        camera = [np.full((32, 40, 3), 20 * k + 10, np.uint8) for k in range(steps + 1)]
        joints = [draw.normal(size=3).astype(np.float32) for _ in range(steps + 1)]
        seen = {"arm": {"joints": joints}, "camera": camera, "mission": [f"reach goal {i}"] * (steps + 1)}
        flags = [k == steps - 1 for k in range(steps)]
        actions = [draw.uniform(-1, 1, 2).astype(np.float32) for _ in range(steps)]
        none = [False] * steps
        found.append(
            {"observations": seen, "actions": actions, "rewards": [1.0] * steps, "terminations": flags, "truncations": none}
        )
    return found


def write(name: str, layout: str, episodes: list[dict[str, Any]], observation: Any, action: Any, out: Path) -> None:
    """One dataset in one layout, by minari's own writer."""
    import minari
    from minari.data_collector import EpisodeBuffer

    buffers = [EpisodeBuffer(id=i, seed=i, options=None, infos={}, **episode) for i, episode in enumerate(episodes)]
    minari.create_dataset_from_buffers(
        f"{name}/{layout}-v0",
        buffers,
        observation_space=observation,
        action_space=action,
        data_format=layout,
        algorithm_name="random",
        author="weft",
        author_email="none@example.org",
        code_permalink="none",
        description="for tests",
    )
    shutil.rmtree(out, ignore_errors=True)
    shutil.copytree(Path(os.environ["MINARI_DATASETS_PATH"]) / name / f"{layout}-v0", out)


def collect(name: str, layout: str, count: int) -> list[list[int]]:
    """Record with minari's DataCollector; returns the actions of each episode."""
    import gymnasium
    import minari

    env = minari.DataCollector(gymnasium.make("CartPole-v1"), record_infos=False, data_format=layout)
    draw, taken = np.random.default_rng(2), []
    for seed in range(count):
        env.reset(seed=seed)
        taken.append([])
        over = False
        while not over:
            taken[-1].append(int(draw.integers(2)))
            _, _, terminated, truncated, _ = env.step(taken[-1][-1])
            over = terminated or truncated
    env.create_dataset(
        name,
        algorithm_name="random",
        author="weft",
        author_email="none@example.org",
        code_permalink="none",
        description="for tests",
    )
    env.close()
    return taken


def main() -> None:
    """Everything beside this file."""
    import gymnasium
    from gymnasium.spaces import Box, Dict, Text

    cart = gymnasium.make("CartPole-v1")
    arm = Dict({"joints": Box(-10, 10, (3,), np.float32)})
    seen = Dict({"arm": arm, "camera": Box(0, 255, (32, 40, 3), np.uint8), "mission": Text(32)})
    motion = Box(np.array([-1, -2], np.float32), np.array([1, 2], np.float32))
    with tempfile.TemporaryDirectory() as folder:
        os.environ["MINARI_DATASETS_PATH"] = folder
        for layout in LAYOUTS:
            write("cartpole", layout, cartpole(6), cart.observation_space, cart.action_space, HERE / f"cartpole-{layout}")
            write("goal", layout, goal(2), seen, motion, HERE / f"goal-{layout}")
    truth = {f"{key}{i}": np.array(e[key]) for i, e in enumerate(cartpole(6)) for key in ("observations", "actions", "rewards")}
    np.savez(HERE / "cartpole.npz", **truth)
    parts: dict[str, np.ndarray] = {}
    for i, episode in enumerate(goal(2)):
        parts[f"joints{i}"] = np.stack(episode["observations"]["arm"]["joints"])
        parts[f"frames{i}"] = np.array(len(episode["observations"]["camera"]))
        parts[f"actions{i}"] = np.stack(episode["actions"])
    np.savez(HERE / "goal.npz", **parts)


if __name__ == "__main__":
    main()
