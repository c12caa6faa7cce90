"""One folder that inference loads, from a run or any of its checkpoints: `config.json model.safetensors tokenizer/
manifest.json`.

Checkpoints are whole by design, whatever engine and however many ranks wrote them, so an export is a verified copy: without
moments, with adapters merged, optionally with the averaged weights or in bfloat16.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import load_file, save_file

from weft.training.checkpoint import CheckpointError, newest_valid, publish, read_json, verify
from weft.training.finetune import merged

_COPIED = ("config.json", "tokenizer")


def find(source: Path) -> Path:
    """The folder to export: `source` itself if it is sealed, else the newest valid checkpoint of a run."""
    if (source / "manifest.json").exists():
        verify(source)
        return source
    found = newest_valid(source / "checkpoints")
    if found is None:
        raise CheckpointError(
            f"{source} holds neither a sealed model nor a valid checkpoint; point to a run or to one of its checkpoints"
        )
    return found


def export(source: str | Path, out: str | Path, dtype: Literal["keep", "fp32", "bf16"] = "keep", average: bool = False) -> Path:
    """Write `out` from a run folder, a checkpoint or `final/`; returns `out`. Raises `CheckpointError` or `FileExistsError`."""
    folder, out = find(Path(source)), Path(out)
    if out.exists() and any(out.iterdir()):
        raise FileExistsError(f"{out} is not empty; choose another folder or remove it")
    weights = load_file(folder / "model.safetensors")
    if average:
        if not (folder / "ema.safetensors").exists():
            raise CheckpointError(f"{folder} holds no average of the weights; train with checkpoint.ema or leave --average out")
        tuned = read_json(folder / "trainer.json")["config"]["finetune"]
        weights.update(merged(load_file(folder / "ema.safetensors"), tuned["alpha"] / tuned["rank"]))
    if dtype != "keep":
        to = torch.bfloat16 if dtype == "bf16" else torch.float32
        weights = {
            k: v if k.endswith("mlp.bias") else v.to(to) for k, v in weights.items()
        }  # the selection bias moves by 0.001

    def write(draft: Path) -> None:
        save_file(weights, draft / "model.safetensors", metadata={"format": "pt"})
        for name in _COPIED:
            if (folder / name).is_dir():
                shutil.copytree(folder / name, draft / name)
            elif (folder / name).exists():
                shutil.copy2(folder / name, draft / name)

    size = sum(t.numel() * t.element_size() for t in weights.values())
    return publish(out, write, needed_bytes=size)
