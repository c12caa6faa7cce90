"""A run file is read strictly: every mistake names the file, the line, the key and the repair."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from weft.training.config import ConfigError, RunConfig, load_run
from weft.training.strict import build, override, plain

GOOD = """\
folder: runs/a
max_steps: 10
optimizer:
  lr: 3e-4
  betas: [0.9, 0.99]
data:
  sources:
    - path: shards/one
      weight: 0.5
    - path: shards/two
      weight: 0.5
"""


def write(folder: Path, text: str) -> Path:
    path = folder / "run.yaml"
    path.write_text(text)
    return path


def test_yaml_and_overrides_fill_the_config(tmp_path):
    run = load_run(write(tmp_path, GOOD), ["optimizer.lr=1e-5", "data.sources.1.weight=2", "engine.kind=deepspeed"])
    assert run.optimizer.lr == 1e-5
    assert run.optimizer.betas == (0.9, 0.99)
    assert [s.weight for s in run.data.sources] == [0.5, 2.0]
    assert run.engine.kind == "deepspeed"


def test_saved_config_reads_back_equal(tmp_path):
    run = load_run(write(tmp_path, GOOD))
    again = load_run(write(tmp_path, run.to_yaml()))
    assert again == run
    assert plain(again) == yaml.safe_load(run.to_yaml())


MISTAKES = [
    ("optimiser:\n  lr: 1\nmax_steps: 1", r"run\.yaml:1: optimiser .*did you mean 'optimizer'"),
    ("max_steps: 1\noptimizer:\n  lrr: 1", r"run\.yaml:3: optimizer\.lrr .*did you mean 'lr'"),
    ("max_steps: ten", r"run\.yaml:1: max_steps must be int, found 'ten'"),
    ("max_steps: 0", "max_steps must be at least 1"),
    ("seed: 3", "needs max_steps or max_seconds"),
    ("max_steps: 5\noptimizer:\n  lr: -1", r"run\.yaml:2: optimizer: lr must be positive"),
    ("max_steps: 5\nengine:\n  kind: deepsped", r"run\.yaml:3: engine\.kind must be one of .*did you mean 'deepspeed'"),
    ("max_steps: 5\nmodel:\n  preset: huge", r"preset 'huge' is not known; choose one of tiny"),
    ("max_steps: 5\ndata:\n  sources:\n    - paht: x", r"run\.yaml:4: data\.sources\.0\.paht .*did you mean 'path'"),
    ("max_steps: 5\nmax_steps: 6", r"run\.yaml:2: max_steps is given twice"),
    ("max_steps: 5\n  seed: 1", r"run\.yaml:2: not valid YAML"),
    ("- 1\n- 2", "must hold key: value pairs"),
    ("max_steps: 5\nloss:\n  modality_weight:\n    smell: 1", "modality_weight names 'smell'; known modalities are text"),
    ("max_steps: 5\nengine:\n  expert_parallel: 4", "AutoEP replaces the expert layer"),
    ("max_steps: 5\nengine: {kind: deepspeed, zero_stage: 2}\noptimizer: {kind: muon}", "muon needs whole matrices"),
    ("max_steps: 5\noptimizer:\n  lr: .inf", r"optimizer\.lr must be float, found inf"),
    ("max_steps: true", "max_steps must be int, found True"),
    ("max_steps: 5\ndata:\n  plan: gatto", "plan 'gatto' is not known; choose one of gato"),
]


@pytest.mark.parametrize(("text", "message"), MISTAKES)
def test_every_mistake_says_where_and_what_to_do(tmp_path, text, message):
    with pytest.raises(ConfigError, match=message):
        load_run(write(tmp_path, text))


@pytest.mark.parametrize("item", ["lr", "=1", "optimizer.lr.x=1", "data.sources.7.weight=1", "optimizer.lr=[1"])
def test_a_bad_override_is_named(tmp_path, item):
    with pytest.raises(ConfigError, match=r"override|optimizer"):
        load_run(write(tmp_path, GOOD), [item])


def test_missing_and_binary_files_are_named(tmp_path):
    with pytest.raises(ConfigError, match="cannot read the run file"):
        load_run(tmp_path / "none.yaml")
    (tmp_path / "run.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="not UTF-8"):
        load_run(tmp_path / "run.yaml")


TREES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=12,
)


@settings(max_examples=40)
@given(st.dictionaries(st.sampled_from(["max_steps", "optimizer", "data", "engine", "model", "x"]), TREES, max_size=4))
def test_any_tree_is_a_config_or_a_config_error(tree):
    try:
        assert isinstance(build(RunConfig, tree), RunConfig)
    except ConfigError as error:
        assert "\n" not in str(error).strip() or len(str(error)) < 2000


@settings(max_examples=40)
@given(st.dictionaries(st.text(min_size=1, max_size=5), TREES, max_size=3))
def test_overrides_leave_the_given_tree_alone(tree):
    before = repr(tree)
    override(tree, ["seed=1"])
    assert repr(tree) == before
