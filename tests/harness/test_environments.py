"""MiniGrid and MuJoCo environments, where installed, from numbers and from pixels; demonstrations as prompts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from weft.benchmarks.harness.runner import EvalConfig, evaluate
from weft.benchmarks.harness.task import load_tasks
from weft.inference.generalist import Generalist

HEAD = "answer: control\nmetrics: [return, length]\n"


def run(model: Generalist, text: str, root: Path, out: Path) -> dict[str, Any]:
    (out / "task.yaml").write_text(text + HEAD)
    (task,) = load_tasks(out / "task.yaml")
    found: dict[str, Any] = evaluate(model, [(task, root)], out / "out", EvalConfig(rounds=10))["tasks"][task.name]
    assert found["failed"] == 0, found["failures"]
    return found


def test_a_mission_is_said_before_each_episode(tiny: Generalist, data: Path, tmp_path: Path, monkeypatch: Any) -> None:
    pytest.importorskip("minigrid")
    said: list[Any] = []
    rollout = tiny.rollout
    monkeypatch.setattr(tiny, "rollout", lambda env, spec, n, **o: said.append(spec.instruction) or rollout(env, spec, n, **o))
    text = """name: babyai
data: {environment: "minigrid:BabyAI-GoToRedBall-v0"}
control: {kind: cart, rate_hz: 1, instruction: "{mission}", observe: "pixels:image", episodes: 2, max_steps: 2}
"""
    from weft.benchmarks.harness.control import observer

    look = observer("key:direction+image")
    assert look is not None and look({"direction": 2, "image": np.ones((7, 7, 3))}).shape == (148,)
    found = run(tiny, text, data, tmp_path)
    assert said == ["go to a red ball"] * 2 and found["samples"] == 2


def test_a_mujoco_arm_acts_in_two_dimensions(tiny: Generalist, data: Path, tmp_path: Path) -> None:
    pytest.importorskip("mujoco", exc_type=ImportError)
    text = "name: cheetah\ndata: {environment: Reacher-v5}\ncontrol: {kind: arm, rate_hz: 50, episodes: 2, max_steps: 2}\n"
    assert run(tiny, text, data, tmp_path)["metrics"]["length"]["value"] == 2.0


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
