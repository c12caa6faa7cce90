"""Minari's layouts on disk, read without the minari package: episodes as arrays, texts and JPEG frames.

    data/metadata.json                          format, action and observation space
    data/main_data.hdf5                         groups episode_N (h5py)
    data/N/*.arrow, data/N/*.parquet            one row per observation (pyarrow); the last actions and rewards are padding

An episode is {"observations" [N+1 ...], "actions" [N ...], "rewards" [N]}, dictionaries and tuples of spaces as nested
dicts. A leaf is an array, a list of str (a text space), or a list of bytes (JPEG frames, as Minari stores images).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from weft.training.data.prepare import PrepareError

NAMES = ("observations", "actions", "rewards")
SUFFIXES = {"arrow": ".arrow", "parquet": ".parquet"}
IMAGE_SIDE = 32
"""Pixels: Minari stores smaller uint8 grids as numbers, not as JPEG."""


def facts(folder: Path) -> dict[str, Any]:
    """`data/metadata.json`, its spaces as objects; {} for data of early versions that have none."""
    path = folder / "data" / "metadata.json"
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        for name in ("observation_space", "action_space"):
            if isinstance(found.get(name), str):
                found[name] = json.loads(found[name])
    except (OSError, ValueError, AttributeError) as error:
        raise PrepareError(f"{path} is no Minari metadata ({error}); download the dataset again") from error
    return found


def layout(folder: Path) -> str | None:
    """hdf5, arrow or parquet; None if the folder is no Minari dataset."""
    data = folder / "data"
    if (data / "main_data.hdf5").is_file():
        return "hdf5"
    return next((name for name, suffix in SUFFIXES.items() if any(data.glob(f"[0-9]*/*{suffix}"))), None)


def episodes(folder: Path, about: Mapping[str, Any]) -> Iterator[tuple[int, dict[str, Any]]]:
    """(number, episode) in the order of the numbers."""
    kind = layout(folder)
    return _hdf5(folder, about) if kind == "hdf5" else _columns(folder, about, str(kind))


def _spaces(about: Mapping[str, Any]) -> dict[str, Any]:
    return {"observations": about.get("observation_space"), "actions": about.get("action_space")}


def _below(space: Any, key: str) -> Any:
    """The space of one entry of a Dict or Tuple space."""
    inside = space.get("subspaces") if isinstance(space, Mapping) else None
    if isinstance(inside, Mapping):
        return inside.get(key)
    return inside[int(key)] if isinstance(inside, list) and key.isdigit() and int(key) < len(inside) else None


def is_image(space: Any) -> bool:
    """Whether Minari stores this space as JPEG frames."""
    shape = (space or {}).get("shape") or []
    return (space or {}).get("dtype") == "uint8" and len(shape) in (2, 3) and min(shape[:2]) >= IMAGE_SIDE


# -- HDF5


def _hdf5(folder: Path, about: Mapping[str, Any]) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        import h5py
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "Minari's HDF5 layout is read with h5py, which is missing; pip install 'weft[minari]'"
        ) from error
    spaces = _spaces(about)
    path = folder / "data" / "main_data.hdf5"
    try:
        with h5py.File(path, "r") as file:
            numbers = sorted(int(k.removeprefix("episode_")) for k in file if k.startswith("episode_"))
            for number in numbers:
                group = file[f"episode_{number}"]
                yield number, {name: _node(group[name], spaces.get(name)) for name in NAMES if name in group}
    except OSError as error:
        raise PrepareError(f"{path} is no readable HDF5 file ({error}); download the dataset again") from error


def _node(node: Any, space: Any) -> Any:
    """A group as a dict, a dataset as a leaf."""
    if hasattr(node, "keys"):
        return {k.removeprefix("_index_"): _node(node[k], _below(space, k.removeprefix("_index_"))) for k in node}
    values = node[()]
    if values.dtype.kind in "OS" and len(values) and isinstance(values[0], (bytes, str)):
        return [v.decode("utf-8") if isinstance(v, bytes) else v for v in values]
    if is_image(space) and values.ndim <= 2:  # encoded: [N] of byte arrays, or [N bytes] where all are of one length
        return [np.asarray(v, np.uint8).tobytes() for v in values]
    return np.asarray(values)


# -- Arrow and Parquet


def _columns(folder: Path, about: Mapping[str, Any], kind: str) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        import pyarrow as pa
        import pyarrow.dataset
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"Minari's {kind} layout is read with pyarrow, which is missing; pip install 'weft[data]'"
        ) from error
    spaces = _spaces(about)
    for number in sorted(int(p.name) for p in (folder / "data").iterdir() if p.is_dir() and p.name.isdigit()):
        files = sorted(str(p) for p in (folder / "data" / str(number)).glob(f"*{SUFFIXES[kind]}"))
        try:
            table = pyarrow.dataset.dataset(files, format=kind).to_table()
            found = {n: _column(table[n].combine_chunks(), spaces.get(n)) for n in NAMES if n in table.column_names}
        except (OSError, pa.ArrowException) as error:
            raise PrepareError(f"{folder}/data/{number} is no readable {kind} episode ({error}); download it again") from error
        yield number, {n: value if n == "observations" else _without_last(value) for n, value in found.items()}


def _column(array: Any, space: Any) -> Any:
    """One Arrow column as a leaf, a struct as a dict."""
    import pyarrow as pa

    kind = array.type
    if pa.types.is_struct(kind):
        return {field.name: _column(array.field(i), _below(space, field.name)) for i, field in enumerate(kind)}
    if pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_string(kind) or pa.types.is_large_string(kind):
        return array.to_pylist()
    if pa.types.is_fixed_size_list(kind):
        shape = (space or {}).get("shape") or [kind.list_size]
        return array.flatten().to_numpy(zero_copy_only=False).reshape(len(array), *shape)
    return array.to_numpy(zero_copy_only=False)


def _without_last(value: Any) -> Any:
    """No action follows the last observation: Minari fills the row up."""
    return {k: _without_last(v) for k, v in value.items()} if isinstance(value, dict) else value[:-1]
