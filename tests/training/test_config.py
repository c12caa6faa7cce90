"""A run file and overrides fill one config, and nothing but; what mistakes say is in `test_mistakes.py`."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from weft.training.config import ConfigError, RunConfig, load_run
from weft.training.config_file import override
from weft.training.strict import build, plain

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


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.dictionaries(st.sampled_from(["max_steps", "optimizer", "data", "engine", "model", "x"]), TREES, max_size=4))
def test_any_tree_is_a_config_or_a_config_error(tree):
    try:
        assert isinstance(build(RunConfig, tree), RunConfig)
    except ConfigError as error:
        assert "\n" not in str(error).strip() or len(str(error)) < 2000


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.dictionaries(st.text(min_size=1, max_size=5), TREES, max_size=3))
def test_overrides_leave_the_given_tree_alone(tree):
    before = repr(tree)
    override(tree, ["seed=1"])
    assert repr(tree) == before
