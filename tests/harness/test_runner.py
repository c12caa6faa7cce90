"""The laws of the runner: nothing but content decides a score, nothing is skipped, nothing is asked twice."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from weft.benchmarks.harness.runner import EvalConfig, evaluate
from weft.benchmarks.harness.task import load_tasks
from weft.inference.generalist import Generalist

TASKS = """
tasks:
  - name: look
    data: {manifest: look.test.jsonl, train: look.train.jsonl}
    answer: choices
    choices: [dark, light]
    metrics: [accuracy, calibration_error, macro_f1, accuracy_normalized]
    baselines: [chance, majority, specialist]
    slices: [speaker]
  - name: both, in words
    data: {manifest: both.test.jsonl, train: both.train.jsonl}
    answer: text
    shots: 1
    produce: {max_tokens: 3}
    metrics: [wer, cer, accuracy, f1, bleu, corpus_bleu, chrf, rouge_l, consensus, exact_match]
  - name: few-shot with a map
    data: {manifest: look.test.jsonl, train: look.train.jsonl}
    answer: choices
    shots: 2
    pick: similar
    prompt: [{observed: image}, {text: "speaker {speaker}?"}]
    reference: {metadata: label, map: {0: one, 1: two}}
    choices: [one, two]
    metrics: [accuracy]
  - name: draw
    data: {manifest: draw.test.jsonl}
    answer: image
    reference: {metadata: label, map: {0: dark, 1: light}}
    produce: {grid: [2, 2]}
    judge: look.train.jsonl
    consistency: {question: "dark or light?", choices: [dark, light]}
    metrics: [judged, consistency]
  - name: draw as it was
    data: {manifest: draw.test.jsonl}
    answer: image
    produce: {grid: [2, 2]}
    metrics: [psnr, ssim, frechet]
  - name: say
    data: {manifest: say.test.jsonl}
    answer: audio
    produce: {max_tokens: 6}
    metrics: [mel_error]
  - name: wave
    data: {manifest: wave.test.jsonl}
    answer: forecast
    forecast: {readings: 2, kind: wave, samples: 4}
    metrics: [over_persistence, mase, crps, coverage_90]
    baselines: [persistence]
  - name: prose
    data: {manifest: prose.test.jsonl}
    answer: bits
    metrics: [bits_per_byte, perplexity, "perplexity:text"]
  - name: find
    data: {manifest: look.test.jsonl, gallery: name.test.jsonl}
    prompt: [{observed: all}]
    answer: retrieval
    metrics: [recall@1, recall@5, rank]
    baselines: [chance]
  - name: cart
    data: {environment: CartPole-v1}
    answer: control
    control: {kind: cart, rate_hz: 50, episodes: 3, max_steps: 6, random: 1, expert: 7}
    metrics: [normalised_return, return, length]
"""


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory, data: Path) -> list[tuple[Any, Path]]:
    file = tmp_path_factory.mktemp("tasks") / "all.yaml"
    file.write_text(TASKS)
    return [(task, data) for task in load_tasks(file)]


def timeless(results: dict[str, Any]) -> str:
    """Results as JSON, times aside."""
    tasks = {name: {k: v for k, v in found.items() if k != "times"} for name, found in results["tasks"].items()}
    return json.dumps({**results, "tasks": tasks}, sort_keys=True)


def named(tasks: list[tuple[Any, Path]], *names: str) -> list[tuple[Any, Path]]:
    return [(task, root) for task, root in tasks if task.name in names]


def test_every_kind_of_task_gives_figures_with_intervals(tiny: Generalist, tasks: Any, tmp_path: Path) -> None:
    results = evaluate(tiny, tasks, tmp_path, EvalConfig(batch=4, rounds=50))
    for task, _ in tasks:
        found = results["tasks"][task.name]
        assert found["failed"] == 0, (task.name, found["failures"])
        for metric in task.metrics:
            figure = found["metrics"][metric]
            if metric == "frechet":
                assert figure["value"] >= 0 and "grey pixels" in figure["features"]
                continue
            assert figure["left_out"] == 0 and figure["low"] - 1e-9 <= figure["value"] <= figure["high"] + 1e-9, (
                task.name,
                metric,
            )
    look = results["tasks"]["look"]
    assert look["baselines"]["chance"]["metrics"]["accuracy"]["value"] == 0.5
    assert look["baselines"]["specialist"]["metrics"]["accuracy"]["value"] == 1.0
    assert look["baselines"]["majority"]["answer"] == "dark"
    assert (
        look["slices"]["speaker"]["sizes"] == {"s0": 2, "s1": 2, "s2": 1}
        and "fewer than two" in look["slices"]["speaker"]["note"]
    )
    assert results["tasks"]["wave"]["baselines"]["persistence"]["metrics"]["over_persistence"]["value"] == pytest.approx(1)
    assert json.loads((tmp_path / "results.json").read_text())["weights"] == tiny.digest


def test_order_batch_and_workers_change_nothing(tiny: Generalist, tasks: Any, data: Path, tmp_path: Path) -> None:
    some = named(tasks, "look", "both, in words", "find", "prose")
    want = timeless(evaluate(tiny, some, tmp_path / "a", EvalConfig(batch=5, rounds=20)))
    assert timeless(evaluate(tiny, some, tmp_path / "b", EvalConfig(batch=2, workers=3, rounds=20))) == want
    for path in data.glob("*.jsonl"):
        path.with_suffix(".old").write_text(path.read_text())
    try:
        for path in data.glob("*.jsonl"):
            path.write_text("".join(reversed(path.read_text().splitlines(keepends=True))))
        assert timeless(evaluate(tiny, some, tmp_path / "c", EvalConfig(batch=3, rounds=20))) == want
    finally:
        for path in data.glob("*.old"):
            path.replace(path.with_suffix(".jsonl"))


def test_a_killed_run_asks_only_what_is_missing(tiny: Generalist, tasks: Any, tmp_path: Path, monkeypatch: Any) -> None:
    some = named(tasks, "look", "cart")
    want = timeless(evaluate(tiny, some, tmp_path, EvalConfig(rounds=20)))
    for file in tmp_path.rglob("*.jsonl"):
        lines = file.read_text().splitlines(keepends=True)
        file.write_text("".join(lines[:2]) + lines[2][:17])
    asked: list[int] = []
    predict, rollout = tiny.predict, tiny.rollout
    monkeypatch.setattr(tiny, "predict", lambda prompts, **o: asked.append(len(prompts)) or predict(prompts, **o))
    monkeypatch.setattr(tiny, "rollout", lambda env, spec, n, **o: asked.append(n) or rollout(env, spec, n, **o))
    assert timeless(evaluate(tiny, some, tmp_path, EvalConfig(rounds=20))) == want
    assert asked == [3, 1]
    assert timeless(evaluate(tiny, some, tmp_path, EvalConfig(rounds=20))) == want and asked == [3, 1]


def test_what_cannot_be_decoded_counts_as_wrong(tiny: Generalist, tasks: Any, data: Path, tmp_path: Path) -> None:
    (look,) = named(tasks, "look")
    lines = (data / "look.test.jsonl").read_text().splitlines()
    broken = json.loads(lines[0])
    broken["segments"][0]["image"] = "torn.png"
    (data / "torn.png").write_bytes((data / "test-00.png").read_bytes()[:40])
    (data / "bad.test.jsonl").write_text("\n".join([json.dumps(broken), "{not json", *lines[1:]]) + "\n")
    file = tmp_path / "bad.yaml"
    file.write_text(
        "name: bad\ndata: {manifest: bad.test.jsonl}\nanswer: choices\nchoices: [dark, light]\nmetrics: [accuracy]\n"
    )
    whole = evaluate(tiny, [(look[0], data)], tmp_path / "a", EvalConfig(rounds=20))["tasks"]["look"]
    found = evaluate(tiny, [(load_tasks(file)[0], data)], tmp_path / "b", EvalConfig(rounds=20))["tasks"]["bad"]
    assert found["samples"] == 6 and found["failed"] == 2 and len(found["failures"]) == 2
    said = [json.loads(line) for line in next((tmp_path / "a").rglob("whole-*.jsonl")).read_text().splitlines()]
    lost = sum(r["answer"] == r["reference"] for r in said if r["key"] == broken["id"])
    assert found["metrics"]["accuracy"]["value"] * 6 == pytest.approx(
        whole["metrics"]["accuracy"]["value"] * 5 - lost, abs=1e-4
    )


def test_an_environment_that_crashes_fails_its_own_episode(tiny: Generalist, tasks: Any, data: Path, tmp_path: Path) -> None:
    import gymnasium
    from gymnasium.envs.classic_control import CartPoleEnv

    class Crash(CartPoleEnv):  # type: ignore[misc]
        def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
            if seed == 200_001:
                raise RuntimeError("the pole broke")
            return super().reset(seed=seed, options=options)

    gymnasium.register("Crash-v0", entry_point=Crash)
    file = tmp_path / "crash.yaml"
    file.write_text(
        TASKS[TASKS.index("  - name: cart") :]
        .replace("  - name", "name")
        .replace("\n    ", "\n")
        .replace("CartPole-v1", "Crash-v0")
    )
    (crash,), ((cart, _),) = load_tasks(file), named(tasks, "cart")
    whole = evaluate(tiny, [(cart, data)], tmp_path / "a", EvalConfig())["tasks"]["cart"]
    found = evaluate(tiny, [(crash, data)], tmp_path / "b", EvalConfig())["tasks"]["cart"]
    assert found["failures"] == {"RuntimeError: the pole broke": 1} and found["metrics"]["normalised_return"]["n"] == 3
    returns = [
        json.loads(line)["scores"]["return"]
        for line in next((tmp_path / "a").rglob("episodes-*.jsonl")).read_text().splitlines()
    ]
    assert found["metrics"]["return"]["value"] == pytest.approx((returns[0] + 1 + returns[2]) / 3, abs=1e-5)
    assert whole["strips"].keys() == {"worst", "best"}


def test_removed_and_spoilt_inputs_have_tables(tiny: Generalist, tasks: Any, tmp_path: Path) -> None:
    some = named(tasks, "both, in words", "wave")
    results = evaluate(tiny, some, tmp_path, EvalConfig(rounds=20, missing=True, corrupt=True, batch=8))["tasks"]
    both = results["both, in words"]
    assert set(both["missing"]) == {
        f"without {m}" for m in ("audio", "image", "text", "audio and image", "audio and text", "image and text")
    }
    assert set(both["corrupt"]) == {f"{kind} {level}" for kind in ("blur", "noise", "clip") for level in (0.1, 0.3)}
    assert set(results["wave"]["corrupt"]) == {
        f"{kind} {level}" for kind in ("noise", "dropout", "skew") for level in (0.1, 0.3)
    }
    assert "missing" not in results["wave"]  # nothing would be left to ask with
    assert all(row["failed"] == 0 for row in both["missing"].values())
