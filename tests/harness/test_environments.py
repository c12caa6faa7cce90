"""Environments from numbers and from pixels, removed and spoilt observations, demonstrations; MiniGrid, MuJoCo, Atari."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from weft.benchmarks.harness.corrupt import Corruption
from weft.benchmarks.harness.environments import Shown, observer, removals, spoilt, spread_of
from weft.benchmarks.harness.questions import Variant
from weft.benchmarks.harness.runner import EvalConfig, evaluate
from weft.benchmarks.harness.task import Control, Data, Task, find_tasks, load_tasks
from weft.inference.generalist import Generalist
from weft.inference.rollout import Episode, Rollout

HEAD = "answer: control\nmetrics: [return, length]\n"


def run(model: Any, text: str, root: Path, out: Path, more: str = "", **config: Any) -> dict[str, Any]:
    (out / "task.yaml").write_text(text + HEAD + more)
    (task,) = load_tasks(out / "task.yaml")
    found: dict[str, Any] = evaluate(model, [(task, root)], out / "out", EvalConfig(rounds=10, **config))["tasks"][task.name]
    assert found["failed"] == 0, found["failures"]
    return found


class Echo:
    """A policy that writes down what it is shown, and stands still."""

    digest = "echo"

    def __init__(self) -> None:
        self.shown: list[list[Any]] = []

    def rollout(self, env: Any, spec: Any, episodes: int, *, seed: int, max_steps: int, **_: Any) -> Rollout:
        played = []
        for number in range(seed, seed + episodes):
            world, episode = env(), Episode(number)
            segment, _ = world.reset(seed=number)
            self.shown.append([segment])
            while not episode.ended and len(episode) < max_steps:
                segment, reward, terminated, truncated, _ = world.step(0)
                self.shown[-1].append(segment)
                episode.rewards.append(reward)
                episode.actions.append(np.asarray(0))
                episode.ended = terminated or truncated
            world.close()
            played.append(episode)
        return Rollout(tuple(played))

    def values(self) -> np.ndarray:
        """[episodes steps C], of the steps that all episodes have."""
        steps = min(len(shown) for shown in self.shown)
        return np.array([[np.asarray(s.values)[0] for s in shown[:steps]] for shown in self.shown])


def test_a_mission_is_said_before_each_episode(tiny: Generalist, data: Path, tmp_path: Path, monkeypatch: Any) -> None:
    pytest.importorskip("minigrid")
    said: list[Any] = []
    rollout = tiny.rollout
    monkeypatch.setattr(tiny, "rollout", lambda env, spec, n, **o: said.append(spec.instruction) or rollout(env, spec, n, **o))
    text = """name: babyai
data: {environment: "minigrid:BabyAI-GoToRedBall-v0"}
control: {kind: cart, rate_hz: 1, instruction: "{mission}", observe: "pixels:image", episodes: 2, max_steps: 2}
"""
    look = observer(Control("babyai", 1.0, observe="key:direction+image"))
    assert np.shape(look({"direction": 2, "image": np.ones((7, 7, 3))}).values) == (1, 148)  # type: ignore[union-attr]
    found = run(tiny, text, data, tmp_path, "slices: [mission]\n")
    assert said == ["go to a red ball"] * 2 and found["samples"] == 2
    assert found["slices"]["mission"]["sizes"] == {"go to a red ball": 2}


def test_a_mujoco_arm_acts_in_two_dimensions(tiny: Generalist, data: Path, tmp_path: Path) -> None:
    pytest.importorskip("mujoco", exc_type=ImportError)
    text = "name: cheetah\ndata: {environment: Reacher-v5}\ncontrol: {kind: arm, rate_hz: 50, episodes: 2, max_steps: 2}\n"
    assert run(tiny, text, data, tmp_path)["metrics"]["length"]["value"] == 2.0


def test_a_metaworld_episode_is_its_seed(tiny: Generalist, data: Path, tmp_path: Path) -> None:
    pytest.importorskip("metaworld", reason="metaworld pins mujoco 3.3.0; docs/benchmarks.md says how to put it in front")
    ((task, _),) = find_tasks("published/metaworld-reach")
    assert task.control is not None
    short = replace(task, control=replace(task.control, episodes=2, max_steps=2, scale=None, random=0.0, expert=1.0))
    seen = []
    for name in "ab":
        found = evaluate(tiny, [(short, data)], tmp_path / name, EvalConfig(rounds=10))["tasks"][task.name]
        assert found["failed"] == 0, found["failures"]
        seen.append(found["metrics"])
    goals = [np.asarray(Shown(task, Variant(), 0, None, {}).reset(seed=i)[0].values)[0, -3:] for i in (1, 1, 2)]  # type: ignore[union-attr]
    assert seen[0] == seen[1] and np.array_equal(goals[0], goals[1]) and not np.array_equal(goals[1], goals[2])


def test_frames_are_seen(tiny: Generalist, data: Path, tmp_path: Path) -> None:
    import gymnasium
    from gymnasium.wrappers import TransformObservation

    def small(**options: Any) -> Any:
        env = gymnasium.make("CartPole-v1", **options)
        frame = env.unwrapped.render

        env.unwrapped.render = lambda: np.ascontiguousarray(frame()[::50, ::50])
        return TransformObservation(env, lambda seen: seen, env.observation_space)

    gymnasium.register("SmallCart-v0", entry_point=small)
    text = "name: seen\ndata: {environment: SmallCart-v0}\ncontrol: {kind: cart, rate_hz: 50, "
    text += "observe: pixels, episodes: 2, max_steps: 2}\n"
    assert run(tiny, text, data, tmp_path)["metrics"]["length"]["value"] == 2.0


@pytest.mark.parametrize("pick", ["random", "similar"])
def test_demonstrations_precede_episodes(pick: str, tiny: Generalist, data: Path, tmp_path: Path, monkeypatch: Any) -> None:
    rng = np.random.default_rng(0)
    lines = []
    for i in range(4):
        pieces: list[dict[str, Any]] = []
        for k in range(2):
            clock = {"rate_hz": 50, "start_s": k * 0.02}
            pieces.append({"sensor": [rng.normal(size=4).round(3).tolist()], "kind": "cart", "role": "observed", **clock})
            pieces.append({"action": [k], "space": {"n": 2}, "role": "target", **clock})
        lines.append(json.dumps({"id": f"demo/{i}", "segments": pieces}))
    (tmp_path / "demos.jsonl").write_text("\n".join(lines))
    shown: list[Any] = []
    rollout = tiny.rollout

    def watched(env: Any, spec: Any, n: int, *, demonstrations: Any, **options: Any) -> Any:
        shown.append([np.asarray(d[0].values).tolist() for d in demonstrations])
        return rollout(env, spec, n, demonstrations=demonstrations, **options)

    monkeypatch.setattr(tiny, "rollout", watched)
    text = f"""name: shown
data: {{environment: CartPole-v1, train: demos.jsonl}}
shots: 2
pick: {pick}
control: {{kind: cart, rate_hz: 50, episodes: 3, max_steps: 2}}
"""
    run(tiny, text, tmp_path, tmp_path)
    assert all(len(demos) == 2 and demos[0] != demos[1] for demos in shown) and len(shown) == (3 if pick == "similar" else 1)


CART = "name: cart\ndata: {environment: CartPole-v1}\ncontrol: {kind: cart, rate_hz: 20, episodes: 3, max_steps: 5}\n"


def cart(**more: Any) -> Task:
    return Task("cart", Data(environment="CartPole-v1"), "control", ("return",), control=Control("cart", 20.0), **more)


def shown(variant: Variant, steps: int = 8) -> np.ndarray:
    env = Shown(cart(), variant, 0, spread_of(cart()), {})
    seen = [env.reset(seed=3)[0], *(env.step(0)[0] for _ in range(steps))]
    env.close()
    return np.array([np.asarray(s.values)[0] for s in seen])  # type: ignore[union-attr]


def test_spoilt_observations_are_what_their_names_say() -> None:
    whole = shown(Variant())
    assert np.isnan(shown(Variant(drop=("sensor",)))).all()
    late = shown(Variant(corruption=Corruption("skew", 0.1)))
    assert np.array_equal(late[2:], whole[:-2]) and np.array_equal(late[:2], whole[[0, 0]])  # two steps of 50 ms
    little, much = (shown(Variant(corruption=Corruption("noise", level))) for level in (0.1, 0.3))
    assert np.allclose((much - whole) / 3, little - whole)  # the same draws, so that levels can be compared
    assert np.allclose(np.std((much - whole) / 0.3 / spread_of(cart())), 1, atol=0.35)
    lost = np.isnan(shown(Variant(corruption=Corruption("dropout", 0.3))))
    assert (lost.all(axis=1) == lost.any(axis=1)).all() and 0 < lost[:, 0].sum() < len(lost)
    assert np.array_equal(much, shown(Variant(corruption=Corruption("noise", 0.3))))


def test_what_can_be_removed_from_an_episode() -> None:
    names = [v.name for v in removals(cart())]
    assert names == ["without sensor"]
    said = Task(
        "x",
        Data(environment="X", train="t"),
        "control",
        ("return",),
        control=Control("x", 1.0, instruction="go", observe="frame"),
        shots=1,
    )
    assert [v.name for v in removals(said)] == [
        f"without {m}"
        for m in ("demonstrations", "image", "text", "demonstrations and image", "demonstrations and text", "image and text")
    ]
    assert [v.name for v in spoilt(said)] == ["blur 0.1", "blur 0.3", "noise 0.1", "noise 0.3"]  # 0.3 s is no step at 1 Hz


def test_control_has_both_tables_and_a_chance_row(tiny: Generalist, data: Path, tmp_path: Path) -> None:
    found = run(tiny, CART, data, tmp_path, "baselines: [chance]\n", missing=True, corrupt=True, batch=2)
    assert set(found["missing"]) == {"without sensor"}
    assert set(found["corrupt"]) == {f"{kind} {level}" for kind in ("noise", "dropout", "skew") for level in (0.1, 0.3)}
    assert all(row["failed"] == 0 and row["samples"] == 3 for row in [*found["missing"].values(), *found["corrupt"].values()])
    assert found["baselines"]["chance"]["metrics"]["length"]["value"] == 5.0


def test_each_variant_is_played_with_its_own_observations(data: Path, tmp_path: Path) -> None:
    policy = Echo()
    run(policy, CART, data, tmp_path, corrupt=True, missing=True)
    seen = policy.values().reshape(8, 3, -1, 4)  # whole, without, six spoilt ones; three episodes each
    assert np.isnan(seen[1]).all() and not np.isnan(seen[0]).any()
    assert len({seen[i].tobytes() for i in range(8)}) == 8


def test_an_environment_that_cannot_be_probed_fails_its_noisy_episodes_alone(data: Path, tmp_path: Path) -> None:
    import gymnasium
    from gymnasium.envs.classic_control import CartPoleEnv

    class Shy(CartPoleEnv):  # type: ignore[misc]
        def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
            if seed and seed > 1_000_000:
                raise RuntimeError("not now")
            return super().reset(seed=seed, options=options)

    gymnasium.register("Shy-v0", entry_point=Shy)
    found = run(Echo(), CART.replace("CartPole-v1", "Shy-v0"), data, tmp_path, corrupt=True)
    assert {name: row["failed"] for name, row in found["corrupt"].items() if row["failed"]} == {"noise 0.1": 3, "noise 0.3": 3}


def test_a_game_is_seen_as_small_frames(tiny: Generalist, data: Path, tmp_path: Path) -> None:
    pytest.importorskip("ale_py")
    text = """name: breakout
data: {environment: "ale_py:ALE/Breakout-v5", make: {frameskip: 4}}
control: {kind: atari, rate_hz: 15, observe: frame, frame: [12, 16], episodes: 2, max_steps: 3}
"""
    found = run(tiny, text, data, tmp_path)
    assert found["metrics"]["length"]["value"] == 3.0 and found["strips"].keys() == {"worst", "best"}


@pytest.mark.parametrize(
    ("name", "needs"),
    [
        ("atari-breakout", "ale_py"),
        ("atari-pong", "ale_py"),
        ("babyai-go-to-red-ball", "minigrid"),
        ("mujoco-halfcheetah", "mujoco"),
        ("mujoco-hopper", "mujoco"),
        ("metaworld-reach", "metaworld"),
    ],
)
def test_published_environments_open_as_their_tasks_say(name: str, needs: str) -> None:
    pytest.importorskip(needs, exc_type=ImportError)
    ((task, _),) = find_tasks(f"published/{name}")
    env = Shown(task, Variant(), 0, None, {})
    try:
        first, _ = env.reset(seed=1)
        env.action_space.seed(0)
        after = env.step(env.action_space.sample())[0]
    finally:
        env.close()
    assert type(first) is type(after) and np.size(getattr(first, "values", getattr(first, "pixels", None))) > 2
