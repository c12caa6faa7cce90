"""Minari datasets (offline control) as records: one episode is one document, observations first, the actions as target.

`minari:NAME_OR_FOLDER`. Every entry of a Dict or Tuple observation is a segment of its own: numbers a sensor, pictures a
video, texts a text (an instruction). The last observation of an episode, which no action follows, is kept.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from weft.training.data import minari_files
from weft.training.data.prepare import PrepareError
from weft.training.data.records import Record
from weft.training.data.source import Source, origin_of
from weft.training.random import uniform


def minari_source(where: str, *, name: str | None = None, rate_hz: float | None = None, val_share: float = 0.0) -> Source:
    """Episodes at `rate_hz` steps per second (10 if not given); `val_share` of them, by their number, are held out."""
    folder, title = _find(where), name or Path(where).name
    clock_hz = 10.0 if rate_hz is None else rate_hz
    if not clock_hz > 0:
        raise PrepareError(f"rate_hz={rate_hz} of {where} must be above 0 steps per second")
    about = minari_files.facts(folder)
    task, space = str(about.get("dataset_id") or title), about.get("action_space")

    def records() -> Iterator[Record]:
        for line, (number, episode) in enumerate(minari_files.episodes(folder, about), start=1):
            split = "val" if uniform(0, "split", title, line) < val_share else "train"
            yield episode_record(line, f"{folder} episode {number}", episode, title, task, split, clock_hz, space)

    files = sorted(f for f in (folder / "data").rglob("*") if f.is_file())
    return Source(records, origin_of("minari", files, name=title, rate_hz=clock_hz, val_share=val_share))


def _find(where: str) -> Path:
    root = Path(os.environ.get("MINARI_DATASETS_PATH") or Path.home() / ".minari" / "datasets")
    for folder in (Path(where), root / where):
        if minari_files.layout(folder):
            return folder
    raise PrepareError(
        f"{where} has no data/main_data.hdf5 and no episodes as .arrow or .parquet, here or under {root}; "
        f"download it with `minari download {where}`"
    )


def episode_record(
    line: int,
    where: str,
    episode: dict[str, Any],
    source: str,
    task: str,
    split: str,
    rate_hz: float,
    space: dict[str, Any] | None = None,
) -> Record:
    """One episode of `minari_files.episodes` as a manifest object with arrays; frames of pictures are its blobs."""
    blobs: dict[str, bytes] = {}
    try:
        clock = {"start_s": 0.0, "rate_hz": float(rate_hz)}
        segments: list[dict[str, Any]] = []
        for key, leaf in sorted(_leaves(episode["observations"])):
            segments += _observed(key, leaf, f"{source}.{key}", clock, blobs)
        values, declared = _actions(episode["actions"], space)
        segments.append({"action": values, "space": declared, "role": "target", "name": "action", **clock})
        rewards = np.asarray(episode.get("rewards", []), np.float64)
        facts = {"task": task, "return": round(float(rewards.sum()), 6), "steps": len(values)}
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        return Record(line, where, {"id": str(line)}, error=f"{where} is no episode that can be read: {error}")
    spec = {"id": f"{source}-{line - 1}", "source": source, "split": split, "metadata": facts, "segments": segments}
    return Record(line, where, spec, blobs=blobs)


def _leaves(tree: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """(`camera.left`, leaf) of nested dicts; one leaf alone is called observation."""
    if not isinstance(tree, dict):
        yield name or "observation", tree
        return
    for key, inner in tree.items():
        yield from _leaves(inner, f"{name}.{key}" if name else str(key))


def _observed(key: str, leaf: Any, kind: str, clock: dict[str, float], blobs: dict[str, bytes]) -> list[dict[str, Any]]:
    """The segments of one observation: texts where they change, frames as a video, numbers as a sensor."""
    common = {"name": key, "role": "observed"}
    if isinstance(leaf, list) and leaf and isinstance(leaf[0], str):
        changes = [i for i, text in enumerate(leaf) if i == 0 or text != leaf[i - 1]]
        return [{"text": leaf[i], "start_s": i / clock["rate_hz"], **common} for i in changes if leaf[i]]
    if isinstance(leaf, list) and leaf and isinstance(leaf[0], bytes):
        frames = {f"{key}.{i}.jpg": data for i, data in enumerate(leaf)}
        blobs.update(frames)
        return [{"video": list(frames), **common, **clock}]
    array = np.asarray(leaf)
    if array.dtype == np.uint8 and array.ndim in (3, 4) and min(array.shape[1:3]) >= minari_files.IMAGE_SIDE:
        return [{"video": array, **common, **clock}]
    if array.dtype.kind not in "buif" or not array.size:
        raise ValueError(f"observation {key!r} has dtype {array.dtype} and shape {array.shape}; numbers are needed")
    return [{"sensor": array.reshape(len(array), -1).astype(np.float32), "kind": kind, **common, **clock}]


def _actions(actions: Any, space: dict[str, Any] | None) -> tuple[np.ndarray, dict[str, Any]]:
    """(values, space). Discrete ids from 0; else a table within finite bounds, whole numbers in each column included."""
    if isinstance(actions, (dict, list)):
        raise ValueError("actions are a dictionary or text; only one flat space of actions can be read")
    space = space or {}
    values = np.asarray(actions)
    if values.dtype.kind in "bui" and (values.ndim == 1 or values[0].size == 1) and space.get("type") != "MultiBinary":
        ids = values.reshape(-1).astype(np.int64) - int(np.ravel(space.get("start") or 0)[0])
        count = space.get("n") or np.ravel(space.get("nvec") or [0])[0] or int(ids.max()) + 1
        return ids, {"n": int(count)}
    table = values.reshape(len(values), -1).astype(np.float64)
    low, high = _bounds(space, table.shape[1])
    if len(low) == len(high) == table.shape[1] and np.isfinite([low, high]).all():
        return table, {"low": low.tolist(), "high": high.tolist()}
    raise ValueError(
        f"actions are continuous and the dataset does not state finite bounds for their {table.shape[1]} dimensions"
    )


def _bounds(space: dict[str, Any], dims: int) -> tuple[np.ndarray, np.ndarray]:
    """float64 [dims] each, or empty where the space states none."""
    if space.get("type") == "MultiBinary":
        return np.zeros(dims), np.ones(dims)
    if space.get("nvec") is not None:
        low = np.ravel(np.asarray(space.get("start") or np.zeros(dims), np.float64))
        return low, low + np.ravel(np.asarray(space["nvec"], np.float64)) - 1
    low, high = (np.asarray([] if space.get(k) is None else space[k], np.float64).reshape(-1) for k in ("low", "high"))
    return low, high
