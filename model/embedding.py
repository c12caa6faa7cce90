"""From ids, modalities, channels and raw features to the residual stream.

In: a batch's `ids modality channel [T]`, `features {m: [k F]}`, `feature_at {m: [k]}`. Out: [T D].
x = E[id] + W_m . feature + modality embedding + channel embedding. The feature modules of all modalities run in one fixed
order on possibly empty slices, because a module skipped on one rank is silently wrong under ZeRO-1/2.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from weft.model.config import ModelConfig
from weft.model.resampler import Resampler
from weft.model.rows import pad_rows


class FeatureError(ValueError):
    """A batch does not fit the model: features of an unknown modality or width, or as many as there are no positions for, or a
    channel beyond the model's."""


class FeatureEncoder(nn.Module):
    """Features of one modality [k F] -> [k D]: linear or two layers, then perhaps a resampler."""

    def __init__(self, name: str, config: ModelConfig) -> None:
        super().__init__()
        self.name = name
        self.size = config.feature_sizes[name]
        hidden, shape = config.feature_hidden, config.resample.get(name)
        self.row = row = self.size // (shape.rows if shape else 1)
        if hidden is None:
            self.proj: nn.Module = nn.Linear(row, config.width)
        else:
            self.proj = nn.Sequential(nn.Linear(row, hidden), nn.SiLU(), nn.Linear(hidden, config.width))
        self.resampler = Resampler(config.width, config.head_width, shape, config.norm_eps) if shape else None

    def forward(self, features: Tensor) -> Tensor:
        """Raw features of k positions to what is added there."""
        if features.dim() != 2 or features.shape[1] != self.size:
            raise FeatureError(f"{self.name} features need shape [k, {self.size}], found {list(features.shape)}")
        return self._project(features) if self.resampler is None else self._resample(features, self.resampler)

    def _resample(self, features: Tensor, resampler: Resampler) -> Tensor:
        """Every `latents` positions hold the `tokens` rows of a group side by side; a row of NaN is absent (a medium's end)."""
        shape = resampler.shape
        if len(features) % shape.latents:
            raise FeatureError(
                f"{self.name} features come in groups of {shape.latents} positions for the resampler, found {len(features)}; "
                "keep the positions of a group together"
            )
        features = features.to(resampler.latents.dtype)
        groups = features.reshape(len(features) // shape.latents, shape.latents * self.size)
        count = len(groups)
        if not torch.is_grad_enabled():
            groups = pad_rows(groups)  # a group's bits do not depend on how many come along
        rows = groups.reshape(len(groups), shape.tokens, self.row)
        absent = rows[..., 0].isnan()
        x = self._project(rows.masked_fill(absent[..., None], 0.0).flatten(0, 1))
        return resampler(x.view(len(groups), shape.tokens, x.shape[-1]), absent)[:count].flatten(0, 1)

    def _project(self, features: Tensor) -> Tensor:
        features = features.to(_weight_of(self.proj).dtype)
        if torch.is_grad_enabled() or not len(features):
            return self.proj(features)
        return self.proj(pad_rows(features))[: len(features)]


class Embedding(nn.Module):
    """The input side of the model."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.tokens = nn.Embedding(config.vocab_size, config.width)
        self.modality = nn.Embedding(config.num_modalities, config.width)
        self.channel = nn.Embedding(config.num_channels, config.width)
        self.features = nn.ModuleDict({name: FeatureEncoder(name, config) for name in config.feature_sizes})

    def forward(self, batch: Any) -> Tensor:
        """A batch -> [T D]. Raises `FeatureError` where features do not fit."""
        x = self.tokens(batch.ids) + self._place(batch.modality, batch.channel)
        self._check_names(batch.features)
        for name, encoder in self.features.items():
            rows, at = self._rows(name, batch.features, batch.feature_at, x)
            if not len(at) and not len(rows) and not torch.is_grad_enabled():
                continue
            encoded = encoder(rows)
            if len(encoded) != len(at):
                raise FeatureError(f"{name}: {len(encoded)} feature rows for {len(at)} positions in feature_at")
            self._check_groups(name, at)
            x = x.index_add(0, at, encoded.to(x.dtype))
        return x

    def _place(self, modality: Tensor, channel: Tensor) -> Tensor:
        """Modality and channel embedding [T D]; to train on a CPU from one table [M C D]: one look-up per token instead of two.
        There a channel beyond the table would read the next modality's row, so it is refused."""
        channels = self.config.num_channels
        if not torch.is_grad_enabled() or channel.device.type != "cpu":
            return self.modality(modality) + self.channel(channel)
        if len(channel) and (most := int(channel.max())) >= channels:
            raise FeatureError(f"channel {most}, the model's num_channels is {channels}; raise it (sizes.num_channels)")
        table = self.modality.weight[:, None] + self.channel.weight
        return F.embedding(modality * channels + channel, table.flatten(0, 1))

    def _check_groups(self, name: str, at: Tensor) -> None:
        """On a CPU, where looking is cheap: the positions of a resampler's group lie side by side."""
        shape = self.config.resample.get(name)
        if shape is None or at.device.type != "cpu":
            return
        reach = at[shape.latents - 1 :: shape.latents] - at[:: shape.latents]
        if bool((reach != shape.latents - 1).any()):
            raise FeatureError(
                f"{name}: a group of {shape.latents} resampled positions is torn apart; cut streams between groups"
            )

    def _check_names(self, features: Mapping[str, Tensor]) -> None:
        for name, rows in features.items():
            if name not in self.features and len(rows):
                known = ", ".join(self.features) or "none"
                raise FeatureError(f"batch has {name} features, the model has {known}; add {name} to config.feature_sizes")

    def _rows(self, name: str, features: Mapping[str, Tensor], at: Mapping[str, Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
        """The features of one modality and where they go, empty if the batch has none."""
        if name in features:
            return features[name], at[name]
        size = self.config.feature_sizes[name]
        return x.new_zeros((0, size)), torch.zeros(0, dtype=torch.int64, device=x.device)


def _weight_of(proj: nn.Module) -> Tensor:
    return next(proj.parameters())
