"""`build_world`: the whole sample world in one folder, deterministic, offline, resumable.

In: a folder, a scale, a seed. Out:
    world.json                 seed, scale, sources with counts and weights, returns of random and expert play, versions
    README.md                  the data card: where each part comes from and its licence
    SOURCE.SPLIT.jsonl         manifests; paths in them are relative to the folder
    media/                     PNG pictures, folders of PNG frames, FLAC speech
A stage that finished is marked in .stages/ and skipped by a later call with the same arguments; other arguments start over.
"""

from __future__ import annotations

import hashlib
import json
import platform
import shutil
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from weft.benchmarks.world import digits, speech, video
from weft.benchmarks.world.card import data_card
from weft.benchmarks.world.control import PLANTS, measure
from weft.benchmarks.world.documents import RECIPES, Material, documents, mixture
from weft.benchmarks.world.prose import digest as prose_digest
from weft.benchmarks.world.splits import share

SPLITS = ("train", "val", "test")
COPIES = 8
"""Distorted copies of every training scan."""
CANVASES = {"train": 1500, "val": 40, "test": 150}
VIDEOS = {"train": 2400, "val": 80, "test": 240}
Progress = Callable[[str, float], None]
"""Called with the stage's name and the fraction of all stages that is done."""


class WorldError(ValueError):
    """The folder or an argument does not allow a world to be built."""


def build_world(folder: str | Path, *, scale: float = 1.0, seed: int = 0, progress: Progress | None = None) -> Path:
    """Build the sample world in `folder` and return it. `scale` is the share of its documents (0 < scale <= 1); of the
    test documents it keeps the square root of that."""
    if not 0 < scale <= 1:
        raise WorldError(f"scale {scale} must lie above 0 and at most 1; it is the share of the full world's documents")
    if not isinstance(seed, int) or seed < 0:
        raise WorldError(f"seed {seed!r} must be an integer from 0")
    root = Path(folder)
    if root.exists() and not root.is_dir():
        raise WorldError(f"{root} is a file; name a folder for the sample world")
    root = root.resolve()
    _claim(root, {"scale": scale, "seed": seed, "code": _code_digest(), "prose": prose_digest()})
    material = Material(seed, scale)
    with ThreadPoolExecutor(1) as aside:  # a process of its own speaks meanwhile
        recording = aside.submit(_speech, root, material, not _done(root, "speech"))
        stages: dict[str, Callable[[Path, Material, bool], None]] = {
            "digits": _digits,
            "videos": _videos,
            "returns": _returns,
            "speech": lambda *_: recording.result(),
            "documents": _documents,
        }
        for i, (name, stage) in enumerate(stages.items()):
            if progress:
                progress(name, i / len(stages))
            stage(root, material, not _done(root, name))
            _mark(root, name)
    if progress:
        progress("done", 1.0)
    return root


CODE = ("digits", "speech", "voices", "video", "motor", "prose", "control", "documents", "build", "card", "splits")


def _code_digest() -> str:
    """SHA-256 of the source that makes the world: a changed recipe makes another world."""
    files = [Path(__file__).with_name(f"{name}.py") for name in CODE]
    return hashlib.sha256(b"".join(f.name.encode() + f.read_bytes() for f in files)).hexdigest()


def _claim(root: Path, key: dict[str, Any]) -> None:
    """Take over a folder of the same arguments, clear one of other arguments, refuse one that is not ours."""
    mark = root / ".stages" / "key.json"
    if mark.exists():
        if json.loads(mark.read_text()) == key:
            return
        for old in (*root.glob("*.jsonl"), root / "world.json", root / "README.md"):
            old.unlink(missing_ok=True)
        shutil.rmtree(root / "media", ignore_errors=True)
        shutil.rmtree(root / ".stages")
    elif root.exists() and any(root.iterdir()):
        raise WorldError(f"{root} holds files that are not a sample world; name an empty or a new folder")
    mark.parent.mkdir(parents=True)
    _write(mark, json.dumps(key))


def _done(root: Path, stage: str) -> bool:
    return (root / ".stages" / stage).exists()


def _mark(root: Path, stage: str) -> None:
    (root / ".stages" / stage).touch()


def _write(path: Path, content: str) -> None:
    """All of the file or none of it."""
    draft = path.with_name(path.name + ".part")
    draft.write_text(content, encoding="utf-8", newline="\n")
    draft.replace(path)


def _size(counts: dict[str, int], split: str, scale: float) -> int:
    return max(10, round(counts[split] * share(split, scale)))


def _png(path: Path, pixels: np.ndarray) -> None:
    from PIL import Image

    Image.fromarray(pixels).save(path, format="PNG")


def _digits(root: Path, material: Material, write: bool) -> None:
    """Scans, distorted training copies, halves and canvases."""
    scans = digits.load_scans(material.seed, material.scale)
    for number, split in enumerate(SPLITS):
        draw = np.random.default_rng([material.seed, 4, number])
        there = scans[split]
        for kind in ("digits", "halves", "canvases"):
            (root / "media" / kind / split).mkdir(parents=True, exist_ok=True)
        pictures = [
            (f"media/digits/{split}/{i:04d}.png", p, int(d)) for i, p, d in zip(there.index, there.pixels, there.labels)
        ]
        material.scans[split] = len(pictures)
        if split == "train":
            for copy in range(COPIES):
                for i in range(len(there)):
                    path = f"media/digits/{split}/{there.index[i]:04d}-{copy}.png"
                    pictures.append((path, digits.distort(there.pixels[i], draw), int(there.labels[i])))
        halves = []
        for path, pixels, digit in pictures:
            stem = path.replace("digits", "halves").removesuffix(".png")
            halves.append((f"{stem}-top.png", f"{stem}-bottom.png", digit))
            if write:
                _png(root / halves[-1][0], pixels[:4])
                _png(root / halves[-1][1], pixels[4:])
        canvases = []
        for i in range(_size(CANVASES, split, material.scale)):
            rows = draw.integers(0, len(pictures), 2 + i % 3)
            canvases.append((f"media/canvases/{split}/{i:05d}.png", tuple(pictures[r][2] for r in rows)))
            if write:
                _png(root / canvases[-1][0], digits.side_by_side([pictures[r][1] for r in rows]))
        if write:
            for path, pixels, _ in pictures:
                _png(root / path, pixels)
        material.images[split] = [(path, digit) for path, _, digit in pictures]
        material.halves[split], material.canvases[split] = halves, canvases


def _videos(root: Path, material: Material, write: bool) -> None:
    """Every direction equally often; the films of a split show its own scans."""
    from PIL import Image

    for number, split in enumerate(SPLITS):
        draw = np.random.default_rng([material.seed, 6, number])
        films = []
        for i in range(_size(VIDEOS, split, material.scale)):
            path, digit = material.images[split][int(draw.integers(len(material.images[split])))]
            with Image.open(root / path) as picture:
                clip = video.move(np.asarray(picture), video.DIRECTIONS[i % 8], draw)
            folder = f"media/videos/{split}/{i:05d}"
            if write:
                (root / folder).mkdir(parents=True, exist_ok=True)
                for k, frame in enumerate(clip.frames):
                    _png(root / folder / f"{k}.png", frame)
            films.append((folder, clip.times_s, digit, clip.direction))
        material.videos[split] = films


def _speech(root: Path, material: Material, write: bool) -> None:
    material.clips = speech.plan(material.seed, material.scale)
    if write:
        speech.record([clip for sets in material.clips.values() for clips in sets.values() for clip in clips], root)


def _returns(root: Path, material: Material, write: bool) -> None:
    """Mean return of random and of expert play, the ends of the normalised return."""
    if write:
        episodes = max(5, round(100 * material.scale))
        found = {name: {**measure(name, episodes), "episodes": episodes} for name in PLANTS}
        _write(root / ".stages" / "returns.json", json.dumps(found))


def _documents(root: Path, material: Material, write: bool) -> None:
    """Manifests, world.json and the data card."""
    if not write:
        return
    weights, sources = mixture(), {}
    for name in RECIPES:
        counts = {split: _manifest(root / f"{name}.{split}.jsonl", documents(name, split, material)) for split in SPLITS}
        sources[name] = {"documents": counts, "weight": weights[name], "share": RECIPES[name].share}
    world = {
        "seed": material.seed,
        "scale": material.scale,
        "sources": sources,
        "control": json.loads((root / ".stages" / "returns.json").read_text()),
        "plants": {name: asdict(plant) for name, plant in PLANTS.items()},
        "versions": {"python": platform.python_version(), **{p: _version(p) for p in PACKAGES}},
        "prose_sha256": prose_digest(),
    }
    _write(root / "world.json", json.dumps(world, indent=1))
    _write(root / "README.md", data_card(world))


PACKAGES = ("numpy", "scipy", "scikit-learn", "gymnasium", "espeakng-loader", "soundfile", "pillow")


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _manifest(path: Path, lines: Iterable[dict[str, Any]]) -> int:
    """Write the lines, or no file where there is none; returns how many."""
    texts = [json.dumps(line, separators=(",", ":")) for line in lines]
    if texts:
        _write(path, "\n".join(texts) + "\n")
    return len(texts)
