"""Converters read tiny files in the published layouts, and the published tasks ask what they write."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from PIL import Image

from weft.benchmarks.harness.control import returns_scale
from weft.benchmarks.harness.convert import ConvertError, coco, episodes, librispeech, vqav2
from weft.benchmarks.harness.questions import Question, Variant, question
from weft.benchmarks.harness.samples import task_data
from weft.benchmarks.harness.task import find_tasks
from weft.tokenizers.manifest import read_manifest


def ask(name: str, root: Path) -> list[Question]:
    ((task, _),) = find_tasks(f"published/{name}")
    return sorted((question(task, s, Variant(), 0) for s in task_data(task, root).samples), key=lambda q: q.key)


def picture(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.zeros((6, 9, 3), np.uint8)).save(path)


def test_coco_keeps_every_caption(tmp_path: Path) -> None:
    for name in ("000000000139.jpg", "000000000285.jpg"):
        picture(tmp_path / "val2017" / name)
    value = {
        "info": {"year": 2017},
        "images": [{"id": 285, "file_name": "000000000285.jpg"}, {"id": 139, "file_name": "000000000139.jpg"}],
        "annotations": [
            {"image_id": 139, "id": 1, "caption": "A room.\n"},
            {"image_id": 285, "id": 2, "caption": "A bear."},
            {"image_id": 139, "id": 3, "caption": "A woman in a room."},
        ],
    }
    (tmp_path / "captions.json").write_text(json.dumps(value))
    assert coco(tmp_path / "captions.json", tmp_path / "val2017", tmp_path / "coco.jsonl") == 2
    first, second = ask("coco-captions", tmp_path)
    assert first.reference == ["A room.", "A woman in a room."] and second.reference == ["A bear."]
    assert [s.modality for s in first.prompt] == ["image", "text"]
    (tmp_path / "val2017" / "000000000285.jpg").unlink()
    with pytest.raises(ConvertError, match=r"000000000285\.jpg is missing"):
        coco(tmp_path / "captions.json", tmp_path / "val2017", tmp_path / "again.jsonl")
    assert not (tmp_path / "again.jsonl").exists() and not list(tmp_path.glob("*.part"))


def test_vqav2_keeps_ten_annotators(tmp_path: Path) -> None:
    picture(tmp_path / "val2014" / "COCO_val2014_000000262148.jpg")
    (tmp_path / "q.json").write_text(
        json.dumps({"questions": [{"image_id": 262148, "question": "Where is he looking?", "question_id": 262148000}]})
    )
    answers = [{"answer": "down" if i else "at table", "answer_confidence": "yes", "answer_id": i + 1} for i in range(10)]
    entry = {"question_type": "none of the above", "multiple_choice_answer": "down", "answers": answers, "image_id": 262148}
    (tmp_path / "a.json").write_text(json.dumps({"annotations": [{**entry, "answer_type": "other", "question_id": 262148000}]}))
    assert vqav2(tmp_path / "q.json", tmp_path / "a.json", tmp_path / "val2014", tmp_path / "vqav2.jsonl") == 1
    (asked,) = ask("vqav2", tmp_path)
    assert asked.reference == ["at table"] + ["down"] * 9 and asked.metadata["answer_type"] == "other"
    assert [getattr(s, "text", s.modality) for s in asked.prompt] == ["image", "Where is he looking?"]
    with pytest.raises(ConvertError, match="has no key 'questions'"):
        vqav2(tmp_path / "a.json", tmp_path / "a.json", tmp_path / "val2014", tmp_path / "x.jsonl")


def test_librispeech_reads_transcripts_beside_the_sound(tmp_path: Path) -> None:
    chapter = tmp_path / "test-clean" / "1089" / "134686"
    chapter.mkdir(parents=True)
    (chapter / "1089-134686.trans.txt").write_text("1089-134686-0000 HE HOPED THERE WOULD BE STEW\n1089-134686-0001 STUFF IT\n")
    for i in range(2):
        soundfile.write(chapter / f"1089-134686-000{i}.flac", np.zeros(1600), 16000)
    assert librispeech(tmp_path / "test-clean", tmp_path / "librispeech.jsonl") == 2
    first, second = ask("librispeech", tmp_path)
    assert (first.reference, second.reference) == ("he hoped there would be stew", "stuff it")
    assert first.metadata["speaker"] == "1089" and [s.modality for s in first.prompt] == ["audio"]


@pytest.mark.parametrize("discrete", [False, True], ids=["mujoco", "babyai"])
def test_episodes_interleave_readings_and_actions(discrete: bool, tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    rng = np.random.default_rng(0)
    rows: dict[str, Any] = {"rewards": [[1.0, 0.5, 0.25], [0.0, 2.0]]}
    if discrete:
        rows |= {"discrete_observations": [[[1, 2], [3, 4], [5, 6]], [[7, 8], [9, 1]]], "discrete_actions": [[0, 2, 6], [1, 1]]}
        rows["text_observations"] = [["go to the red ball"] * 3, ["go to the key"] * 2]
    else:
        rows["continuous_observations"] = [rng.normal(size=(k, 17)).tolist() for k in (3, 2)]
        rows["continuous_actions"] = [[[0.5, -1.5]] * 3, [[1.0, 0.0]] * 2]
    pq.write_table(pa.table(rows), tmp_path / "e.parquet")
    space: dict[str, Any] = {"n": 7} if discrete else {"bound": 1.0}
    assert episodes(tmp_path / "e.parquet", tmp_path / "e.jsonl", "halfcheetah", 20.0, **space) == 2
    first, second = read_manifest(tmp_path / "e.jsonl")
    body = first.segments[1:] if discrete else first.segments
    assert [s.modality for s in body] == ["sensor", "action"] * 3 and first.metadata["return"] == 1.75
    assert [s.start for s in body[::2]] == [0, 50_000_000, 100_000_000]
    values = [np.asarray(s.values).reshape(-1).tolist() for s in body[1::2]]
    assert values == ([[0], [2], [6]] if discrete else [[0.5, -1.0]] * 3)
    assert not discrete or second.segments[0].text == "go to the key"
    wrong = {"bound": 1.0} if discrete else {"n": 7}
    with pytest.raises(ConvertError, match="give bound for continuous actions, n for discrete ones"):
        episodes(tmp_path / "e.parquet", tmp_path / "x.jsonl", "halfcheetah", 20.0, **wrong)


def test_published_control_tasks_read_the_published_scores(tmp_path: Path) -> None:
    tasks = [task for task, _ in find_tasks("published") if task.answer == "control"]
    scores = {task.name: {"random": {"mean": -1.5}, "expert": {"mean": 8.0, "std": 2.0}} for task in tasks}
    (tmp_path / "scores_dict.json").write_text(json.dumps(scores))
    assert len(tasks) == 6 and all(returns_scale(task, tmp_path) == {"random": -1.5, "expert": 8.0} for task in tasks)
