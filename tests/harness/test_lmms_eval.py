"""lmms-eval's figures equal our own runner's on the same pictures. Runs in lmms-eval's environment: `make lmms-eval`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from weft.benchmarks.harness.runner import EvalConfig, evaluate
from weft.benchmarks.harness.task import load_tasks
from weft.inference.generalist import Generalist

pytest.importorskip("lmms_eval", reason="lmms-eval has an environment of its own: make lmms-eval")
pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.timeout(1500)]
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Path:
    root = tmp_path_factory.mktemp("lmms")
    docs = [json.loads(line) for line in (data / "look.test.jsonl").read_text().splitlines()]
    rows = [
        {"path": str(data / d["segments"][0]["image"]), "question": "dark or light?", "answer": d["metadata"]["label"]}
        for d in docs
    ]
    (root / "docs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (root / "utils.py").write_text("from PIL import Image\n\ndef visual(doc):\n    return [Image.open(doc['path'])]\n")
    base = (
        f"dataset_path: json\ndataset_kwargs: {{data_files: {{test: {root}/docs.jsonl}}}}\ntest_split: test\n"
        "doc_to_visual: !function utils.visual\ndoc_to_text: question\n"
    )
    (root / "pick.yaml").write_text(
        f"task: weft_pick\n{base}output_type: multiple_choice\ndoc_to_choice: [dark, light]\ndoc_to_target: answer\n"
        "metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]\n"
    )
    (root / "write.yaml").write_text(
        f"task: weft_write\n{base}output_type: generate_until\ndoc_to_target: question\n"
        "generation_kwargs: {until: ['zzz'], max_new_tokens: 5, do_sample: false}\n"
        "metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]\n"
    )
    (root / "ours.yaml").write_text(
        "tasks:\n- {name: pick, data: {manifest: look.test.jsonl}, answer: choices,\n"
        "   choices: [dark, light], metrics: [accuracy]}\n"
        "- {name: write, data: {manifest: look.test.jsonl}, answer: text,\n"
        "   produce: {max_tokens: 5, stop: zzz}, metrics: [accuracy]}\n"
    )
    return root


def test_figures_equal_our_own_runner(tiny: Generalist, folder: Path, local: Path, data: Path, tmp_path: Path) -> None:
    from lmms_eval.evaluator import simple_evaluate
    from lmms_eval.tasks import TaskManager

    theirs: Any = simple_evaluate(
        model="weft",  # found by the entry point
        model_args=f"pretrained={folder},device=cpu",
        tasks=["weft_pick", "weft_write"],
        task_manager=TaskManager(include_path=str(local), include_defaults=False),
        bootstrap_iters=0,
        log_samples=True,
        batch_size=2,
    )
    ours = evaluate(tiny, [(t, data) for t in load_tasks(local / "ours.yaml")], tmp_path, EvalConfig(rounds=10))["tasks"]
    assert theirs["results"]["weft_pick"]["acc,none"] == pytest.approx(ours["pick"]["metrics"]["accuracy"]["value"], abs=1e-6)
    records = {
        task: {r["key"]: r for r in map(json.loads, next((tmp_path / task).glob("whole-*.jsonl")).read_text().splitlines())}
        for task in ("pick", "write")
    }
    for sample in theirs["samples"]["weft_pick"]:
        got = [-float(r[0][0]) for r in sample["resps"]]
        assert got == pytest.approx(records["pick"][f"look/test/{sample['doc_id']}"]["logprobs"], abs=1e-5)
    for sample in theirs["samples"]["weft_write"]:
        assert sample["resps"][0][0] == records["write"][f"look/test/{sample['doc_id']}"]["answer"]


@pytest.mark.parametrize("where", ["the repository root", "elsewhere"])
def test_the_command_line_finds_the_model(
    where: str, tiny: Generalist, folder: Path, local: Path, data: Path, tmp_path: Path
) -> None:
    args = ["--model", "weft", "--model_args", f"pretrained={folder}", "--tasks", "weft_pick", "--include_path", str(local)]
    args += ["--batch_size", "2", "--device", "cpu", "--output_path", str(tmp_path / "theirs")]
    run = subprocess.run(
        [sys.executable, "-m", "lmms_eval", *args],
        cwd=ROOT if where == "the repository root" else tmp_path,
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    (file,) = (tmp_path / "theirs").rglob("*_results.json")
    pick = next(t for t in load_tasks(local / "ours.yaml") if t.name == "pick")
    ours = evaluate(tiny, [(pick, data)], tmp_path / "ours", EvalConfig(rounds=10))["tasks"]["pick"]
    theirs = json.loads(file.read_text())["results"]["weft_pick"]["acc,none"]
    assert theirs == pytest.approx(ours["metrics"]["accuracy"]["value"], abs=1e-6)
