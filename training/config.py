"""One run, described by one frozen object: YAML file and dotted overrides in, `RunConfig` out.

    run = load_run("run.yaml", ["optimizer.lr=3e-4", "engine.kind=deepspeed"])

A section's rules live beside what it configures (`optim.py`, `loss.py`, ...); this file holds the sections that belong to the
run itself, and the rules that join sections. Mistakes raise `ConfigError` with file, line, key and repair (`strict.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

import yaml

from weft.model.config import ModelConfig, resamplers
from weft.model.presets import PRESETS, preset
from weft.tokenizers.plan import PRESETS as PLANS
from weft.tokenizers.plan import LossPlan
from weft.training.config_file import ConfigError, Origin, override, read_yaml
from weft.training.data.config import LoaderConfig, SourceConfig
from weft.training.engine import EngineConfig
from weft.training.finetune import FinetuneConfig
from weft.training.loss import LossConfig
from weft.training.monitors import MonitorConfig
from weft.training.optim import OptimizerConfig
from weft.training.schedule import ScheduleConfig
from weft.training.strict import build, nearest, plain
from weft.training.tracking import Name


@dataclass(frozen=True)
class ModelSection:
    """Which model: a preset with some sizes replaced, or the weights of a folder."""

    preset: str = "tiny"
    sizes: dict[str, Any] = field(default_factory=dict)
    """Fields of `ModelConfig` to set or replace; the vocabulary's come from the tokenizer."""
    init: Path | None = None
    """Start from this checkpoint folder's weights (its config wins over preset and sizes)."""
    trunk: Path | None = None
    """Start the trunk from a LLaMA- or Mistral-style safetensors folder (see `pretrained.py`)."""
    vision: Path | None = None
    """Start the image patch encoder from a ViT safetensors folder."""

    def __post_init__(self) -> None:
        if self.preset not in PRESETS:
            raise ValueError(f"preset {self.preset!r} is not known; {nearest(self.preset, list(PRESETS))}")
        known = [f.name for f in fields(ModelConfig)]
        for name in self.sizes:
            if name not in known:
                raise ValueError(f"sizes.{name} is no size of a model; {nearest(name, known)}")
        try:
            # The tokenizer says what is resampled, so that is held against it once it is known.
            preset(self.preset, **{"vocab_size": 2**20, **self.sizes, "resample": {}})
        except ValueError as error:
            raise ValueError(f"sizes: {error}") from error

    def config(
        self,
        vocab_size: int,
        slices: Sequence[tuple[int, int]],
        feature_sizes: dict[str, int],
        resample: dict[str, dict[str, int]] | None = None,
    ) -> ModelConfig:
        """The model's sizes once the vocabulary is known. `resample`: the tokenizer's; `sizes` may repeat it to set depths."""
        needed = resample or {}
        given = {"vocab_size": vocab_size, "slices": tuple(slices), "feature_sizes": feature_sizes, "resample": needed}
        config = preset(self.preset, **{**given, **self.sizes})
        if resamplers(config) != needed:
            raise ValueError(
                f"resample is {resamplers(config)}, the tokenizer's streams are written for {needed}; "
                "leave it out or repeat the tokenizer's tokens and latents"
            )
        return config


@dataclass(frozen=True)
class DataSection(LoaderConfig):
    """What is read, and how much of it makes one step; the loader's own fields are in `data/config.py`.

    A step holds `batch_tokens` in `micro_batches` parts however many ranks share it: 8 micro-batches are 8 accumulation steps
    on one GPU or one on each of 8, with the same gradient.
    """

    sources: tuple[SourceConfig, ...] = ()
    validation: tuple[SourceConfig, ...] = ()
    """Held-out shards (usually the same folders with another split); empty = none."""
    tokenizer: Path | None = None
    """Folder of a `StreamTokenizer`."""
    plan: str | LossPlan = "dense"
    """Which tokens bear loss: gato, jat, dense, instruct, or weights of one's own (target, observed, generate)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.plan, str) and self.plan not in PLANS:
            raise ValueError(f"plan {self.plan!r} is not known; {nearest(self.plan, list(PLANS))}")

        for group in ("sources", "validation"):
            self._check(group, getattr(self, group))

    @staticmethod
    def _check(group: str, sources: Sequence[SourceConfig]) -> None:
        names = [s.name for s in sources]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"{group} has two entries called {name!r}; give each its own `name:`")
        given = [s.weight is not None for s in sources]
        if any(given) and not all(given):
            raise ValueError(
                f"{group}: {names[given.index(False)]!r} has no weight and others have; give a weight to all or to none"
            )

    @property
    def loss_plan(self) -> LossPlan:
        """The plan as weights."""
        return PLANS[self.plan] if isinstance(self.plan, str) else self.plan

    @property
    def micro_tokens(self) -> int:
        """Tokens of one micro-batch, on average."""
        return self.batch_tokens // self.micro_batches


@dataclass(frozen=True)
class CheckpointSection:
    """When to save, what to keep."""

    every: int = 500  # steps
    keep_last: int = 2
    keep_best: int = 0
    """Also keep the n checkpoints with the lowest held-out loss."""
    resume: Literal["auto", "never"] = "auto"
    """auto: continue from the newest valid checkpoint in the run folder."""
    ema: float | None = None
    """Decay of an average of the weights, for example 0.9999; `final/` then holds the average."""
    on_full_disk: Literal["stop", "continue"] = "stop"
    """stop: end with an error; continue: warn, train on, and try again at the next save."""

    def __post_init__(self) -> None:
        for name, least in (("every", 1), ("keep_last", 1), ("keep_best", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if self.ema is not None and not 0 < self.ema < 1:
            raise ValueError(f"ema must lie in (0, 1), got {self.ema}")


@dataclass(frozen=True)
class TrackingSection:
    """Where figures go besides `metrics.jsonl`."""

    trackers: tuple[Name, ...] = ("tensorboard",)
    every: int = 1  # steps per metrics row
    panel: Literal["auto", "live", "plain", "none"] = "auto"
    """auto: a live panel on a terminal, plain lines elsewhere."""
    plain_every_s: float = 10.0
    plots: bool = True
    """Draw PNGs into `plots/` at the end."""

    def __post_init__(self) -> None:
        if self.every < 1:
            raise ValueError(f"every must be at least 1 step, got {self.every}")
        if self.plain_every_s < 0:
            raise ValueError(f"plain_every_s must be 0 or more seconds, got {self.plain_every_s}")


@dataclass(frozen=True)
class EvalSection:
    """Held-out loss during the run."""

    every: int = 0
    """Steps between evaluations; 0 = only at the end, if there is held-out data."""
    batches: int = 4
    """Micro-batches per evaluation over all ranks; always the same ones."""

    def __post_init__(self) -> None:
        if self.every < 0:
            raise ValueError(f"every must be 0 (only at the end) or more steps, got {self.every}")
        if self.batches < 1:
            raise ValueError(f"batches must be at least 1, got {self.batches}")


@dataclass(frozen=True)
class RunConfig:
    """Everything that a run depends on."""

    folder: Path = Path("runs/run")
    seed: int = 0
    max_steps: int | None = None
    max_seconds: float | None = None
    """Time budget: the first steps are measured and `max_steps` follows from them (recorded, so a resume is exact)."""
    model: ModelSection = field(default_factory=ModelSection)
    data: DataSection = field(default_factory=DataSection)
    loss: LossConfig = field(default_factory=LossConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    checkpoint: CheckpointSection = field(default_factory=CheckpointSection)
    tracking: TrackingSection = field(default_factory=TrackingSection)
    evaluation: EvalSection = field(default_factory=EvalSection)
    monitors: MonitorConfig = field(default_factory=MonitorConfig)
    finetune: FinetuneConfig = field(default_factory=FinetuneConfig)
    origin: Origin | None = field(default=None, init=False, repr=False, compare=False)
    """Where the values came from, for messages."""

    def __post_init__(self) -> None:
        if self.max_steps is None and self.max_seconds is None:
            raise ValueError("a run needs max_steps or max_seconds; add one of them, for example max_steps: 1000")
        if self.max_steps is not None and self.max_steps < 1:
            raise ValueError(f"max_steps must be at least 1, got {self.max_steps}")
        if self.max_seconds is not None and self.max_seconds <= 0:
            raise ValueError(f"max_seconds must be positive, got {self.max_seconds}")
        if self.engine.kind == "deepspeed" and self.engine.zero_stage > 0 and self.optimizer.kind == "muon":
            raise ValueError("muon needs whole matrices, which ZeRO divides; use engine.zero_stage: 0 or optimizer.kind: adamw")

    def at(self, *key: str | int) -> str:
        """`run.yaml:7: data.tokenizer`: how a message names a key whose value turned out to be wrong later on."""
        return (self.origin or Origin("config")).at(key)

    def changed(self, **values: Any) -> RunConfig:
        """A copy with other values that still knows where it came from."""
        copy = replace(self, **values)
        object.__setattr__(copy, "origin", self.origin)
        return copy

    def to_yaml(self) -> str:
        """The resolved config, as it is saved beside the run."""
        return yaml.safe_dump(plain(self), sort_keys=False)


def load_run(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a run file and apply `section.key=value` overrides. Raises `ConfigError`."""
    data, origin = read_yaml(path)
    config = build(RunConfig, override(data, overrides, origin), origin)
    object.__setattr__(config, "origin", origin)
    return config


__all__ = ["ConfigError", "RunConfig", "load_run"]
