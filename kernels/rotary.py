"""Rotary positions over three axes (t h w), and QK-norm with rotation as one function.

In: positions [T 3], once per batch; then queries [T H K] and keys [T G K] of every layer. Out: the same, normalised and turned.
A head's K channels are K/2 pairs (c, c + K/2); pair i turns by position * theta^(-2i/K), the position being that of ONE axis.
The axes are spread evenly over the pairs: each axis has slow and fast ones, and a token whose three positions are equal
(text) is turned exactly as by ordinary one-axis rotary (Su et al. 2021; three axes: Wang et al. 2024, Qwen2-VL).
"""

from __future__ import annotations

import functools

import torch
from jaxtyping import Float, Integer
from torch import Tensor

from weft.kernels.elementwise import rms_norm

Rotary = tuple[Tensor, Tensor]
"""cos and sin of every token's angles, float32 [T K/2]."""


def default_split(head_width: int) -> tuple[int, int, int]:
    """Pairs per axis: half for t, a quarter each for h and w (rounded down, t takes the rest)."""
    side = head_width // 8
    return head_width // 2 - 2 * side, side, side


def axis_of_pair(split: tuple[int, int, int]) -> list[int]:
    """The axis (0 t, 1 h, 2 w) of each pair: each axis spread evenly from the fastest pair to the slowest."""
    places = [((i + 0.5) / count, axis) for axis, count in enumerate(split) for i in range(count)]
    return [axis for _, axis in sorted(places)]


def rope_table(
    position: Integer[Tensor, ...], head_width: int, theta: float = 10_000.0, split: tuple[int, int, int] | None = None
) -> Rotary:
    """cos and sin [T K/2], once per batch for all layers. position [T 3] int; split: pairs per axis, summing to head_width / 2.

    Angles are made in float64: a clock position of 10^6 in float32 would be off by 0.06 rad.
    """
    split = default_split(head_width) if split is None else split
    if head_width % 2 or sum(split) != head_width // 2 or min(split) < 0:
        raise ValueError(f"rotary split {split} must sum to half the head width, {head_width} / 2, with no negative count")
    if position.ndim != 2 or position.shape[1] != 3:
        raise ValueError(f"position has shape {tuple(position.shape)}; rotary needs [T 3] (t h w)")
    axis, speed = _pairs(head_width, theta, split)
    position = position.double().index_select(1, torch.tensor(axis, device=position.device))
    angle = position * torch.tensor(speed, device=position.device, dtype=torch.float64)
    return angle.cos().float(), angle.sin().float()


@functools.lru_cache
def _pairs(head_width: int, theta: float, split: tuple[int, int, int]) -> tuple[list[int], list[float]]:
    """Axis and speed in radians of each pair."""
    return axis_of_pair(split), [theta ** (-2 * pair / head_width) for pair in range(head_width // 2)]


def rotate(x: Float[Tensor, "T H K"], cos: Float[Tensor, "T K//2"], sin: Float[Tensor, "T K//2"]) -> Float[Tensor, "T H K"]:
    """Turn the pairs of x [T H K]. Position zero leaves x unchanged; lengths never change."""
    cos, sin = (y[:, None].to(x.dtype) for y in (cos, sin))
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def qk_norm_rope(
    q: Float[Tensor, "T H K"],
    k: Float[Tensor, "T G K"],
    q_weight: Float[Tensor, K],
    k_weight: Float[Tensor, K],
    cos: Float[Tensor, "T K//2"],
    sin: Float[Tensor, "T K//2"],
    eps: float = 1e-6,
) -> tuple[Float[Tensor, "T H K"], Float[Tensor, "T G K"]]:
    """RMSNorm over the head width, then rotation. q [T H K], k [T G K], weights [K] (Dehghani et al. 2023 for QK-norm)."""
    return rotate(rms_norm(q, q_weight, eps), cos, sin), rotate(rms_norm(k, k_weight, eps), cos, sin)
