"""A transformers model and a scikit-learn specialist stand in one table with weft; the page holds all of it."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from weft.benchmarks.harness.page import compare
from weft.benchmarks.harness.rivals import TransformersModel, open_model
from weft.benchmarks.harness.runner import EvalConfig, evaluate
from weft.benchmarks.harness.table import show
from weft.benchmarks.harness.task import TaskError, load_tasks
from weft.inference.generalist import Generalist
from weft.tokenizers.segment import Text

TASKS = """
tasks:
  - {name: name, data: {manifest: look.test.jsonl, train: look.train.jsonl}, prompt: [{observed: text}], answer: choices,
     choices: [dark, light], metrics: [accuracy, calibration_error]}
  - {name: write, data: {manifest: look.test.jsonl, train: look.train.jsonl}, answer: text,
     produce: {max_tokens: 3}, metrics: [exact_match]}
  - {name: prose, data: {manifest: prose.test.jsonl}, answer: bits, metrics: [bits_per_byte]}
  - {name: draw, data: {manifest: draw.test.jsonl}, answer: image, produce: {grid: [2, 2]}, metrics: [psnr]}
  - {name: wave, data: {manifest: wave.test.jsonl}, answer: forecast,
     forecast: {readings: 2, kind: wave, samples: 4}, metrics: [mase]}
"""


@pytest.fixture(scope="module")
def causal(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A causal language model of a few thousand weights with a byte-level tokenizer of its own."""
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    folder = tmp_path_factory.mktemp("causal")
    bpe = tokenizers.ByteLevelBPETokenizer()
    bpe.train_from_iterator(["dark or light? a seven and a nine make sixteen"] * 3, vocab_size=300, special_tokens=["<s>"])
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, bos_token="<s>", eos_token="<s>")
    fast.save_pretrained(folder)
    config = transformers.GPT2Config(
        vocab_size=300, n_embd=24, n_layer=2, n_head=3, n_positions=128, bos_token_id=0, eos_token_id=0
    )
    transformers.GPT2LMHeadModel(config).save_pretrained(folder)
    return folder


def test_one_table_and_one_page_for_all(tiny: Generalist, causal: Path, data: Path, tmp_path: Path) -> None:
    file = tmp_path / "t.yaml"
    file.write_text(TASKS)
    tasks = [(task, data) for task in load_tasks(file)]
    labels = dict([("weft", tiny), open_model(f"hf:{causal}", "cpu"), open_model("sklearn:svm")])
    results = {name: evaluate(m, tasks, tmp_path / name, EvalConfig(rounds=10), name=name) for name, m in labels.items()}
    _, rival, specialist = results
    for task, about in results[rival]["tasks"].items():
        if task in ("draw", "wave"):
            assert "answers in words" in about["not_applicable"]
        elif task == "write":  # it has no eyes
            assert about["failed"] == 5 and "the prompt holds image" in next(iter(about["failures"]))
        else:
            assert about["failed"] == 0 and about["metrics"]
    assert results[specialist]["tasks"]["write"]["metrics"]["exact_match"]["value"] == 1.0
    console = Console(width=200, record=True, file=io.StringIO())
    show(console, results)
    said = console.export_text()
    assert rival in said and "exact_match" in said and "not for it" in said
    page = compare({name: tmp_path / name for name in results}, tmp_path / "compare.html").read_text()
    assert "peak memory" in said and "peak memory" in page
    assert re.search("<img [^>]*><figcaption>made<", page) and re.search("<img [^>]*><figcaption>true<", page)
    assert page.index("<h2 id='name") < page.index("<h2 id='write") < page.index("<h2 id='draw")  # the order of the task file
    assert "data:image/png" in page and "<svg" in page and all(name in page for name in results)
    assert not re.search(r"(src|href)=['\"]?(https?:)?//", page)


def test_choices_of_a_rival_are_its_own_likelihoods(causal: Path) -> None:
    import torch

    rival = TransformersModel(str(causal), "cpu")
    (found,) = rival.predict([[Text("dark or light?")]], choices=["dark", "a nine"])
    for words, value in zip(found.choices, found.logprobs):
        before = rival.tokenizer("dark or light?")["input_ids"]
        after = rival.tokenizer("\n" + words)["input_ids"]
        with torch.inference_mode():
            table = torch.log_softmax(rival.model(torch.tensor([before + after])).logits[0], -1)
        assert value == pytest.approx(sum(float(table[len(before) - 1 + i, t]) for i, t in enumerate(after)), abs=1e-4)
    assert np.isclose(found.probabilities.sum(), 1)


def test_unknown_rivals_are_refused() -> None:
    with pytest.raises(TaskError, match="'gpt' is no kind of rival"):
        open_model("gpt:x")
    with pytest.raises(ValueError, match="there are svm and nearest"):
        open_model("sklearn:forest")


def test_the_command_scores_and_compares(folder: Path, data: Path, tmp_path: Path, capsys: Any) -> None:
    from weft.cli import main

    (data / "cli.yaml").write_text(TASKS)
    main(
        [
            "eval",
            f"{folder},sklearn:nearest",
            "--tasks",
            str(data / "cli.yaml"),
            "--out",
            str(tmp_path),
            "--limit",
            "3",
            "--device",
            "cpu",
            "--json",
            str(tmp_path / "quoted.json"),
        ]
    )
    quoted = json.loads((tmp_path / "quoted.json").read_text())
    assert len(quoted["models"]) == 2 and quoted["machine"]["cpu"] and quoted["command"].startswith("weft")
    assert all(model["tasks"]["write"]["metrics"]["exact_match"]["value"] is not None for model in quoted["models"].values())
    said = capsys.readouterr().out
    found = [json.loads(p.read_text()) for p in sorted(tmp_path.glob("*/results.json"))]
    assert len(found) == 2 and (tmp_path / "compare.html").is_file() and "exact_match" in said
    assert all(f["tasks"]["write"]["samples"] == 3 for f in found)
