"""Minari datasets (offline control) as records: one episode is one document of a sensor and an action segment.

`minari:NAME_OR_FOLDER`. The HDF5 layout is read with h5py, without the minari package: `data/main_data.hdf5` with groups
`episode_N` that hold observations, actions and rewards, and `data/metadata.json`. Arrays and flat dicts of observations are
understood; the last observation of an episode, which no action follows, is kept.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from weft.training.data.prepare import PrepareError
from weft.training.data.records import Record
from weft.training.data.source import Source, origin_of
from weft.training.random import uniform

MISSING = "reading Minari data needs h5py: pip install h5py (or minari[hdf5])"


def minari_source(where: str, *, name: str | None = None, rate_hz: float | None = None, val_share: float = 0.0) -> Source:
    """Episodes at `rate_hz` steps per second (10 if not given); `val_share` of them, by their number, are held out."""
    folder, title = _find(where), name or Path(where).name
    clock_hz = rate_hz or 10.0
    if not clock_hz > 0:
        raise PrepareError(f"rate_hz={rate_hz} of {where} must be above 0 steps per second")

    def records() -> Iterator[Record]:
        task, space = title, None
        try:
            facts = json.loads((folder / "data" / "metadata.json").read_text())
            task = str(facts.get("dataset_id") or title)
            space = (
                json.loads(facts["action_space"]) if isinstance(facts.get("action_space"), str) else facts.get("action_space")
            )
        except (OSError, ValueError, KeyError):
            pass  # older versions keep it in the HDF5 attributes
        for line, episode in enumerate(_episodes(folder), start=1):
            split = "val" if uniform(0, "split", title, line) < val_share else "train"
            yield episode_record(line, f"{folder} episode {line - 1}", episode, title, task, split, clock_hz, space)

    files = sorted(f for f in (folder / "data").rglob("*") if f.is_file())
    return Source(records, origin_of("minari", files, name=title, rate_hz=clock_hz, val_share=val_share))


def _find(where: str) -> Path:
    import os

    root = Path(os.environ.get("MINARI_DATASETS_PATH") or Path.home() / ".minari" / "datasets")
    for folder in (Path(where), root / where):
        if (folder / "data" / "main_data.hdf5").is_file():
            return folder
    raise PrepareError(f"{where} has no data/main_data.hdf5, here or under {root}; download it with `minari download {where}`")


def _episodes(folder: Path) -> Iterator[dict[str, Any]]:
    try:
        import h5py
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(MISSING) from error
    with h5py.File(folder / "data" / "main_data.hdf5", "r") as file:
        groups = [k for k in file if k.startswith("episode_")]
        for key in sorted(groups, key=lambda k: int(k.removeprefix("episode_"))):
            yield {name: _tree(file[key][name]) for name in ("observations", "actions", "rewards") if name in file[key]}


def _tree(node: Any) -> Any:
    """A dataset as an array, a group as a dict."""
    return {k: _tree(node[k]) for k in node} if hasattr(node, "keys") else np.asarray(node)


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
    """One episode {"observations" [N+1 ...], "actions" [N ...], "rewards" [N]} as a manifest object with arrays.

    Every observation channel is one sensor channel; flat dicts give one segment per key. Actions are the target.
    """
    try:
        observations = episode["observations"]
        flat = observations if isinstance(observations, dict) else {"observation": observations}
        actions = np.asarray(episode["actions"])
        if actions.dtype.kind in "bui":
            actions = actions.astype(np.int64) - int((space or {}).get("start") or 0)
        clock = {"start_s": 0.0, "rate_hz": float(rate_hz)}
        segments = [
            {"sensor": _table(array), "kind": f"{source}.{key}", "name": key, "role": "observed", **clock}
            for key, array in sorted(flat.items())
        ]
        segments.append(
            {"action": _discrete(actions), "space": _space(actions, space), "role": "target", "name": "action", **clock}
        )
        rewards = np.asarray(episode.get("rewards", []), np.float64)
        facts = {"task": task, "return": round(float(rewards.sum()), 6), "steps": len(actions)}
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        return Record(line, where, {"id": str(line)}, error=f"{where} is no episode of flat observations and actions: {error}")
    return Record(
        line, where, {"id": f"{source}-{line - 1}", "source": source, "split": split, "metadata": facts, "segments": segments}
    )


def _table(array: Any) -> np.ndarray:
    """float32 [N channels]."""
    array = np.asarray(array)
    if array.dtype.kind not in "buif" or not array.size:
        raise ValueError(f"observations of dtype {array.dtype} and shape {array.shape}")
    return array.reshape(len(array), -1).astype(np.float32)


def _discrete(actions: np.ndarray) -> np.ndarray:
    return actions.reshape(-1).astype(np.int64) if actions.dtype.kind in "bui" else actions.reshape(len(actions), -1)


def _space(actions: np.ndarray, space: dict[str, Any] | None) -> dict[str, Any]:
    """The declared space where the dataset tells it (with finite bounds), else what the episode's own actions span."""
    if actions.dtype.kind in "bui":
        return {"n": int((space or {}).get("n") or actions.max() + 1)}
    table = actions.reshape(len(actions), -1)
    low, high = (np.asarray((space or {}).get(k) or [], np.float64).reshape(-1) for k in ("low", "high"))
    if len(low) == len(high) == table.shape[1] and np.isfinite([low, high]).all():
        return {"low": low.tolist(), "high": high.tolist()}
    raise ValueError(
        f"actions are continuous and the dataset does not state finite bounds for their {table.shape[1]} dimensions"
    )
