"""What a run is built from, what it shows a callback, and what it leaves: the words that `train` and the loop share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from weft.model.transformer import Transformer
from weft.tokenizers.pack import Batch
from weft.training import state
from weft.training.batches import Batches
from weft.training.config import RunConfig
from weft.training.engine import Engine


@dataclass(frozen=True)
class Moment:
    """What a callback sees after a step."""

    step: int
    total: int | None
    applied: bool
    metrics: dict[str, float]
    alarms: list[str]
    model: Transformer
    folder: Path


Callback = Callable[[Moment], None]
Evaluate = Callable[[Transformer, int], dict[str, float]]


@dataclass(frozen=True)
class RunResult:
    """What `train` returns."""

    folder: Path
    metrics: dict[str, float]
    """The last step's figures, and the last evaluation's."""
    steps: int


@dataclass
class Parts:
    """Everything a loop needs, built."""

    config: RunConfig
    engine: Engine
    source: Batches
    tokenizer: state.SavesItself | None = None
    validation: list[Batch] = field(default_factory=list)
    evaluate: Evaluate | None = None
    callbacks: Sequence[Callback] = ()
    lora_scale: float = 1.0
