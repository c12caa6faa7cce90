"""Perceiver resampler: n feature rows of one medium become m latent rows (Flamingo, arXiv 2204.14198, section 2.1).

In: [M n D], M media (maybe none). Out: [M m D]. Keys and values are [features; latents]; there is a learned embedding of the
row's place in time and no spatial one; the feed-forward layer is a squared ReLU, as in the paper. A medium that ends early
says which of its rows are absent: no latent looks at them.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from weft.model.config import Resample


class ResamplerLayer(nn.Module):
    """Latents attend to [features; latents], then a feed-forward layer of 4 D."""

    def __init__(self, width: int, head_width: int, eps: float) -> None:
        super().__init__()
        self.heads = max(1, width // head_width)
        inner = self.heads * head_width
        self.eps = eps
        self.feature_norm = nn.RMSNorm(width, eps=eps)
        self.latent_norm = nn.RMSNorm(width, eps=eps)
        self.query = nn.Linear(width, inner, bias=False)
        self.key_value = nn.Linear(width, 2 * inner, bias=False)
        self.out = nn.Linear(inner, width, bias=False)
        self.ffn_norm = nn.RMSNorm(width, eps=eps)
        self.up = nn.Linear(width, 4 * width, bias=False)
        self.down = nn.Linear(4 * width, width, bias=False)

    def forward(self, latents: Tensor, features: Tensor, seen: Tensor | None) -> Tensor:
        """Latents [M m D], features [M n D], keys that may be looked at, bool [M 1 1 n+m] -> latents [M m D]."""
        own = self.latent_norm(latents)
        q = self._split(self.query(own))
        k, v = self.key_value(torch.cat([self.feature_norm(features), own], 1)).chunk(2, -1)
        k, v = self._split(k), self._split(v)
        # Heads are normalised as in the trunk (QK-norm; UIO-2 does so in its resampler too).
        q, k = (F.rms_norm(t, t.shape[-1:], eps=self.eps) for t in (q, k))
        mixed = F.scaled_dot_product_attention(q, k, v, seen)
        latents = latents + self.out(mixed.transpose(1, 2).flatten(2))
        return latents + self.down(F.relu(self.up(self.ffn_norm(latents))).square())

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)


class Resampler(nn.Module):
    """A stack of layers over learned latents."""

    def __init__(self, width: int, head_width: int, shape: Resample, eps: float = 1e-6) -> None:
        super().__init__()
        self.shape = shape
        self.latents = nn.Parameter(torch.empty(shape.latents, width))
        self.time = nn.Parameter(torch.empty(shape.tokens, width))
        self.layers = nn.ModuleList(ResamplerLayer(width, head_width, eps) for _ in range(shape.depth))
        self.norm = nn.RMSNorm(width, eps=eps)
        nn.init.normal_(self.latents)
        nn.init.zeros_(self.time)

    def forward(self, features: Tensor, absent: Tensor | None = None) -> Tensor:
        """[M n D], rows that are padding, bool [M n] -> [M m D]; M = 0 gives an empty result through the same modules."""
        features = features + self.time
        latents = self.latents.expand(len(features), -1, -1)
        seen = None if absent is None else F.pad(~absent, (0, self.shape.latents), value=True)[:, None, None]
        for layer in self.layers:
            latents = layer(latents, features, seen)
        return self.norm(latents)
