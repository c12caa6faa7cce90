"""What every tokenizer writes and reads: one JSON file and, where there are arrays, one safetensors file.

A tokenizer's state is `(settings, arrays)`: plain JSON values and named numpy arrays. Its digest is over both.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

Arrays = dict[str, np.ndarray]
Config = TypeVar("Config")


class TokenizerError(ValueError):
    """A tokenizer was asked for what it cannot do, or its files do not fit together."""


def write(folder: Path, settings: dict[str, Any], arrays: Arrays | None = None) -> None:
    """Write `tokenizer.json` and, if there are arrays, `tokenizer.safetensors` into `folder`."""
    from safetensors.numpy import save_file

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(settings, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    if arrays:
        save_file({k: np.ascontiguousarray(v) for k, v in arrays.items()}, folder / "tokenizer.safetensors")


def read(folder: Path, modality: str) -> tuple[dict[str, Any], Arrays]:
    """Read what `write` wrote; the settings must say that they are a `modality` tokenizer."""
    from safetensors.numpy import load_file

    folder = Path(folder)
    try:
        settings = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
        at = folder / "tokenizer.safetensors"
        arrays = dict(load_file(at)) if at.exists() else {}
    except FileNotFoundError as error:
        raise TokenizerError(f"{folder} holds no tokenizer.json; save the {modality} tokenizer there first") from error
    except Exception as error:
        raise TokenizerError(f"{folder} is not a readable {modality} tokenizer ({error}); save it again") from error
    found = settings.get("modality") if isinstance(settings, dict) else None
    if found != modality:
        raise TokenizerError(f"{folder} holds a {found!r} tokenizer, a {modality!r} one is needed")
    return settings, arrays


def digest(settings: dict[str, Any], arrays: Arrays | None = None) -> str:
    """SHA-256 over the settings and every array's name, dtype, shape and bytes."""
    total = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for name, array in sorted((arrays or {}).items()):
        total.update(f"{name} {array.dtype} {array.shape}".encode())
        total.update(np.ascontiguousarray(array).tobytes())
    return total.hexdigest()


def config_from(kind: type[Config], values: Any, where: str) -> Config:
    """The frozen config dataclass `kind` from a JSON object; an unknown key is an error."""
    if not isinstance(values, dict):
        raise TokenizerError(f"{where}: config is {type(values).__name__}, a JSON object is needed")
    known = {f.name for f in fields(kind)}  # type: ignore[arg-type]
    if unknown := sorted(set(values) - known):
        raise TokenizerError(f"{where}: unknown config key {unknown[0]!r}; known are {', '.join(sorted(known))}")
    try:
        return kind(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})
    except TypeError as error:
        raise TokenizerError(f"{where}: {error}") from error


def checked_codes(codes: Any, size: int, grid: tuple[int, ...], what: str, extra: int = 0) -> np.ndarray:
    """int64 [n] codes that fill `grid` and lie in [0, size + extra)."""
    codes = np.asarray(codes)
    if codes.size and codes.dtype.kind not in "iu":
        raise TokenizerError(f"{what} codes are {codes.dtype}, integers are needed")
    codes = codes.astype(np.int64).reshape(-1)
    need = int(np.prod(grid)) if len(grid) else 0
    if any(not isinstance(side, int | np.integer) or side < 0 for side in grid) or len(codes) != need:
        raise TokenizerError(f"{what} grid {tuple(grid)} needs {need} codes, got {len(codes)}")
    if len(codes) and not (codes.min() >= 0 and codes.max() < size + extra):
        bad = int(codes[(codes < 0) | (codes >= size + extra)][0])
        raise TokenizerError(f"{what} code {bad} is outside the span of {size + extra}; decode only codes of this tokenizer")
    return codes
