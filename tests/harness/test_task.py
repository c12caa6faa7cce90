"""A wrong task file is refused with file, line and repair; a right one says nothing but data."""

from __future__ import annotations

from pathlib import Path

import pytest

from weft.benchmarks.harness.task import TaskError, find_tasks, load_tasks

GOOD = """name: digits
data: {manifest: a.jsonl, train: b.jsonl}
answer: choices
choices: [one, two]
metrics: [accuracy]
shots: 2
"""

WRONG = {
    ("metrics: [accuracy]", "metrics: [acuracy]"): "line 1: there is no metric 'acuracy'",
    ("metrics: [accuracy]", "metrics: [wer]"): "line 1: metric 'wer' does not fit answer 'choices'; use accuracy",
    ("metrics:", "metriks:"): "line 5: task has no key 'metriks'; did you mean 'metrics'?",
    ("answer: choices", "answer: choice"): "line 3: task.answer is 'choice'; it must be one of text, choices",
    ("shots: 2", "shots: two"): "line 6: task.shots must be of type int, got 'two'",
    ("shots: 2", "shots: 2\nname: again"): "line 7: key 'name' is written twice",
    ("choices: [one, two]\n", ""): "line 1: task 'digits' needs choices",
    ("train: b.jsonl", "trane: b.jsonl"): "line 2: task.data has no key 'trane'; did you mean 'train'?",
    (", train: b.jsonl", ""): "line 1: task 'digits' needs data.train",
    ("manifest: a.jsonl", "manifest: a.jsonl, shards: c"): "line 2: data needs exactly one of manifest, shards and environment",
    ("name: digits\n", ""): "line 1: task lacks the key 'name'",
    ("shots: 2", "produce: !!python/object:os.system {}"): "line 6: the tag",
    ("shots: 2", "shots: [2"): "is not YAML",
    (
        "shots: 2",
        "baselines: [persistence]",
    ): "line 1: baseline 'persistence' does not fit answer 'choices'; use chance, majority",
    ("answer: choices\nchoices: [one, two]\nmetrics: [accuracy]", "answer: text\nmetrics: ['temporal:soon']"): (
        "line 1: metric 'temporal:soon' is unknown; write temporal:MILLISECONDS"
    ),
    ("answer: choices\nchoices: [one, two]\nmetrics: [accuracy]", "answer: bits\nmetrics: ['perplexity:smell']"): (
        "line 1: metric 'perplexity:smell' is unknown"
    ),
    ("shots: 2", "shots: 2\nproduce: {max_token: 3}"): "line 1: produce has no option 'max_token' for answer 'choices'",
    ("choices: [one, two]", "choices: [one, one]"): "line 1: choices has 'one' twice",
    (
        "shots: 2",
        "reference: {metadata: label, map: {0: one, 1: too}}",
    ): "line 1: reference.map leads to 'too', which is not in",
    ("shots: 2", "reference: {map: {0: one}}"): "line 1: reference.map renames a metadata entry; name it",
    ("shots: 2", "judge: b.jsonl"): "line 1: judge says nothing about answer 'choices' with metrics accuracy; drop it",
    ("shots: 2", "forecast: {readings: 2, kind: x}"): "line 1: forecast says nothing about answer 'choices'",
    ("manifest: a.jsonl", "environment: CartPole-v1"): "line 1: data.environment says nothing about answer 'choices'",
    ("shots: 2", "first: [text]"): "line 1: first is ['text']; name other modalities",
    ("[one, two]\nmetrics: [accuracy]", "&c [one, two]\nmetrics: *c"): "line 5: aliases (*c) are not read",
    ("shots: 2", "? [a]\n: 2"): "line 6: a key must be a plain name",
}


@pytest.mark.parametrize(("change", "message"), WRONG.items(), ids=[m[:40] for m in WRONG.values()])
def test_a_wrong_file_is_refused_with_its_line(change: tuple[str, str], message: str, tmp_path: Path) -> None:
    file = tmp_path / "task.yaml"
    file.write_text(GOOD)
    assert load_tasks(file)[0].shots == 2
    file.write_text(GOOD.replace(*change))
    with pytest.raises(TaskError) as error:
        load_tasks(file)
    assert str(file) in str(error.value) and message in str(error.value)


def test_unknown_suites_and_tasks_are_named() -> None:
    with pytest.raises(TaskError, match="'nothing' is no task file and no suite"):
        find_tasks("nothing")
    with pytest.raises(TaskError, match="has no task 'x'"):
        find_tasks("generalist-mini/x")


def test_a_digest_changes_with_every_key(tmp_path: Path) -> None:
    file = tmp_path / "task.yaml"
    digests = set()
    for text in (GOOD, GOOD.replace("two]", "too]"), GOOD.replace("shots: 2", "shots: 3"), GOOD + "about: x\n"):
        file.write_text(text)
        digests.add(load_tasks(file)[0].digest())
    assert len(digests) == 4
