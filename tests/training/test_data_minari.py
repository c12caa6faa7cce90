"""Minari's datasets as documents, from each layout that its collector writes.

`minari/` beside this file holds the same six episodes of CartPole and a goal task with a dictionary of observations, as
minari 0.5.4 wrote them in its three layouts (`make_minari.py` made them); minari itself is not needed to read them.
"""

from __future__ import annotations

import shutil
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest

from weft.tokenizers.segment import Document
from weft.training.data import minari_files
from weft.training.data.prepare import PrepareError
from weft.training.data.records import restore
from weft.training.data.shards import ShardDataset
from weft.training.data.source_minari import episode_record
from weft.training.data.sources import prepare_from

HERE = Path(__file__).parent / "minari"
LAYOUTS = ("hdf5", "arrow", "parquet")


def needs(layout: str) -> None:
    name = "h5py" if layout == "hdf5" else "pyarrow"
    pytest.importorskip(name, reason=f"Minari's {layout} layout is read with {name}, which is not installed")


def read(folder: Path) -> list[Document]:
    dataset = ShardDataset(folder)
    return [restore(s.members, s.where) for s in map(dataset.read, range(len(dataset)))]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_layout_gives_the_episodes_that_were_recorded(tmp_path: Path, layout: str) -> None:
    needs(layout)
    truth = np.load(HERE / "cartpole.npz")
    report = prepare_from(HERE / f"cartpole-{layout}", tmp_path / "out", name="cart", rate_hz=50)  # found without `minari:`
    docs = read(tmp_path / "out")
    assert report.samples == {"train": 6} and report.refused == {}
    for i, doc in enumerate(docs):
        sensor, action = doc.segments
        assert np.array_equal(sensor.values, truth[f"observations{i}"].astype(np.float32))
        assert np.array_equal(np.ravel(action.values), truth[f"actions{i}"]) and action.space.n == 2
        assert len(sensor.values) == len(action.values) + 1 and sensor.rate_hz == action.rate_hz == 50
        assert doc.metadata["return"] == truth[f"rewards{i}"].sum() and doc.metadata["task"] == f"cartpole/{layout}-v0"
        assert action.role == "target" and sensor.role == "observed" and sensor.kind == "cart.observation"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_dictionaries_pictures_and_instructions_become_segments(tmp_path: Path, layout: str) -> None:
    needs(layout)
    truth = np.load(HERE / "goal.npz")
    report = prepare_from(f"minari:{HERE / f'goal-{layout}'}", tmp_path / "out", name="goal", rate_hz=10)
    assert report.samples == {"train": 2} and report.refused == {}
    for i, doc in enumerate(read(tmp_path / "out")):
        found = {s.name: s for s in doc.segments}
        assert set(found) == {"arm.joints", "camera", "mission", "action"}
        assert np.allclose(found["arm.joints"].values, truth[f"joints{i}"])
        assert found["mission"].text == f"reach goal {i}" and found["mission"].role == "observed"
        frames = found["camera"].frames
        assert len(frames) == truth[f"frames{i}"] and all(f[:3] == b"\xff\xd8\xff" for f in frames)
        assert np.allclose(found["action"].values, truth[f"actions{i}"]) and found["action"].space.low == (-1.0, -2.0)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_damaged_dataset_names_its_file(tmp_path: Path, layout: str) -> None:
    needs(layout)
    shutil.copytree(HERE / f"cartpole-{layout}", tmp_path / "d")
    data = tmp_path / "d" / "data"
    path = data / "main_data.hdf5" if layout == "hdf5" else next(data.glob(f"0/*.{layout}"))
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(PrepareError, match=r"download"):
        prepare_from(tmp_path / "d", tmp_path / "out")
    (data / "metadata.json").write_text("{")
    with pytest.raises(PrepareError, match=r"metadata\.json is no Minari metadata .*download the dataset again"):
        prepare_from(tmp_path / "d", tmp_path / "out2")


@pytest.mark.parametrize(("layout", "package"), [("hdf5", "h5py"), ("arrow", "pyarrow"), ("parquet", "pyarrow")])
def test_without_its_package_a_layout_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layout: str, package: str
) -> None:
    for name in [package, *(m for m in sys.modules if m.startswith(f"{package}."))]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ModuleNotFoundError, match=rf"read with {package}, which is missing; pip install 'weft\["):
        prepare_from(f"minari:{HERE / f'cartpole-{layout}'}", tmp_path / "out")


def test_a_missing_dataset_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    with pytest.raises(PrepareError, match="minari download D4RL/door/human-v2"):
        prepare_from("minari:D4RL/door/human-v2", tmp_path / "out")
    shutil.copytree(HERE / "cartpole-arrow", tmp_path / "D4RL" / "cart-v0")
    needs("arrow")
    assert prepare_from("minari:D4RL/cart-v0", tmp_path / "out").samples == {"train": 6}
    with pytest.raises(PrepareError, match="must be above 0 steps per second"):
        prepare_from("minari:D4RL/cart-v0", tmp_path / "out3", rate_hz=0)


def record(actions: object, space: dict | None = None, observations: object = None) -> object:
    episode = {"observations": np.zeros((4, 3)) if observations is None else observations, "actions": actions}
    return episode_record(1, "x", episode, "toy", "toy-v0", "train", 20.0, space)


def test_action_spaces() -> None:
    found = {
        "discrete from 3": record(np.array([3, 4, 5]), {"type": "Discrete", "n": 4, "start": 3}),
        "box": record(np.ones((3, 2)), {"type": "Box", "low": [-2, -2], "high": [2, 2]}),
        "several discrete": record(
            np.array([[0, 3], [1, 2], [2, 0]]), {"type": "MultiDiscrete", "nvec": [3, 4], "start": [0, 0]}
        ),
        "several switches": record(np.array([[0, 1], [1, 1], [1, 0]], np.int8), {"type": "MultiBinary", "n": 2}),
    }
    actions = {name: r.spec["segments"][-1] for name, r in found.items()}  # type: ignore[attr-defined]
    assert actions["discrete from 3"]["action"].tolist() == [0, 1, 2] and actions["discrete from 3"]["space"] == {"n": 4}
    assert actions["box"]["space"] == {"low": [-2, -2], "high": [2, 2]}
    assert actions["several discrete"]["space"] == {"low": [0, 0], "high": [2, 3]}
    assert actions["several discrete"]["action"].shape == (3, 2)
    assert actions["several switches"]["space"] == {"low": [0, 0], "high": [1, 1]}


@pytest.mark.parametrize(
    ("actions", "space", "observations", "said"),
    [
        (np.ones((3, 2)), None, None, "finite bounds"),
        (np.ones((3, 1)), {"type": "Box", "low": [float("-inf")], "high": [float("inf")]}, None, "finite bounds"),
        ({"a": np.ones(3)}, None, None, "only one flat space"),
        (np.ones((3, 1)), {"low": [0], "high": [1]}, {"x": np.array([None, None])}, "observation 'x' has dtype object"),
    ],
)
def test_an_episode_that_cannot_be_read_says_why(actions: object, space: dict, observations: object, said: str) -> None:
    assert said in record(actions, space, observations).error  # type: ignore[attr-defined]


def test_pictures_count_only_where_minari_compresses_them() -> None:
    assert minari_files.is_image({"dtype": "uint8", "shape": [64, 64, 3]})
    assert not minari_files.is_image({"dtype": "uint8", "shape": [7, 7, 3]}) and not minari_files.is_image(None)


def test_the_collector_of_minari_writes_what_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From an environment to a document, with minari's own collector."""
    for name in ("minari", "jax", "gymnasium"):
        pytest.importorskip(name, reason=f"minari's collector needs {name}")
    from tests.training.minari.make_minari import collect

    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "datasets"))
    for layout in LAYOUTS:
        needs(layout)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # minari asks for an evaluation environment and more
            episodes = collect(f"cart/{layout}-v0", layout, 3)
        prepare_from(f"minari:cart/{layout}-v0", tmp_path / layout)
        docs = read(tmp_path / layout)
        assert [len(d.segments[1].values) for d in docs] == [len(e) for e in episodes]
        assert [np.ravel(d.segments[1].values).tolist() for d in docs] == episodes
