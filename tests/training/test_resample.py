"""From shards of pictures through a resampler to a model that names them, and what is refused on the way."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch

from weft.inference.load import load
from weft.tokenizers.bundle import StreamTokenizer
from weft.tokenizers.image import ImageConfig, ImageTokenizer
from weft.tokenizers.segment import Image
from weft.tokenizers.stream import Resample, StreamConfig
from weft.tokenizers.text import TextTokenizer
from weft.training.build import build_model
from weft.training.config import ConfigError, RunConfig, load_run
from weft.training.data.config import LoaderConfig, SourceConfig
from weft.training.data.loader import Loader
from weft.training.data.prepare import prepare
from weft.training.data.stored import store_source
from weft.training.strict import build
from weft.training.train import train

NAMES = ("dark", "bright", "left", "right")


def pixels(kind: int, seed: int) -> np.ndarray:
    """16 x 16 grey values that are one of `NAMES`."""
    level = np.full((16, 16), (40, 200, 40, 40)[kind]) + np.random.default_rng(seed).integers(-30, 31, (16, 16))
    if kind > 1:
        level[:, :8] += 160 * (kind == 2)
        level[:, 8:] += 160 * (kind == 3)
    return level.clip(0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of 48 named pictures, and a tokenizer that reads their 16 patches as 4 positions."""
    folder = tmp_path_factory.mktemp("pictures")
    lines = []
    for i in range(48):
        PIL.Image.fromarray(pixels(i % 4, i)).save(folder / f"{i}.png")
        segments = [{"image": f"{i}.png", "role": "observed"}, {"text": NAMES[i % 4], "role": "target"}]
        lines.append(json.dumps({"id": str(i), "segments": segments}) + "\n")
    (folder / "manifest.jsonl").write_text("".join(lines))
    prepare(folder / "manifest.jsonl", folder / "shards")
    text = TextTokenizer.fit([f"{a} {b}" for a in NAMES for b in NAMES] * 3, size=285)
    parts = [text, ImageTokenizer(ImageConfig(patch=4, channels=1))]
    StreamTokenizer.build(parts, StreamConfig(resample={"image": Resample(16, 4)})).save(folder / "tokenizer")
    StreamTokenizer.build(parts).save(folder / "plain")
    return folder


def config(root: Path, **given: Any) -> RunConfig:
    sizes = {"width": 32, "layers": 2, "heads": 2, "kv_heads": 1, "head_width": 16, "experts": 2, "expert_width": 24}
    base: dict[str, Any] = {
        "folder": str(root / "run"),
        "max_steps": 40,
        "model": {"sizes": {**sizes, "shared_width": 24, "dense_width": 48}},
        "data": {
            "tokenizer": str(root / "tokenizer"),
            "batch_tokens": 256,
            "length": 64,
            "micro_batches": 1,
            "prefetch": 0,
            "plan": "instruct",
            "sources": [{"path": str(root / "shards")}],
        },
        "optimizer": {"lr": 1e-2},
        "schedule": {"warmup_steps": 2},
        "checkpoint": {"every": 1000},
        "tracking": {"trackers": [], "panel": "none", "plots": False},
    }
    for name, value in given.items():
        base[name] = {**base[name], **value}
    return build(RunConfig, base)


def test_a_model_learns_to_name_pictures_through_a_resampler(root: Path) -> None:
    train(config(root))
    rows = [json.loads(line) for line in (root / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows if "loss" in row]
    assert np.mean(losses[-5:]) < 0.5 * np.mean(losses[:5])
    model = load(root / "run", device="cpu")
    assert model.model.config.resample["image"].latents == 4
    told = [model.generate(Image(pixels(kind, 1000 + kind)), max_tokens=8, temperature=0).text for kind in range(4)]
    assert sum(said.strip() == name for said, name in zip(told, NAMES)) >= 3, told


def test_streams_made_ahead_are_those_that_are_drawn(root: Path, tmp_path: Path) -> None:
    source = SourceConfig(str(root / "shards"))
    plain = LoaderConfig(batch_tokens=256, length=64, micro_batches=1, prefetch=0)
    ahead = LoaderConfig(batch_tokens=256, length=64, micro_batches=1, prefetch=0, streams_folder=str(tmp_path))
    store_source(source, ahead, None, root / "tokenizer")
    tokenizer = StreamTokenizer.load(root / "tokenizer")
    steps = [Loader([source], tokenizer, settings, seed=1).step(2).batches for settings in (plain, ahead)]
    for one, two in zip(*steps):
        assert torch.equal(one.ids, two.ids) and torch.equal(one.feature_at["image"], two.feature_at["image"])
        assert torch.equal(one.features["image"], two.features["image"]) and len(one.feature_at["image"]) % 4 == 0
        assert one.features["image"].shape[1] == 4 * 16, "4 patches of 16 pixels at each of 4 positions"


def test_the_model_takes_its_resampler_from_the_tokenizer_or_is_refused(root: Path) -> None:
    tokenizer, plain = StreamTokenizer.load(root / "tokenizer"), StreamTokenizer.load(root / "plain")
    assert not build_model(config(root, data={"tokenizer": str(root / "plain")}), plain).config.resample
    deeper = {**config(root).model.sizes, "resample": {"image": {"tokens": 16, "latents": 4, "depth": 3}}}
    run = config(root, model={"sizes": deeper})
    assert build_model(run, tokenizer).config.resample["image"].depth == 3
    with pytest.raises(ConfigError, match=r"sizes.*written for \{\}; leave it out"):
        build_model(run, plain)
    other = {**deeper, "resample": {"image": {"tokens": 16, "latents": 8}}}
    with pytest.raises(ConfigError, match=r"'latents': 8.*written for"):
        build_model(config(root, model={"sizes": other}), tokenizer)


def test_weights_of_a_folder_keep_their_resampler(root: Path, tmp_path: Path) -> None:
    from weft.inference.load import save

    tokenizer, plain = StreamTokenizer.load(root / "tokenizer"), StreamTokenizer.load(root / "plain")
    save(build_model(config(root), tokenizer), tokenizer, tmp_path / "start")
    run = config(root, model={"init": str(tmp_path / "start")})
    assert build_model(run, tokenizer).config.resample
    with pytest.raises(ConfigError, match="reads media through resamplers"):
        build_model(run, plain)


def test_plans_know_the_resampler(root: Path) -> None:
    from weft.commands.train import sizes

    path = root / "run.yaml"
    path.write_text(
        f"folder: {root}/x\nmax_steps: 1\ndata: {{tokenizer: {root}/tokenizer, sources: [{{path: {root}/shards}}]}}\n"
    )
    assert load_run(path) and sizes(str(path))[0].resample["image"].tokens == 16
