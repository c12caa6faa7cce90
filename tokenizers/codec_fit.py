"""Fit a codec on feature grids: deterministic given the seed, on a CPU, and with a report of what it can and cannot keep."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from weft.tokenizers.codec import Codec, CodecConfig, CodecNet
from weft.tokenizers.files import TokenizerError

Progress = Callable[[int, int, float], None]
"""(step, steps, loss) after every step."""


@dataclass(frozen=True)
class CodecFit:
    """How long and on what to train."""

    steps: int = 800
    """Optimizer steps."""
    batch_tokens: int = 1024
    """Tokens per step, about."""
    crop: int = 16
    """Largest side of a training crop, in tokens."""
    learning_rate: float = 4e-3
    """Peak of a cosine schedule for AdamW."""
    seed: int = 0
    """Of the weights, the batches and the crops."""

    def __post_init__(self) -> None:
        if min(self.steps, self.batch_tokens, self.crop) < 1 or not 0 < self.learning_rate < 1:
            raise TokenizerError(f"{self} needs steps, batch_tokens and crop of at least 1 and a learning rate between 0 and 1")


@dataclass(frozen=True)
class CodecReport:
    """How well the fitted codec keeps the data it was fitted on (or other data handed to `measure`)."""

    mse: float
    """Mean squared error of a feature, in feature units."""
    mae: float
    """Mean absolute error of a feature, in feature units."""
    psnr_db: float
    """10 log10(1 / mse): for features in [0, 1]."""
    codes: int
    """Codes that exist."""
    codes_used: int
    """Codes that occurred."""
    perplexity: float
    """exp(entropy) of the code frequencies: how many codes are in use, effectively."""
    tokens: int
    """Tokens measured."""
    steps: int = 0
    """Optimizer steps of the fit, 0 where there was none."""
    seconds: float = 0.0
    """Wall time of the fit."""


def fit_codec(
    grids: Sequence[np.ndarray], config: CodecConfig, fit: CodecFit, progress: Progress | None = None
) -> tuple[Codec, CodecReport]:
    """Train on float32 grids [h w F] (all of one F; height one everywhere means a sequence, and 1x3 convolutions)."""
    grids = [g for g in grids if g.size]
    if not grids:
        raise TokenizerError("a codec needs at least one non-empty image or clip to fit")
    begin = time.perf_counter()
    feature_size, flat = grids[0].shape[-1], all(g.shape[0] == 1 for g in grids)
    count = sum(g.size for g in grids)
    mean = sum(float(g.sum(dtype=np.float64)) for g in grids) / count
    scale = max((sum(float(np.square(g - mean, dtype=np.float64).sum()) for g in grids) / count) ** 0.5, 1e-3)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(fit.seed)
        net = CodecNet(config, feature_size, flat)
    _train(net, grids, (mean, scale), fit, progress)
    codec = Codec(config, net, mean, scale, feature_size, flat)
    report = measure(codec, grids)
    return codec, CodecReport(**{**report.__dict__, "steps": fit.steps, "seconds": time.perf_counter() - begin})


def _train(
    net: CodecNet, grids: Sequence[np.ndarray], norm: tuple[float, float], fit: CodecFit, progress: Progress | None
) -> None:
    """AdamW on the mean squared error of normalised features."""
    random, sides = np.random.default_rng(fit.seed), np.array([g.shape[:2] for g in grids])
    optimizer = torch.optim.AdamW(net.parameters(), lr=fit.learning_rate, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, fit.learning_rate, total_steps=fit.steps + 1, pct_start=0.05)
    for step in range(fit.steps):
        batch = torch.from_numpy((_batch(grids, sides, fit, random) - norm[0]) / norm[1])
        loss = torch.nn.functional.mse_loss(net(batch), batch)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if progress:
            progress(step + 1, fit.steps, loss.item())


def _batch(grids: Sequence[np.ndarray], sides: np.ndarray, fit: CodecFit, random: np.random.Generator) -> np.ndarray:
    """float32 [B h w F]: crops at random places of random grids, all of the smallest side among them. `sides` [grids 2].

    Of few small grids there are few crops; many times the same one would cost time and teach nothing."""
    first = grids[int(random.integers(len(grids)))]
    limit = fit.crop if first.shape[0] > 1 else fit.crop * 4
    side = (min(first.shape[0], limit), min(first.shape[1], limit))
    distinct = int(np.prod(np.maximum(sides - side, 0) + 1, axis=1).sum())
    most = 2 * distinct if distinct > 1 else 1
    picks = random.integers(len(grids), size=min(max(1, fit.batch_tokens // (side[0] * side[1])), most))
    chosen = [first, *(grids[int(i)] for i in picks[1:])]
    h, w = (min(side[axis], *(g.shape[axis] for g in chosen)) for axis in (0, 1))
    crops = []
    for g in chosen:
        y, x = random.integers(g.shape[0] - h + 1), random.integers(g.shape[1] - w + 1)
        crops.append(g[y : y + h, x : x + w])
    return np.stack(crops).astype(np.float32)


def measure(codec: Codec, grids: Sequence[np.ndarray]) -> CodecReport:
    """Encode and decode every grid and compare."""
    counts = np.zeros(codec.size, np.int64)
    square = absolute = 0.0
    for grid in grids:
        flat = grid.reshape(-1, codec.feature_size)
        codes = codec.encode(flat)
        error = codec.decode(codes, grid.shape[:2]) - flat
        square, absolute = (
            square + float(np.square(error).sum(dtype=np.float64)),
            absolute + float(np.abs(error).sum(dtype=np.float64)),
        )
        counts += np.bincount(codes, minlength=codec.size)
    total = max(int(counts.sum()), 1)
    share = counts[counts > 0] / total
    mse = square / (total * codec.feature_size)
    return CodecReport(
        mse=mse,
        mae=absolute / (total * codec.feature_size),
        psnr_db=float(-10 * np.log10(max(mse, 1e-12))),
        codes=codec.size,
        codes_used=len(share),
        perplexity=float(np.exp(-(share * np.log(share)).sum())),
        tokens=total,
    )
