"""The shape of a model: one frozen config, its rules, and its way to and from JSON.

In: keyword arguments or a dict. Out: a `ModelConfig` that is known to be buildable. Everything else in this room
(`count.py`, `transformer.py`, `save.py`) reads sizes from here and from nowhere else.

Axes: `D width  H heads  G kv heads  K head width  E experts  S experts per token  F expert width  V vocab  A axes (t h w)`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


class ConfigError(ValueError):
    """A model config that cannot be built: unknown key, impossible size, or sizes that do not fit each other."""


# Upper bounds keep a hostile config.json from asking for absurd memory before its weights are looked at.
BOUNDS: dict[str, tuple[int, int]] = {
    "vocab_size": (1, 2**26),
    "num_modalities": (1, 256),
    "num_channels": (1, 65536),
    "width": (1, 65536),
    "layers": (1, 1024),
    "heads": (1, 4096),
    "kv_heads": (1, 4096),
    "head_width": (2, 4096),
    "experts": (0, 4096),
    "experts_per_token": (1, 64),
    "expert_width": (1, 262144),
    "shared_width": (0, 262144),
    "dense_width": (1, 262144),
    "window": (1, 2**30),
    "full_every": (0, 1024),
    "max_landmarks": (1, 2**30),
    "embed_width": (1, 65536),
    "feature_hidden": (1, 262144),
    "base_width": (1, 65536),
}


@dataclass(frozen=True)
class Resample:
    """A Perceiver resampler: every `tokens` feature rows of a medium become `latents` positions (Flamingo, arXiv 2204.14198).

    The batch holds tokens / latents rows of features side by side at each position: `feature_sizes` counts all their values.
    """

    tokens: int
    """Feature rows of one medium that go in together: a multiple of `latents`."""
    latents: int
    """Rows that come out, and positions that the stream holds for them."""
    depth: int = 2
    """Cross-attention layers."""

    def __post_init__(self) -> None:
        for name, high in (("tokens", 65536), ("latents", 65536), ("depth", 64)):
            _check_int(f"resample.{name}", getattr(self, name), 1, high)
        if self.tokens % self.latents:
            raise ConfigError(f"model config: resample.tokens={self.tokens} must be a multiple of latents={self.latents}")

    @property
    def rows(self) -> int:
        """Feature rows that a position carries."""
        return self.tokens // self.latents


@dataclass(frozen=True)
class ModelConfig:
    """Sizes of a `Transformer`. Only `vocab_size` has no default; the rest is the `tiny` scale."""

    vocab_size: int
    """V: rows of the embedding and of the output matrix."""
    slices: tuple[tuple[int, int], ...] = ()
    """(first, end) ids of every output slice; () means one slice over the whole vocabulary."""
    feature_sizes: dict[str, int] = field(default_factory=dict)
    """modality -> F, for every modality that carries raw features; all values of a position. Kept sorted by name: the order in
    which modules run."""
    num_modalities: int = 6
    num_channels: int = 64
    """Rows of the channel embedding: the largest channel number of a sensor or an action, plus one."""
    width: int = 256
    """D. The residual stream."""
    layers: int = 4
    heads: int = 4
    kv_heads: int = 2
    """G. Every H / G query heads read one key head (grouped-query attention, arXiv 2305.13245)."""
    head_width: int = 64
    """K. Even: channels turn in pairs."""
    experts: int = 4
    """E. Routed experts of every block but the first; 1 is a dense layer behind a router, 0 leaves them out."""
    experts_per_token: int = 1
    """S."""
    expert_width: int = 256
    """F of one routed expert."""
    shared_width: int = 256
    """F of the shared expert that every token takes in a block with routed experts; 0 leaves it out."""
    dense_width: int = 512
    """F of the feed-forward layer of blocks without routed experts (the first one)."""
    window: int | None = 512
    """Tokens that a local layer looks back, itself included; None makes every layer full."""
    full_every: int = 4
    """Every n-th layer sees its whole document; 0 means none does."""
    max_landmarks: int | None = None
    """Landmarks kept beyond the window by local layers; None keeps all of a document's."""
    last_medium: tuple[int, ...] = ()
    """Modalities, by number, of which a token sees the last preceding medium only, for example (1, 2): images and videos.
    All layers. For training and `extend`; compiled and paged decoding refuse it."""
    embed_width: int = 128
    """Width of a document's embedding for search."""
    feature_hidden: int | None = None
    """Width of a two-layer feature encoder (Linear, SiLU, Linear); None is one linear map."""
    resample: dict[str, Resample] = field(default_factory=dict)
    """modality -> resampler between its features and the stream."""
    rope_theta: float = 10_000.0
    """Longest rotary wavelength / 2 pi, in positions."""
    rope_split: tuple[int, int, int] | None = None
    """Channel pairs of the axes t, h, w, summing to K / 2; None is half for t and a quarter each for h and w."""
    norm_eps: float = 1e-6
    tied: bool = False
    """Whether the output matrix is the embedding matrix."""
    pad_id: int = 0
    """Id of padding: such tokens are left out of router statistics."""
    base_width: int = 256
    """Width at which learning rates were tuned; see `init.py`."""

    def __post_init__(self) -> None:
        self._normalise()
        for name, (low, high) in BOUNDS.items():
            value = getattr(self, name)
            if value is None and name in ("window", "max_landmarks", "feature_hidden"):
                continue
            _check_int(name, value, low, high)
        self._check_ratios()
        self._check_slices()
        self._check_modalities()

    def _normalise(self) -> None:
        """JSON knows lists and plain dicts: bring them to our types."""
        set_field = lambda name, value: object.__setattr__(self, name, value)  # noqa: E731
        for name in ("feature_sizes", "resample"):
            if not isinstance(getattr(self, name), Mapping):
                raise ConfigError(f"model config: {name} must be a mapping from modality, found {getattr(self, name)!r}")
        set_field("feature_sizes", dict(sorted(self.feature_sizes.items())))
        set_field("resample", {k: _resample(k, v) for k, v in sorted(self.resample.items())})
        for name in ("slices", "rope_split", "last_medium"):
            if not isinstance(getattr(self, name), (list, tuple, type(None))):
                raise ConfigError(f"model config: {name} must be a list, found {getattr(self, name)!r}")
        slices = self.slices or ((0, self.vocab_size),)
        if not all(isinstance(pair, (list, tuple)) and len(pair) == 2 for pair in slices):
            raise ConfigError(f"model config: slices must be pairs (first, end), found {slices!r}")
        set_field("slices", tuple((pair[0], pair[1]) for pair in slices))
        set_field("rope_split", None if self.rope_split is None else tuple(self.rope_split))
        set_field("last_medium", tuple(self.last_medium or ()))

    def _check_ratios(self) -> None:
        if self.heads % self.kv_heads:
            raise ConfigError(f"model config: heads={self.heads} must be a multiple of kv_heads={self.kv_heads}")
        if self.head_width % 2:
            raise ConfigError(f"model config: head_width={self.head_width} must be even, rotary channels turn in pairs")
        split = self.rope_split
        if split is not None and (
            len(split) != 3 or any(type(n) is not int or n < 0 for n in split) or sum(split) != self.head_width // 2
        ):
            raise ConfigError(f"model config: rope_split needs three counts with sum {self.head_width // 2}, found {split!r}")
        if self.experts and self.experts_per_token > self.experts:
            raise ConfigError(
                f"model config: experts_per_token={self.experts_per_token} exceeds experts={self.experts}; lower the first"
            )
        for name, low, high in (("rope_theta", 1.0, 1e12), ("norm_eps", 0.0, 1.0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
                raise ConfigError(f"model config: {name} must lie in [{low}, {high}], found {value!r}")
        if type(self.tied) is not bool:
            raise ConfigError(f"model config: tied must be true or false, found {self.tied!r}")
        _check_int("pad_id", self.pad_id, 0, self.vocab_size - 1)

    def _check_slices(self) -> None:
        if len(self.slices) > 256:
            raise ConfigError(f"model config: at most 256 output slices, found {len(self.slices)}")
        for first, end in self.slices:
            if type(first) is not int or type(end) is not int or not 0 <= first < end <= self.vocab_size:
                raise ConfigError(f"model config: slice ({first!r}, {end!r}) must lie within 0 .. vocab_size={self.vocab_size}")

    def _check_modalities(self) -> None:
        if len(self.feature_sizes) > 256:
            raise ConfigError(f"model config: at most 256 modalities with features, found {len(self.feature_sizes)}")
        for name, size in self.feature_sizes.items():
            if not isinstance(name, str) or not name.isidentifier():
                raise ConfigError(f"model config: modality {name!r} must be a plain word, it names a module")
            _check_int(f"feature_sizes[{name}]", size, 1, 2**22)
        for number in self.last_medium:
            _check_int("last_medium", number, 0, self.num_modalities - 1)
        for name, resample in self.resample.items():
            if name not in self.feature_sizes:
                raise ConfigError(f"model config: resample[{name}] needs feature_sizes[{name}]")
            if self.feature_sizes[name] % resample.rows:
                raise ConfigError(
                    f"model config: feature_sizes[{name}]={self.feature_sizes[name]} must hold the {resample.rows} rows that "
                    f"resample[{name}] has at each position"
                )

    # The two names that DeepSpeed's AutoEP looks up on `model.config`.
    @property
    def num_local_experts(self) -> int:
        """E."""
        return self.experts

    @property
    def num_experts_per_tok(self) -> int:
        """S."""
        return self.experts_per_token

    def is_full(self, layer: int) -> bool:
        """Whether `layer` (from 0) sees its whole document: every `full_every`-th, so that local layers come first."""
        return self.window is None or (self.full_every > 0 and (layer + 1) % self.full_every == 0)

    def is_routed(self, layer: int) -> bool:
        """Whether `layer` has routed experts: all but the first (as DeepSeekMoE, arXiv 2401.06066)."""
        return layer > 0 and self.experts > 0

    def ffn_width(self, layer: int) -> int:
        """F of the feed-forward layer that every token of `layer` takes; 0 if there is none."""
        return self.shared_width if self.is_routed(layer) else self.dense_width

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ModelConfig:
        """The inverse of `to_dict`. Raises `ConfigError` for an unknown key, a missing size or a wrong type."""
        known = {f.name for f in dataclasses.fields(cls)}
        unknown = sorted(str(key) for key in values if key not in known)
        if unknown:
            raise ConfigError(f"model config: unknown key {unknown[0]!r}; known keys are {', '.join(sorted(known))}")
        if "vocab_size" not in values:
            raise ConfigError("model config: vocab_size is missing")
        return cls(**values)


def resamplers(config: ModelConfig) -> dict[str, dict[str, int]]:
    """modality -> {tokens, latents}: what the streams that a model reads have to agree with."""
    return {name: {"tokens": shape.tokens, "latents": shape.latents} for name, shape in config.resample.items()}


def _check_int(name: str, value: Any, low: int, high: int) -> None:
    if type(value) is not int or not low <= value <= high:
        raise ConfigError(f"model config: {name} must be an integer from {low} to {high}, found {value!r}")


def _resample(name: str, value: Any) -> Resample:
    if isinstance(value, Resample):
        return value
    known = {f.name for f in dataclasses.fields(Resample)}
    if not isinstance(value, Mapping) or not set(value) <= known or not {"tokens", "latents"} <= set(value):
        raise ConfigError(f"model config: resample[{name}] needs the keys {sorted(known)}, found {value!r}")
    return Resample(**value)
