"""A world is the same bytes every time, keeps its splits apart, and says what is in it."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest

from weft.benchmarks.world import material
from weft.benchmarks.world.build import WorldError, build_world
from weft.benchmarks.world.documents import RECIPES, mixture
from weft.benchmarks.world.speech import voices

SCALE = 0.02


def digest(root: Path) -> dict[str, str]:
    return {
        str(p.relative_to(root)): hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(root.rglob("*")) if p.is_file()
    }


def manifests(root: Path, split: str) -> list[dict]:
    return [json.loads(line) for path in sorted(root.glob(f"*.{split}.jsonl")) for line in path.read_text().splitlines()]


def media(lines: list[dict]) -> set[str]:
    return {s[m] for line in lines for s in line["segments"] for m in ("image", "audio", "video") if m in s}


def test_an_interrupted_and_resumed_build_equals_an_undisturbed_one(world: Path, tmp_path: Path) -> None:
    def stop(stage: str, _: float) -> None:
        if stage == "returns":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_world(tmp_path / "w", scale=SCALE, progress=stop)
    seen: list[str] = []
    build_world(tmp_path / "w", scale=SCALE, progress=lambda stage, part: seen.append(stage))
    assert seen[-1] == "done"
    assert digest(tmp_path / "w") == digest(world)


def test_a_finished_world_is_left_alone(world: Path) -> None:
    before = {p: p.stat().st_mtime_ns for p in world.glob("*.jsonl")}
    build_world(world, scale=SCALE)
    assert before == {p: p.stat().st_mtime_ns for p in world.glob("*.jsonl")}


def test_no_test_media_in_training_by_path_or_by_content(world: Path) -> None:
    paths = {split: media(manifests(world, split)) for split in ("train", "val", "test")}
    content = {}
    for split, found in paths.items():
        assert found and all((world / p).exists() for p in found)
        whole = [world / p for p in found if "halves" not in p and (world / p).is_file()]
        content[split] = {hashlib.sha256(p.read_bytes()).hexdigest() for p in whole}
    for a, b in (("train", "test"), ("train", "val"), ("val", "test")):
        assert not paths[a] & paths[b]
        assert not content[a] & content[b]


def test_voices_topics_and_identities_are_disjoint(world: Path) -> None:
    assert not set(voices("train")) & set(voices("test")) and not set(voices("train")) & set(voices("val"))
    assert len(voices("test")) >= 15 and len(voices("train")) >= 100
    topics = {
        split: {line["metadata"]["topic"] for line in material.lines(world, "prose", split)} for split in ("train", "test")
    }
    assert not topics["train"] & topics["test"]
    lines = [line for split in ("train", "val", "test") for line in manifests(world, split)]
    assert len({line["id"] for line in lines}) == len(lines)


def test_every_answer_is_a_target_after_an_observed_prompt(world: Path) -> None:
    for line in manifests(world, "train") + manifests(world, "test"):
        roles = [segment["role"] for segment in line["segments"]]
        assert set(roles) <= {"observed", "target"}
        if line["source"].startswith("pair"):
            assert line["pair"] == f"digit-{line['metadata']['label']}" and roles == ["observed"]
        elif line["source"] != "prose" and not (line["source"] == "say" and line["split"] == "test"):
            assert roles[0] == "observed" and roles[-1] == "target"


def test_manifests_load_as_documents(world: Path) -> None:
    manifest = pytest.importorskip("weft.tokenizers.manifest")
    for split in ("train", "val", "test"):
        for line in manifests(world, split):
            document = manifest.load_document(line, world)
            assert len(document.segments) == len(line["segments"]) and document.source == line["source"]


def test_world_json_counts_what_is_there(world: Path) -> None:
    stated = json.loads((world / "world.json").read_text())
    for name, source in stated["sources"].items():
        for split, count in source["documents"].items():
            path = world / f"{name}.{split}.jsonl"
            assert count == (len(path.read_text().splitlines()) if path.exists() else 0)
    assert stated["control"]["CartPole-v1"]["expert"] == 500
    assert "SYNTHETIC" in (world / "README.md").read_text()


def test_mixture_gives_each_source_its_share_of_tokens() -> None:
    weights = mixture()
    assert sum(weights.values()) == pytest.approx(1)
    tokens = {name: weights[name] * recipe.tokens for name, recipe in RECIPES.items()}
    shares = sum(recipe.share for recipe in RECIPES.values())
    for name, recipe in RECIPES.items():
        assert tokens[name] / sum(tokens.values()) == pytest.approx(recipe.share / shares)
    assert mixture(shares={"video": 0.0})["video"] == 0
    with pytest.raises(ValueError, match="unknown sources"):
        mixture(shares={"touch": 1.0})


def test_bad_arguments_are_named(tmp_path: Path) -> None:
    with pytest.raises(WorldError, match="scale 0"):
        build_world(tmp_path / "w", scale=0)
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(WorldError, match="not a sample world"):
        build_world(tmp_path)
    assert (tmp_path / "thesis.txt").read_text() == "mine"
    with pytest.raises(WorldError, match="build the sample world"):
        material.lines(tmp_path, "video", "test")


def test_another_seed_makes_another_world() -> None:
    from weft.benchmarks.world.digits import load_scans

    first, second = load_scans(0), load_scans(1)
    assert len(first["test"]) == 400 and len(first["val"]) == 100 and len(first["train"]) == 1297
    assert set(first["test"].index) != set(second["test"].index)
    assert not set(first["test"].index) & set(first["train"].index)
    assert np.bincount(first["test"].labels).tolist() == [40] * 10
