"""What people get wrong in a run file, on the command line and in a manifest: each has a sentence with the file, the key or
line, and the repair."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest

from tests.training.data_world import documents, tokenizer, write_manifest
from weft.training.build import build as build_parts
from weft.training.config import ConfigError, load_run
from weft.training.data.prepare import PrepareError, prepare
from weft.training.data.sources import prepare_from

RUN = [
    # words that are not known
    ("max_stepz: 5", "run.yaml:1: max_stepz", "did you mean 'max_steps'"),
    ("max_steps: 5\noptimizer:\n  learning_rate: 1e-3", "run.yaml:3: optimizer.learning_rate", "choose one of kind, lr"),
    ("max_steps: 5\ndata:\n  sources:\n    - {paht: x}", "run.yaml:4: data.sources.0.paht", "did you mean 'path'"),
    ("max_steps: 5\nmodel:\n  preset: tyni", "run.yaml:3: model.preset", "did you mean 'tiny'"),
    ("max_steps: 5\nmodel:\n  sizes:\n    widht: 64", "run.yaml:4: model.sizes.widht", "did you mean 'width'"),
    (
        "max_steps: 5\nmodel:\n  sizes: {heads: 3, kv_heads: 2}",
        "run.yaml:3: model.sizes.heads",
        "must be a multiple of kv_heads",
    ),
    ("max_steps: 5\ndata:\n  plan: dens", "run.yaml:3: data.plan", "did you mean 'dense'"),
    ("max_steps: 5\ntracking: {trackers: [tensorbord]}", "run.yaml:2: tracking.trackers.0", "did you mean 'tensorboard'"),
    ("max_steps: 5\nschedule:\n  kind: linear", "run.yaml:3: schedule.kind", "must be one of 'cosine', 'wsd', 'constant'"),
    (
        "max_steps: 5\nloss: {modality_weight: {smell: 1}}",
        "run.yaml:2: loss.modality_weight.smell",
        "known modalities are text",
    ),
    ("max_steps: 5\ncheckpoint:\n  resume: always", "run.yaml:3: checkpoint.resume", "must be one of 'auto', 'never'"),
    # values of the wrong kind
    ("max_steps: 1e3", "run.yaml:1: max_steps", "write max_steps: 1000"),
    ("max_steps: 100.0", "run.yaml:1: max_steps", "write max_steps: 100"),
    ("max_steps: ten", "run.yaml:1: max_steps", "must be a whole number, found 'ten'; write for example max_steps: 100"),
    ("max_steps: 5\noptimizer:\n  lr: 0,001", "run.yaml:3: optimizer.lr", "write lr: 0.001"),
    ("max_steps: 5\noptimizer:\n  lr: .inf", "run.yaml:3: optimizer.lr", "must be a finite number"),
    ("max_steps: 5\nengine: deepspeed", "run.yaml:2: engine", "indent its keys below it, for example kind: deepspeed"),
    ("max_steps: 5\ndata:\n  sources: [shards/a]", "run.yaml:3: data.sources.0", "for example path: shards/a"),
    ("max_steps: 5\ndata:\n  sources: shards/a", "run.yaml:3: data.sources", "one `- ` line per entry"),
    ("max_steps: 5\noptimizer: {betas: 0.9}", "run.yaml:2: optimizer.betas", "write betas: [...]"),
    ("max_steps: 5\noptimizer: {betas: [0.9]}", "run.yaml:2: optimizer.betas", "must have 2 entries, found 1"),
    ("max_steps: 5\noptimizer:\nseed: 1", "run.yaml:2: optimizer", "indent its keys below it or remove the line"),
    ("max_steps: 5\nseed:", "run.yaml:2: seed", "give it a value or remove the line"),
    ("max_steps: 5\nengine: {recompute: 'true'}", "run.yaml:2: engine.recompute", "write recompute: true, without quotes"),
    ("max_steps: 5\nfolder: 2026", "run.yaml:2: folder", "quote it: folder: '2026'"),
    ("max_steps: 5\ntracking:\n  panel: off", "run.yaml:3: tracking.panel", "must be one of 'auto', 'live', 'plain', 'none'"),
    # values that cannot be
    ("seed: 3", "run.yaml: the top level", "add one of them"),
    ("max_steps: 0", "run.yaml:1: max_steps", "must be at least 1"),
    ("max_steps: 5\noptimizer:\n  clip: 1\n  lr: -1", "run.yaml:4: optimizer.lr", "must be positive"),
    ("max_steps: 5\noptimizer: {kind: muon}\nengine: {kind: deepspeed, zero_stage: 3}", "run.yaml:3: engine", "zero_stage"),
    ("max_steps: 5\nschedule: {floor: 2}", "run.yaml:2: schedule.floor", "must lie in [0, 1]"),
    ("max_steps: 5\ncheckpoint:\n  every: 2\n  ema: 1.5", "run.yaml:4: checkpoint.ema", "must lie in (0, 1)"),
    ("max_steps: 5\ncheckpoint: {keep_last: 0}", "run.yaml:2: checkpoint.keep_last", "must be at least 1"),
    ("max_steps: 5\nmonitors: {window: 2}", "run.yaml:2: monitors.window", "must be at least 8"),
    ("max_steps: 5\ndata: {dropout: {image: 30}}", "run.yaml:2: data.dropout", "must lie in 0 to 1"),
    ("max_steps: 5\ndata:\n  max_tokens: 10\n  length: 20", "run.yaml:3: data.max_tokens", "raise it or lower length"),
    ("max_steps: 5\ndata:\n  bad_budget: 5", "run.yaml:3: data.bad_budget", "a share from 0 to 1"),
    ("max_steps: 5\ndata: {sources: [{path: a, weight: 0}]}", "run.yaml:2: data.sources.0.weight", "leave the source out"),
    (
        "max_steps: 5\ndata:\n  sources:\n    - {path: a, weight: 1}\n    - path: b",
        "run.yaml:3: data.sources",
        "to all or to none",
    ),
    (
        "max_steps: 5\ndata:\n  sources:\n    - path: a/s\n    - path: b/s",
        "run.yaml:3: data.sources",
        "give each its own `name:`",
    ),
    ("max_steps: 5\nfinetune: {rank: 0}", "run.yaml:2: finetune.rank", "must be at least 1"),
    # no YAML
    ("max_steps: 5\nmax_steps: 6", "run.yaml:2: max_steps", "keep one"),
    ("max_steps: 5\n\tseed: 1", "run.yaml:2", "correct that line"),
    ("max_steps 5", "run.yaml", "must hold key: value pairs"),
    ("a: &a [*a]", "run.yaml:1", "write the value out"),
    ("x: " + "[" * 3000, "run.yaml", "correct that line|nested too deeply"),
]


def message(folder: Path, text: str, *overrides: str) -> str:
    path = folder / "run.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as error:
        load_run(path, overrides)
    return str(error.value)


@pytest.mark.parametrize(("text", "where", "repair"), RUN)
def test_a_mistake_in_a_run_file_names_line_key_and_repair(tmp_path: Path, text: str, where: str, repair: str) -> None:
    said = message(tmp_path, text)
    assert said.startswith(f"{tmp_path}/{where}"), said
    assert repair in said or re.search(repair, said), said
    assert "\n" not in said and len(said) < 600 and not re.search(r"Config\(|Section\(|<class|Traceback", said), said


GOOD = "max_steps: 5\noptimizer:\n  lr: 1e-3\ndata:\n  sources:\n    - path: a\n"
WORDS = [
    ("optimizer.lr=-1", "optimizer.lr", "must be positive"),
    ("optimizer.lrr=1", "optimizer.lrr", "did you mean 'lr'"),
    ("optimizer={lr: 1, beta: 2}", "optimizer.beta", "did you mean 'betas'"),
    ("max_steps=many", "max_steps", "must be a whole number"),
    ("engine.kind=deepsped", "engine.kind", "did you mean 'deepspeed'"),
    ("data.sources.0.weight=-2", "data.sources.0.weight", "must be above 0"),
    ("data.sources.0.paht=x", "data.sources.0.paht", "did you mean 'path'"),
    ("data.sources=[b]", "data.sources.0", "for example path: b"),
    ("checkpoint.every=0", "checkpoint.every", "must be at least 1"),
    ("data.sources.7.weight=1", "", "must be a number from 0 to 0"),
    ("optimizer.lr.x=1", "", "which has no keys of its own"),
    ("optimizer.lr", "", "must look like optimizer.lr=3e-4"),
    ("optimizer.lr=[1", "", "is not a YAML value"),
]


@pytest.mark.parametrize(("item", "key", "repair"), WORDS)
def test_a_mistake_on_the_command_line_names_the_override(tmp_path: Path, item: str, key: str, repair: str) -> None:
    said = message(tmp_path, GOOD, item)
    assert said.startswith(f"override {item!r}"), said
    assert key in said and repair in said, said
    assert "run.yaml:" not in said


def test_a_line_that_an_override_replaced_is_not_blamed(tmp_path: Path) -> None:
    assert message(tmp_path, "max_steps: 5\noptimizer:\n  lr: -1\n", "optimizer.clip=2").startswith(f"{tmp_path}/run.yaml:3")
    assert load_run(tmp_path / "run.yaml", ["optimizer.lr=1"]).optimizer.lr == 1.0


# ---- mistakes that show when the run is built


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    prepare(write_manifest(folder / "raw", documents(4)), folder / "shards")
    tokenizer().save(folder / "tokenizer")
    (folder / "empty").mkdir()
    return folder


BUILT = """\
max_steps: 2
folder: {root}/run
model: {{sizes: {{width: 24, layers: 2, heads: 2, kv_heads: 1, head_width: 12, expert_width: 16, dense_width: 40}}}}
data:
  tokenizer: {root}/tokenizer
  batch_tokens: 300
  length: 256
  prefetch: 0
  sources:
    - path: {root}/shards
"""
LATER = [
    ("tokenizer: {root}/tokenizer", "tokenizer: {root}/nowhere", 5, "data.tokenizer", "weft fit-tokenizer"),
    ("tokenizer: {root}/tokenizer", "tokenizer: {root}/shards", 5, "data.tokenizer", "weft fit-tokenizer"),
    ("  tokenizer: {root}/tokenizer\n", "", 4, "data", "needs tokenizer"),
    ("path: {root}/shards", "path: {root}/nowhere", 10, "data.sources.0", "finish weft prepare or check the path"),
    ("path: {root}/shards", "path: {root}/empty", 10, "data.sources.0", "finish weft prepare or check the path"),
    ("path: {root}/shards", "path: {root}/shards\n      split: test", 10, "data.sources.0", "splits with shards: train"),
    ("  sources:\n    - path: {root}/shards\n", "", 4, "data", "needs sources"),
    ("length: 256", "dropout: {{smell: 0.5}}", 7, "data.dropout", "modalities of the tokenizer are text"),
    ("folder: {root}/run", "folder: {root}/run\nmodel: {{init: {root}/empty}}", 3, "model.init", "use another checkpoint"),
    ("folder: {root}/run", "folder: {root}/run\nmodel: {{trunk: {root}/empty}}", 3, "model.trunk", "convert pickled weights"),
    ("max_steps: 2", "max_steps: 2\nfinetune: {{freeze: ['embeding.*']}}", 2, "finetune.freeze", "fits no parameter"),
    ("max_steps: 2", "max_steps: 2\nengine: {{device: gpu}}", 2, "engine.device", "use auto, cpu, cuda"),
]


@pytest.mark.parametrize(("old", "new", "line", "key", "repair"), LATER)
def test_a_mistake_that_shows_later_still_names_line_key_and_repair(
    world: Path, old: str, new: str, line: int, key: str, repair: str
) -> None:
    text = BUILT.replace(old, new)
    if new.count("model:"):
        text = re.sub(r"\nmodel: \{\{sizes.*\n", "\n", text)
    path = world / "run.yaml"
    path.write_text(text.format(root=world))
    with pytest.raises(ConfigError) as error:
        build_parts(load_run(path)).source.close()
    said = str(error.value)
    assert said.startswith(f"{path}:{line}: {key}"), said
    assert repair in said, said


# ---- manifests

GOOD_SENSOR = {"sensor": [1, 2], "rate_hz": 1}
MANIFEST: list[tuple[object, str, str]] = [
    # (line, key or place, repair)
    ({"segments": [{"text": "a"}], "spilt": "val"}, "'spilt'", "known are id, split"),
    ({"segments": [{"text": "a"}], "split": "trian"}, "split 'trian'", "must be one of train, val, test"),
    ({"segments": [{"text": "a"}], "split": 3}, "split 3", "must be one of train, val, test"),
    ({"segments": [{"text": "a"}], "id": 7}, "'id'", "must be a string"),
    ({"segments": [{"text": "a"}], "metadata": "x"}, "metadata", "must be a JSON object"),
    ({"text": "a"}, "segments", "must be a list with at least one segment"),
    ({"segments": []}, "segments", "must be a list with at least one segment"),
    ({"segments": {"text": "a"}}, "segments", "must be a list with at least one segment"),
    ({"segments": ["a"]}, "segment 0", "a JSON object is needed"),
    ({"segments": [{"txt": "a"}]}, "segment 0", "needs exactly one of text, image"),
    ({"segments": [{"text": "a", "image": "picture0.png"}]}, "segment 0", "needs exactly one of text, image"),
    ({"segments": [{"text": "a"}, {"text": 5}]}, "segments[1]", "must be a string"),
    ({"segments": [{"text": "a", "rate": 3}]}, "'rate'", "known are text"),
    ({"segments": [{"text": "a", "role": "traget"}]}, "'role'", "must be one of observed, target, either"),
    ({"segments": [{"text": "a", "start_s": "now"}]}, "'start_s'", "must be a number"),
    ({"segments": [{"text": "a", "start_s": 1, "start_ns": 2}]}, "start_s and start_ns", "keep one"),
    ({"segments": [{"text": "a", "start": "2026-01-31T12:00:00"}]}, "start", "for example|zone|offset"),
    ({"segments": [{"image": "nowhere.png"}]}, "nowhere.png", "check the path"),
    ({"segments": [{"image": "/etc/passwd"}]}, "'/etc/passwd'", "move the file there"),
    ({"segments": [{"image": "../out.png"}]}, "'../out.png'", "move the file there"),
    ({"segments": [{"image": "cut.png"}]}, "segment 0", "cannot be read"),
    ({"segments": [{"image": "table.csv"}]}, "table.csv", "png, jpg, jpeg, webp are read; convert it"),
    ({"segments": [{"audio": "picture0.png"}]}, "picture0.png", "wav, flac, ogg are read; convert it"),
    ({"segments": [{"sensor": "picture0.png", "rate_hz": 1}]}, "picture0.png", "npy, csv are read; convert it"),
    ({"segments": [{"sensor": "torn.csv", "rate_hz": 1}]}, "torn.csv", "line 2 has 1 cells"),
    ({"segments": [{"sensor": [1, 2]}]}, "segment 0", "rate_hz|times"),
    ({"segments": [{"sensor": [[1, 2], [3]], "rate_hz": 1}]}, "segment 0", "no regular array of numbers"),
    ({"segments": [{"sensor": [1, 2], "rate_hz": 0}]}, "segment 0", "rate_hz"),
    ({"segments": [{"sensor": [1, 2], "rate_hz": "fast"}]}, "'rate_hz'", "must be a number"),
    ({"segments": [{"sensor": [1, 2, 3], "times_s": [0, 1]}]}, "segment 0", "2 times for 3"),
    ({"segments": [{"sensor": [1, 2, 3], "times_s": [0, 2, 1]}]}, "segment 0", "before"),
    ({"segments": [{"sensor": [[1, 2]], "rate_hz": 1, "channels": ["x"]}]}, "segment 0", "2 channels and 1 channel names"),
    ({"segments": [{"action": [0, 1], "rate_hz": 1}]}, "'space'", "must be {'n': 4} or"),
    ({"segments": [{"action": [0, 5], "space": {"n": 3}, "rate_hz": 1}]}, "segment 0", "no integers from 0 to 2"),
    ({"segments": [{"action": [[0.5]], "space": {"low": [1], "high": [2]}, "rate_hz": 1}]}, "segment 0", "leave their space"),
    ({"segments": [{"action": [[0.5]], "space": {"low": [1]}, "rate_hz": 1}]}, "'space'", "high|bounds"),
    ("{not json}", "line", "is not a document"),
    ("[1, 2]", "line", "a JSON object is needed"),
    ('{"segments": [{"text": "a"}]', "line", "is not a document"),
]


def test_a_mistake_in_a_manifest_names_line_place_and_repair(tmp_path: Path) -> None:
    raw = tmp_path / "raw"
    path = write_manifest(raw, documents(1))
    (raw / "cut.png").write_bytes((raw / "picture0.png").read_bytes()[:300])
    (raw / "table.csv").write_text("a,b\n1,2\n")
    (raw / "torn.csv").write_text("a,b\n1\n3,4\n")
    np.save(raw / "x.npy", np.zeros(3))
    with open(path, "a") as file:
        for spec, _, _ in MANIFEST:
            file.write((spec if isinstance(spec, str) else json.dumps(spec)) + "\n")
    report = prepare(path, tmp_path / "out")
    assert report.samples == {"train": 1} and sum(report.refused.values()) == len(MANIFEST)
    lines = [json.loads(line) for line in (tmp_path / "out" / "refused.jsonl").read_text().splitlines()]
    wrong = []
    for number, (said, (_, place, repair)) in enumerate(zip(lines, MANIFEST), start=2):
        text = said["detail"]
        good = (
            said["line"] == number
            and text.startswith(f"{path} line {number}")
            and place in text
            and re.search(re.escape(repair) if "|" not in repair else repair, text)
        )
        if not good or "\n" in text or len(text) > 500:
            wrong.append(text)
    assert not wrong, "\n".join(wrong)
    assert set(report.first) == set(report.refused) and all("line" in text for text in report.first.values())


def test_a_wrong_source_of_documents_says_what_is_read(tmp_path: Path) -> None:
    for where, said in (
        ("nothing.jsonl", "check the path"),
        ("nothing", "check the path"),
        ("nothing.tar", "check the path or the braces"),
        ("minari:nothing", "minari download nothing"),
        ("ftp9://x/y.jsonl", "ftp9://x/y.jsonl"),
    ):
        with pytest.raises(PrepareError) as error:
            prepare_from(where, tmp_path / "out")
        assert said in str(error.value), str(error.value)
