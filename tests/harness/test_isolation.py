"""No sample's answer reaches another one: not by a prompt, not by a metric."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from weft.benchmarks.harness.aggregate import sample_scores
from weft.benchmarks.harness.measures import MEASURES
from weft.benchmarks.harness.questions import Variant, question, random_picker, similar_picker
from weft.benchmarks.harness.samples import task_data
from weft.benchmarks.harness.task import Data, Task
from weft.tokenizers.segment import Text

RECORDS = [
    {"key": "a", "answer": "a red cat at 1.2 s", "reference": "the red cat at 1.25 s"},
    {"key": "b", "answer": "two dogs run", "reference": "two dogs in a park"},
    {"key": "c", "answer": "one boat far at sea", "reference": ["one boat at sea", "a ship"]},
    {"key": "d", "failed": "RuntimeError: torn", "reference": "a torn page"},
]
EACH = sorted(n for n, m in MEASURES.items() if m.text and m.pool != "corpus" and "text" in m.answers)


def scores(metric: str, records: list[dict[str, Any]]) -> np.ndarray:
    return sample_scores(Task("t", Data(manifest="x"), "text", (metric,)), metric, records)[0]


@pytest.mark.parametrize("metric", EACH)
def test_what_another_sample_says_changes_no_score(metric: str) -> None:
    before = scores(metric, RECORDS)
    assert np.array_equal(
        scores(metric, [*RECORDS[:1], {**RECORDS[1], "answer": "the boat is a red cat"}, *RECORDS[2:]])[[0, 2, 3]],
        before[[0, 2, 3]],
    )
    assert before[3].tolist() in (0.0, [3.0, 3.0], [11.0, 11.0])  # a failed sample has said nothing


@pytest.mark.parametrize("metric", [m for m in EACH if m != "consensus"])
def test_what_is_right_for_another_sample_changes_no_score(metric: str) -> None:
    changed = [*RECORDS[:1], {**RECORDS[1], "reference": "a red cat"}, *RECORDS[2:]]
    assert np.array_equal(scores(metric, changed)[[0, 2, 3]], scores(metric, RECORDS)[[0, 2, 3]])
    assert np.array_equal(scores(metric, RECORDS[::-1]), scores(metric, RECORDS)[::-1])


@pytest.mark.parametrize("pick", ["random", "similar"])
def test_demonstrations_are_never_the_question_nor_its_test_neighbours(pick: str, tmp_path: Path) -> None:
    def line(split: str, i: int) -> str:
        said = [{"text": f"question {i}", "role": "observed"}, {"text": f"{split} answer {i}", "role": "target"}]
        return json.dumps({"id": f"{i}", "segments": said})

    (tmp_path / "test.jsonl").write_text("\n".join(line("test", i) for i in range(5)))
    both = [line("test", i) for i in range(2)] + [line("train", i) for i in range(5, 9)]
    (tmp_path / "train.jsonl").write_text("\n".join(both))  # two test documents leaked into it
    task = Task("t", Data(manifest="test.jsonl", train="train.jsonl"), "text", ("accuracy",), shots=3)
    data = task_data(task, tmp_path)

    def embed(prompts: list[Any]) -> np.ndarray:
        return np.array([[float(p[0].text.split()[-1]), 1.0] for p in prompts])

    picker = random_picker(task, data.pool, 3, 0) if pick == "random" else similar_picker(task, data.pool, 3, embed)
    for sample in data.samples:
        q = question(task, sample, Variant(), 0, picker(sample))
        said = [s.text for s in q.prompt if isinstance(s, Text)]
        assert q.reference not in said and len([s for s in said if "answer" in s]) == 3
        assert said[-1] == f"question {sample.key}"
        assert picker(sample) == picker(sample)
