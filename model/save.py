"""Weights on disk: a folder with `model.safetensors` and `config.json`, readable without trusting whoever wrote it.

Out: two files, no pickle. In: the folder; before any tensor is allocated the config passes its bounds, and the names, shapes
and types in the file's header are compared with what the config implies (`count.param_shapes`).
"""

from __future__ import annotations

import json
import math
import os
import struct
from pathlib import Path
from typing import Any

import torch

from weft.model.config import ConfigError, ModelConfig
from weft.model.count import buffer_shapes, param_shapes
from weft.model.hub import fetch, is_hub_id
from weft.model.transformer import Transformer

CONFIG, WEIGHTS = "config.json", "model.safetensors"
MAX_JSON = 2**20
MAX_DEPTH = 16
MAX_HEADER = 100 * 2**20  # the limit of safetensors itself
DTYPES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}


class SaveError(OSError):
    """A model folder cannot be written or read: missing file, damaged header, or tensors that do not fit the config."""


def save_pretrained(model: Transformer, folder: str | Path) -> None:
    """Write `folder/model.safetensors` and `folder/config.json`; each file appears whole or not at all."""
    from safetensors.torch import save_file

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"model": "weft", **model.config.to_dict()}, indent=2)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    staged = folder / f".{WEIGHTS}.tmp"
    save_file(tensors, staged, metadata={"format": "pt"})
    os.replace(staged, folder / WEIGHTS)
    staged = folder / f".{CONFIG}.tmp"
    staged.write_text(text + "\n", encoding="ascii")
    os.replace(staged, folder / CONFIG)


def from_pretrained(
    folder: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype | None = None, revision: str | None = None
) -> Transformer:
    """The model of a folder, in evaluation mode. `dtype` None keeps the stored type.

    `folder` may be a hub repository `owner/name` (extra `hub`), of which `revision` names a branch, tag or commit.
    Raises `SaveError` for a missing, damaged or unfitting file, `ConfigError` for a config that cannot be built, and `HubError`
    where a hub does not give the repository.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    folder = fetch(str(folder), revision) if is_hub_id(folder) else Path(folder)
    config = read_config(folder / CONFIG)
    check_weights(folder / WEIGHTS, config)
    with torch.device("meta"):
        model = Transformer(config)
    try:
        tensors = load_file(folder / WEIGHTS, device=str(device))
    except SafetensorError as error:  # tensors that overlap or leave gaps
        raise SaveError(f"{folder / WEIGHTS} cannot be read ({error}); the file is damaged, fetch it again") from None
    if dtype is not None:
        tensors = {name: t if name.endswith("mlp.bias") else t.to(dtype) for name, t in tensors.items()}
    model.load_state_dict(tensors, assign=True)
    return model.eval()


def read_config(path: Path) -> ModelConfig:
    """Parse a config file of at most 1 MiB and 16 levels. Raises `SaveError` or `ConfigError`."""
    text = _read_small(path)
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise SaveError(f"{path} is not valid JSON ({error}); the folder is damaged or not a model") from None
    if not isinstance(values, dict) or _depth(values) > MAX_DEPTH:
        raise ConfigError(f"{path} must hold one object nested at most {MAX_DEPTH} deep")
    if values.pop("model", "weft") != "weft":
        raise ConfigError(f"{path} describes another kind of model; weft reads folders that weft has saved")
    return ModelConfig.from_dict(values)


def _read_small(path: Path) -> str:
    try:
        with open(path, "rb") as file:
            raw = file.read(MAX_JSON + 1)
    except OSError as error:
        raise SaveError(f"cannot read {path}: {error.strerror}; a model folder holds {CONFIG} and {WEIGHTS}") from None
    if len(raw) > MAX_JSON:
        raise SaveError(f"{path} is larger than {MAX_JSON} bytes; no model config is")
    return raw.decode("utf-8", errors="replace")


def _depth(values: dict[str, Any]) -> int:
    """Levels of nesting, without recursion."""
    level: list[Any] = [values]
    depth = 0
    while level and depth <= MAX_DEPTH:
        depth += 1
        nested = [v for v in level if isinstance(v, (dict, list))]
        level = [v for outer in nested for v in (outer.values() if isinstance(outer, dict) else outer)]
        level = [v for v in level if isinstance(v, (dict, list))]
    return depth


def check_weights(path: Path, config: ModelConfig) -> None:
    """Compare the header of a safetensors file with the config; nothing but the header is read. Raises `SaveError`."""
    header, size = _read_header(path)
    needed = {**param_shapes(config), **buffer_shapes(config)}
    names = {name for name in header if name != "__metadata__"}
    if names != set(needed):
        odd = sorted(names.symmetric_difference(needed))[0]
        word = "lacks" if odd in needed else "has the unknown tensor"
        raise SaveError(f"{path} {word} {odd!r}; its tensors do not fit its config")
    for name, shape in needed.items():
        entry = header[name]
        if not isinstance(entry, dict) or entry.get("shape") != list(shape) or entry.get("dtype") not in DTYPES:
            raise SaveError(f"{path}: {name} must be a float tensor of shape {list(shape)}, the header says {entry!r}")
        begin, end = _offsets(entry)
        if end - begin != math.prod(shape) * DTYPES[entry["dtype"]] or not 0 <= begin <= end <= size:
            raise SaveError(f"{path}: {name} lies at bytes {begin}..{end} of {size}; the file is cut short or damaged")


def _offsets(entry: dict[str, Any]) -> tuple[int, int]:
    """First and last byte of a tensor; an impossible pair where the header gives no two integers."""
    stated = entry.get("data_offsets")
    if not isinstance(stated, list) or len(stated) != 2 or any(type(at) is not int for at in stated):
        return 0, -1
    return stated[0], stated[1]


def _read_header(path: Path) -> tuple[dict[str, Any], int]:
    try:
        with open(path, "rb") as file:
            prefix = file.read(8)
            length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else -1
            if not 0 < length <= MAX_HEADER:
                raise SaveError(f"{path}: header of {length} bytes is not that of a safetensors file; fetch the file again")
            header = json.loads(file.read(length))
            size = os.fstat(file.fileno()).st_size - 8 - length
    except OSError as error:
        if isinstance(error, SaveError):
            raise
        raise SaveError(f"cannot read {path}: {error.strerror}; a model folder holds {CONFIG} and {WEIGHTS}") from None
    except (ValueError, RecursionError):
        raise SaveError(f"{path}: the header is not JSON; the file is cut short or damaged") from None
    if not isinstance(header, dict):
        raise SaveError(f"{path}: the header is not an object; the file is damaged")
    return header, size
