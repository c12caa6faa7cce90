"""`weft eval` on a folder of prepared shards: the same figures as on the manifest, and when something happened."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from weft.benchmarks.harness.runner import EvalConfig, evaluate
from weft.benchmarks.harness.task import load_tasks
from weft.cli import main
from weft.inference.generalist import Generalist
from weft.training.data.prepare import prepare

PICK = "answer: choices, choices: [dark, light], shots: 1, metrics: [accuracy], slices: [speaker], baselines: [majority]"
WHEN = 'answer: text, prompt: [{observed: sensor}, {text: "when?"}], reference: {metadata: at_s}, produce: {max_tokens: 4}'


@pytest.fixture(scope="module")
def shards(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """KIND with both splits, as tar shards."""
    root = tmp_path_factory.mktemp("shards")
    for kind in ("look", "wave"):
        lines = []
        for split in ("train", "test"):
            for line in (data / f"{kind}.{split}.jsonl").read_text().splitlines():
                value = json.loads(line)
                value["metadata"]["at_s"] = 0.25
                lines.append(json.dumps({**value, "split": split}))
        (data / f"{kind}.all.jsonl").write_text("\n".join(lines) + "\n")
        prepare(data / f"{kind}.all.jsonl", root / kind)
    return root


def read(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(next(out.glob("*/results.json")).read_text())["tasks"]
    return found


def test_shards_and_manifests_give_the_same_figures(folder: Path, data: Path, shards: Path, tmp_path: Path) -> None:
    (data / "files.yaml").write_text(f"{{name: pick, data: {{manifest: look.test.jsonl, train: look.train.jsonl}}, {PICK}}}")
    (shards / "tars.yaml").write_text(f"{{name: pick, data: {{shards: look, train: look}}, {PICK}}}")
    for name, file in (("a", data / "files.yaml"), ("b", shards / "tars.yaml")):
        main(["eval", str(folder), "--tasks", str(file), "--out", str(tmp_path / name), "--device", "cpu", "--batch", "2"])
    a, b = read(tmp_path / "a")["pick"], read(tmp_path / "b")["pick"]
    assert b["samples"] == 5 and b["failed"] == 0
    assert a["baselines"] == b["baselines"] and a["slices"] == b["slices"]


class Clock:
    """Says a moment."""

    digest = "clock"

    def __init__(self, said: str) -> None:
        self.said = said

    def generate(self, prompts: list[Any], produce: str, **_: Any) -> list[Any]:
        return [type("Reply", (), {"text": self.said})() for _ in prompts]


@pytest.mark.parametrize(
    ("said", "hits"), [("at 0.3 s", [1, 0, 1]), ("0.26", [1, 1, 1]), ("soon", [0, 0, 0]), ("1.2", [0, 0, 1])]
)
def test_when_it_happened_is_scored_within_milliseconds(said: str, hits: list[int], shards: Path, tmp_path: Path) -> None:
    (tmp_path / "when.yaml").write_text(
        f'{{name: when, data: {{shards: wave}}, {WHEN}, metrics: [temporal, "temporal:20", "temporal:1000"]}}'
    )
    (task,) = load_tasks(tmp_path / "when.yaml")
    found = evaluate(Clock(said), [(task, shards)], tmp_path / "out", EvalConfig(rounds=10))["tasks"]["when"]
    assert [found["metrics"][m]["value"] for m in task.metrics] == hits and found["failed"] == 0


def test_a_moment_goes_through_the_command(folder: Path, shards: Path, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "when.yaml").write_text(f'{{name: when, data: {{shards: wave}}, {WHEN}, metrics: ["temporal:250"]}}')
    at = ["--tasks", str(tmp_path / "when.yaml"), "--data", str(shards), "--out", str(tmp_path / "out"), "--device", "cpu"]
    main(["eval", str(folder), *at])
    found = read(tmp_path / "out")["when"]
    assert found["samples"] == 5 and found["failed"] == 0 and 0 <= found["metrics"]["temporal:250"]["value"] <= 1
    assert "temporal:250" in capsys.readouterr().out


def test_demonstrations_of_an_episode_come_from_shards(tiny: Generalist, tmp_path: Path) -> None:
    pieces: list[dict[str, Any]] = []
    for k in range(2):
        clock = {"rate_hz": 50, "start_s": k * 0.02}
        pieces.append({"sensor": [[0.1, 0.2, 0.3, 0.1 * k]], "kind": "cart", "role": "observed", **clock})
        pieces.append({"action": [k], "space": {"n": 2}, "role": "target", **clock})
    (tmp_path / "demo.jsonl").write_text(json.dumps({"id": "demo", "split": "train", "segments": pieces}) + "\n")
    prepare(tmp_path / "demo.jsonl", tmp_path / "demos")
    (tmp_path / "cart.yaml").write_text(
        "name: cart\ndata: {environment: CartPole-v1, train: demos}\nanswer: control\nshots: 1\nmetrics: [return]\n"
        "control: {kind: cart, rate_hz: 50, episodes: 2, max_steps: 2}\n"
    )
    (task,) = load_tasks(tmp_path / "cart.yaml")
    found = evaluate(tiny, [(task, tmp_path)], tmp_path / "out", EvalConfig(rounds=10, missing=True))["tasks"]["cart"]
    assert found["failed"] == 0 and "without demonstrations" in found["missing"]
