"""A checkpoint folder in, a `Generalist` out; and back.

    config.json  model.safetensors  tokenizer/  manifest.json (SHA-256 of every file)

A run folder works as well: its `final/`, else its newest checkpoint. Nothing is downloaded unless the name is no folder and
looks like a hub repository; nothing is unpickled; no code is read from the folder.
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from weft.inference.compiled import CompiledModel
from weft.inference.errors import CheckpointError
from weft.inference.feed import extend, part_of
from weft.inference.paged import PagedModel
from weft.inference.quantize import KINDS, quantize_weights
from weft.model.cache import CacheError
from weft.model.config import ConfigError, ModelConfig, resamplers
from weft.model.hub import HubError, fetch, is_hub_id
from weft.model.paged import is_paged
from weft.model.save import SaveError, from_pretrained, save_pretrained
from weft.model.transformer import Transformer
from weft.tokenizers.bundle import StreamTokenizer, TokenizerMismatch
from weft.tokenizers.stream import join

if TYPE_CHECKING:
    from weft.inference.generalist import Generalist

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
MANIFEST = "manifest.json"


def load(
    path: str | Path,
    device: str = "auto",
    dtype: str | torch.dtype = "auto",
    quantize: str | None = None,
    verify: bool = True,
    compile: bool = False,
    cache: str | None = None,
) -> Generalist:
    """A model with its tokenizers, ready to use.

    `path`: a checkpoint folder, a run folder, or a hub id `owner/name` (extra `hub`). `device` "auto" takes a GPU if there is
    one. `dtype` "auto" keeps the stored type. `quantize` "int8" or "int4" stores matrices in 8 or 4 bits, `compile` makes one
    compiled function of a decoding step (a CUDA graph on a GPU); docs/inference.md has what they save and cost.
    `cache` "paged" keeps documents' keys in pages while they are decoded (`paged.py`); None asks WEFT_CACHE, then "document".
    `verify` compares every file with the manifest. Raises `CheckpointError` saying which part is wrong and what to do.
    """
    from weft.inference.generalist import Generalist

    if quantize not in (None, *KINDS):
        raise CheckpointError(f"quantize={quantize!r} is not supported; use None, {' or '.join(map(repr, KINDS))}")
    folder = find(path)
    if verify:
        check_manifest(folder)
    try:
        tokenizer = StreamTokenizer.load(folder / "tokenizer")
    except (TokenizerMismatch, ValueError, OSError) as error:
        raise CheckpointError(f"{folder / 'tokenizer'} does not load: {error}") from error
    try:
        model = from_pretrained(folder, device=_device(device), dtype=_dtype(dtype))
    except (SaveError, ConfigError) as error:
        raise CheckpointError(f"{folder} does not load: {error}") from error
    check_fit(model.config, tokenizer, folder)
    if quantize:
        quantize_weights(model, quantize)
    _probe(model, tokenizer)
    return Generalist(_decoding(model, compile, cache), tokenizer, digest=_digest(folder / "model.safetensors", quantize))


def _decoding(model: Transformer, compile: bool, cache: str | None) -> Any:
    """The model as it decodes."""
    try:
        paged = is_paged(cache)
        if paged and compile:
            raise CheckpointError("compile=True and a paged cache are two ways to decode; choose one of them")
        return PagedModel(model) if paged else CompiledModel(model) if compile else model
    except CacheError as error:
        raise CheckpointError(f"the model cannot be decoded this way ({error}); load it with cache='document'") from error


def save(model: Transformer, tokenizer: StreamTokenizer, folder: str | Path) -> Path:
    """Write a checkpoint folder that `load` reads, with its manifest."""
    folder = Path(folder)
    check_fit(model.config, tokenizer, folder)
    save_pretrained(model, folder)
    tokenizer.save(folder / "tokenizer")
    files = [p for p in sorted(folder.rglob("*")) if p.is_file() and p.name != MANIFEST]
    entries = {p.relative_to(folder).as_posix(): {"bytes": p.stat().st_size, "sha256": sha256(p)} for p in files}
    (folder / MANIFEST).write_text(
        json.dumps({"format": 1, "files": entries}, indent=1, sort_keys=True) + "\n", encoding="utf-8"
    )
    return folder


def find(path: str | Path) -> Path:
    """The checkpoint folder that `path` means."""
    if not isinstance(path, str | Path):
        raise CheckpointError(f"path is a {type(path).__name__}; give a folder's name or a hub id owner/name")
    folder = Path(path)
    if (folder / "config.json").is_file():
        return folder
    if (folder / "final" / "config.json").is_file():
        return folder / "final"
    steps = [p for p in (folder / "checkpoints").glob("step-*") if (p / "config.json").is_file()]
    if steps:
        return max(steps, key=lambda p: int(re.sub(r"\D", "", p.name) or 0))
    # A mistyped name of a folder is not asked for on a network, where it may wait for minutes.
    if is_hub_id(path) and not folder.parent.is_dir():
        return _from_hub(str(path))
    what = "has no config.json" if folder.is_dir() else "does not exist"
    if is_hub_id(path):
        what += f" (no hub was asked, as there is a folder {folder.parent})"
    inside = [p for p in sorted(folder.glob("*/")) if (p / "final" / "config.json").is_file() or (p / "checkpoints").is_dir()]
    repair = f"perhaps you mean {inside[0]}" if inside else "give a folder with config.json, model.safetensors and tokenizer/"
    raise CheckpointError(f"{folder} {what}; {repair}, or a run folder")


def _from_hub(name: str) -> Path:
    try:
        return fetch(name)
    except HubError as error:
        raise CheckpointError(f"{name!r} is no folder here and {error}") from error


def check_manifest(folder: Path) -> None:
    """Compare every file with the SHA-256 that was written with it. A folder without a manifest passes."""
    path = folder / MANIFEST
    if not path.is_file():
        return
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))["files"]
        stated = {str(name): str(entry["sha256"]) for name, entry in entries.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} is damaged ({error}); copy the checkpoint again") from error
    for name, digest in stated.items():
        if not _needed(name):
            continue
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise CheckpointError(f"{path} names the file {name!r} outside its folder; do not use this checkpoint")
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder} lacks {name}, which its manifest lists; copy the checkpoint again")
        if (found := sha256(folder / name)) != digest:
            raise CheckpointError(
                f"{folder / name} has SHA-256 {found[:16]}, the manifest says {digest[:16]}; the file was changed or cut, "
                "copy the checkpoint again"
            )


def _needed(name: str) -> bool:
    """Optimizer state and logs in a training checkpoint are not read here."""
    return name in ("config.json", "model.safetensors") or name.startswith("tokenizer/")


def check_fit(config: ModelConfig, tokenizer: StreamTokenizer, folder: Path) -> None:
    """The model's sizes must be those of the tokenizer's vocabulary."""
    vocabulary = tokenizer.vocabulary
    pairs: list[tuple[str, Any, Any]] = [
        ("vocab_size", config.vocab_size, len(vocabulary)),
        ("output slices", config.slices, vocabulary.slices),
        ("resamplers", resamplers(config), tokenizer.resample()),
        ("feature sizes", config.feature_sizes, dict(sorted(tokenizer.feature_sizes().items()))),
    ]
    for name, of_model, of_tokenizer in pairs:
        if of_model != of_tokenizer:
            raise CheckpointError(
                f"{folder}: the model has {name} {of_model}, its tokenizer {of_tokenizer}; "
                "they were not saved together, restore the tokenizer/ of this model"
            )
    if config.num_modalities < len(vocabulary.modalities):
        raise CheckpointError(
            f"{folder}: the model knows {config.num_modalities} modalities, its tokenizer {len(vocabulary.modalities)}"
        )


def sha256(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _probe(model: Transformer, tokenizer: StreamTokenizer) -> None:
    """Two tokens through the model: a type that this device cannot compute in is refused here, not in the first call."""
    stream = join([tokenizer.builder().open(), tokenizer.builder().open()])
    try:
        with torch.inference_mode():
            extend(model, [model.new_cache()], [part_of(stream)])
    except RuntimeError as error:
        dtype = str(model.norm.weight.dtype).removeprefix("torch.")
        reason = str(error).splitlines()[0]
        raise CheckpointError(
            f"this model does not run in {dtype} on {model.device} ({reason}); use dtype='float32'"
        ) from error


def _digest(weights: Path, quantize: str | None) -> str:
    return sha256(weights) + (f"+{quantize}" if quantize else "")


def _device(device: str) -> str:
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise CheckpointError(f"device {device!r} is not usable here ({reason}); use device='cpu'") from None
    return device


def _dtype(dtype: str | torch.dtype) -> torch.dtype | None:
    if dtype == "auto":
        return None
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype not in DTYPES:
        raise CheckpointError(f"dtype {dtype!r} is unknown; use 'auto' or one of {', '.join(DTYPES)}")
    return DTYPES[dtype]
