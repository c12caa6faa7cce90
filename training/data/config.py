"""What the loader is told: the sources of the mixture, and what a step is made of."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class SourceConfig:
    """One folder of shards."""

    path: str
    """Folder, or URL that fsspec knows."""
    name: str = ""
    """As it is called in reports and in the order's draws; the folder's name if empty."""
    split: str = "train"
    weight: float | None = None
    """Share of the draws; None for all sources = by size."""
    repeats: float | None = None
    """Passes at most; None = no end."""
    cap: int | None = None
    """Documents counted at most when shares follow from sizes."""
    control: bool = False
    """Episodes: some sequences begin with a demonstration from another episode of the same task (`metadata.task`)."""
    prompt_rate: float = 0.25
    prompt_end: float = 0.5
    """Share of the demonstrations that are an episode's end."""

    def __post_init__(self) -> None:
        for name in ("prompt_rate", "prompt_end"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)} of source {self.path} must lie in 0 to 1")
        for name in ("weight", "repeats", "cap"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(
                    f"{name}={value:g} of source {self.path} must be above 0; leave the source out to give it none"
                )
        if not self.path:
            raise ValueError("path is empty; name a folder that `weft prepare` wrote")
        if not self.name:
            object.__setattr__(self, "name", Path(self.path.rstrip("/").rpartition("://")[2]).name)


@dataclass(frozen=True)
class LoaderConfig:
    """What a step is made of."""

    batch_tokens: int = 8192
    """Tokens of one step over all ranks and micro-batches, on average."""
    length: int = 1024
    """Longest document; longer ones are cut between segments, or between readings."""
    micro_batches: int = 1
    """Micro-batches of one step over all ranks; a multiple of the number of ranks."""
    draws_per_step: int | None = None
    """Draws of one step; None = `batch_tokens` by the mean length of the first documents."""
    max_tokens: int | None = None
    """Tokens of a micro-batch at most; what is beyond is dropped and counted. None = twice the mean."""
    round_to: int = 128  # tokens
    temperature: float = 1.0
    dropout: dict[str, float] = field(default_factory=dict)
    """Modality -> probability that a document loses its observed segments of it."""
    bad_budget: float = 0.001
    """Share of a source's samples that may be bad and replaced."""
    decode_workers: int = 0
    """Decoding processes; 0 = in this process, without a clock on bad media."""
    decode_timeout_s: float = 20.0
    token_cache_bytes: int = 2**30
    token_cache_folder: str | None = None
    document_cache_bytes: int = 2**28
    stream_cache_bytes: int = 2**28
    """Finished streams, for data that is read in several passes."""
    streams_folder: str | None = None
    """Streams that `weft tokenize RUN.yaml` made ahead, so that ranks only copy them; what is not there is made when drawn."""
    shard_cache_folder: str | None = None
    shard_cache_bytes: int = 2**34
    """For sources behind a URL."""
    prefetch: int = 2
    """Steps prepared ahead in a thread; 0 = none."""

    def __post_init__(self) -> None:
        for name in ("batch_tokens", "length", "micro_batches", "round_to"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("prefetch", "decode_workers", "token_cache_bytes", "document_cache_bytes", "stream_cache_bytes"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be 0 or more, got {getattr(self, name)}")
        for modality, rate in self.dropout.items():
            if not 0 <= rate <= 1:
                raise ValueError(f"dropout of {modality} must lie in 0 to 1, got {rate:g}")
        if not 0 <= self.bad_budget <= 1:
            raise ValueError(f"bad_budget must be a share from 0 to 1 (0.001 = 0.1 %), got {self.bad_budget:g}")
        if not self.decode_timeout_s > 0:
            raise ValueError(f"decode_timeout_s must be above 0 seconds, got {self.decode_timeout_s:g}")
        if not self.temperature > 0:
            raise ValueError(f"temperature must be above 0 (1 = by size, larger = more even), got {self.temperature:g}")
        if self.draws_per_step is not None and self.draws_per_step < self.micro_batches:
            raise ValueError(
                f"draws_per_step must be at least micro_batches={self.micro_batches}, got {self.draws_per_step}; raise it"
            )
        if self.max_tokens is not None and self.max_tokens < self.length:
            raise ValueError(
                f"max_tokens={self.max_tokens} must hold a document of length={self.length}; raise it or lower length"
            )
