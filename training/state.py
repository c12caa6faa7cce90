"""What a checkpoint holds, and how a run is put back exactly.

    config.json model.safetensors tokenizer/     what inference loads (plain weights, router bias included)
    optimizer.safetensors                        moments by parameter name, whole: they fit any number of ranks and any engine
    adapted.safetensors                          only with LoRA: raw weights and adapters
    ema.safetensors                              only with an average
    trainer.json                                 counters (the data position is the step), monitors' windows, the resolved
    config

No random state is saved because there is none: every draw is a function of (seed, step, purpose). Tensors are gathered
whole, so that a run saved by 2 ranks under ZeRO-3 continues on 1 rank without DeepSpeed and back.
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

from safetensors.torch import load_file, save_file
from torch import Tensor

from weft.training.checkpoint import CheckpointError, publish, read_json, write_json
from weft.training.ema import Ema
from weft.training.engine import Engine
from weft.training.finetune import merged
from weft.training.strict import plain

__all__ = ["Progress", "SavesItself", "Snapshot", "jsonable", "plain"]


class SavesItself(Protocol):
    """A tokenizer: `save(folder)` writes it, `digest()` names it."""

    def save(self, folder: Path) -> None: ...

    def digest(self) -> str: ...


@dataclass
class Progress:
    """Counters of a run."""

    step: int = 0
    """The next step to take: also the data position."""
    applied: int = 0
    """Updates made; the learning rate follows this one."""
    skipped: int = 0
    in_a_row: int = 0
    rollbacks: int = 0
    """Roll-backs since the last checkpoint was written."""
    tokens: int = 0
    """Tokens that were not padding."""
    lost: dict[str, int] = field(default_factory=dict)
    """What the data had to cut, drop or replace so far (`batches.LOST`), over all ranks."""
    evaluated: int = -1
    """The step at which the last evaluation was made: a run that is killed behind it does not write it twice."""
    score: float | None = None
    """Held-out loss of the last evaluation; None also where it was not finite."""
    elapsed_s: float = 0.0
    metrics_bytes: int = 0
    """Size of metrics.jsonl when the checkpoint was written."""


@dataclass(frozen=True)
class Snapshot:
    """Everything of one moment, gathered: only rank 0 holds the tensors."""

    weights: dict[str, Tensor]
    moments: dict[str, Tensor]
    average: dict[str, Tensor] | None
    average_updates: int
    trainer: dict[str, Any]


def snapshot(engine: Engine, progress: Progress, monitors: dict[str, Any], ema: Ema | None, extra: dict[str, Any]) -> Snapshot:
    """Gather a run's state; every rank calls it."""
    return Snapshot(
        engine.weights(),
        engine.moments(),
        ema.average if ema else None,
        ema.updates if ema else 0,
        {"format": 1, "progress": asdict(progress), "monitors": monitors, "engine": engine.counters(), **extra},
    )


def write_inference_files(
    folder: Path, weights: dict[str, Tensor], model_config: dict[str, Any], tokenizer: SavesItself | None, lora_scale: float
) -> None:
    """What `weft.load` needs."""
    save_file(ready(merged(weights, lora_scale)), folder / "model.safetensors", metadata={"format": "pt"})
    write_json(folder / "config.json", model_config)
    if tokenizer is not None:
        tokenizer.save(folder / "tokenizer")


def ready(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """On the CPU, contiguous, each with its own memory."""
    return {name: value.detach().cpu().contiguous() for name, value in tensors.items()}


def save(folder: Path, shot: Snapshot, model_config: dict[str, Any], tokenizer: SavesItself | None, lora_scale: float) -> Path:
    """Publish a checkpoint; called on rank 0 only. Raises `DiskFullError` without touching earlier ones."""

    def write(draft: Path) -> None:
        write_inference_files(draft, shot.weights, model_config, tokenizer, lora_scale)
        save_file(ready(shot.moments), draft / "optimizer.safetensors")
        if any("parametrizations." in name for name in shot.weights):
            save_file(ready(shot.weights), draft / "adapted.safetensors")
        if shot.average is not None:
            save_file(ready(shot.average), draft / "ema.safetensors")
        write_json(draft / "trainer.json", {**shot.trainer, "average_updates": shot.average_updates})

    tensors = [*shot.weights.values(), *shot.moments.values(), *(shot.average or {}).values()]
    return publish(folder, write, needed_bytes=int(1.02 * sum(t.numel() * t.element_size() for t in tensors)) + 2**20)


def load_weights(folder: Path) -> dict[str, Tensor]:
    """Raw weights of a verified checkpoint folder."""
    adapted = folder / "adapted.safetensors"
    path = adapted if adapted.exists() else folder / "model.safetensors"
    try:
        return load_file(path)
    except Exception as error:
        raise CheckpointError(f"cannot read {path} ({error}); use another checkpoint") from error


def restore(folder: Path, engine: Engine, ema: Ema | None, identity: dict[str, Any]) -> tuple[Progress, dict[str, Any]]:
    """Put weights, moments and average back; returns (progress, monitors' state)."""
    trainer = read_json(folder / "trainer.json")
    check_same_run(folder, trainer, identity)
    engine.load(load_weights(folder), load_file(folder / "optimizer.safetensors"), trainer["engine"])
    if ema is not None:
        path = folder / "ema.safetensors"
        if not path.exists():
            raise CheckpointError(f"{folder} holds no average of the weights; set checkpoint.ema to null or start a new folder")
        ema.restore(load_file(path), int(trainer["average_updates"]))
    return Progress(**trainer["progress"]), trainer["monitors"]


def check_same_run(folder: Path, trainer: dict[str, Any], identity: dict[str, Any]) -> None:
    """Refuse to continue with another tokenizer, model, seed or data: the result would be neither run."""
    for name, now in identity.items():
        then = trainer.get(name)
        if json.dumps(then, sort_keys=True) != json.dumps(now, sort_keys=True):
            difference = _first_difference(then, now)
            raise CheckpointError(
                f"{folder} was written with another {re.sub('_', ' ', name)} ({difference}); use that one, or a new run folder"
            )


def jsonable(value: Any) -> Any:
    """As it will look after a round trip through JSON: tuples become lists."""
    return json.loads(json.dumps(value))


def _first_difference(then: Any, now: Any) -> str:
    if isinstance(then, dict) and isinstance(now, dict):
        for key in sorted(set(then) | set(now)):
            if then.get(key) != now.get(key):
                return f"{key}: {then.get(key)!r} then, {now.get(key)!r} now"
    return f"{then!r} then, {now!r} now"
