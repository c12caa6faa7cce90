"""Which experts a token takes: sigmoid scores, a bias that only selects, statistics per modality.

In: tokens [T D]. Out: weights [T S] that sum to one, chosen experts [T S], and what monitors want to know.
DeepSeek-V3 (arXiv 2412.19437, section 2.1.2): the bias moves by a fixed step against the load, outside the graph, so that no
auxiliary loss pulls on the weights. The router z-loss is ST-MoE's (arXiv 2202.08906, eq. 5). All of it in float32.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

BIAS_STEP = 1e-3
SMALLEST = 1e-20
"""Least score: the sigmoid of a logit below -104 is zero in float32, and the weights of such a token would be 0 / 0."""


@dataclass(frozen=True)
class Routing:
    """One layer's decision for T tokens."""

    weight: Tensor  # [T S], float32 or wider, sums to one per token
    expert: Tensor  # int64 [T S]
    logits: Tensor  # [T E]


@dataclass(frozen=True)
class RouterStats:
    """Statistics of every routed layer of one forward; R counts routed layers."""

    load: Tensor  # int64 [R M E]: choices by modality and expert, padding left out
    z_loss: Tensor  # scalar with gradient: mean over tokens and layers of log^2 sum exp logits, padding left out
    entropy: Tensor  # [R], nats: entropy of the mean normalised score over experts (log E = balanced)


def route(logits: Tensor, bias: Tensor, experts_per_token: int) -> Routing:
    """Top-S by score + bias; weights are the chosen scores without the bias, divided by their sum.

    With S = 1 that quotient is 1 whatever the router says, and nothing would teach it: the weight stays 1 and its gradient goes
    to the score (a straight-through estimator, arXiv 1308.3432)."""
    score = torch.sigmoid(logits).clamp(min=SMALLEST)
    if bias.numel() == 1:
        return Routing(score / score, torch.zeros_like(score, dtype=torch.int64), logits)
    expert = torch.topk(score.detach() + bias, experts_per_token, dim=-1, sorted=False).indices
    chosen = score.gather(-1, expert)
    if experts_per_token == 1:
        return Routing(1 + (chosen - chosen.detach()), expert, logits)
    return Routing(chosen / chosen.sum(-1, keepdim=True), expert, logits)


class RouterMeter:
    """Collects what `RouterStats` holds while a forward runs; built once per batch."""

    def __init__(self, modality: Tensor, is_pad: Tensor, num_modalities: int, experts: int) -> None:
        self.shape = (num_modalities, experts)
        bins = num_modalities * experts
        self.key = torch.where(is_pad, bins, modality * experts)[:, None]  # padding falls into one bin that is cut off
        self.share = (~is_pad).float()
        self.share /= self.share.sum().clamp(min=1)
        self.load: list[Tensor] = []
        self.z_loss: list[Tensor] = []
        self.score: list[Tensor] = []

    def add(self, routing: Routing) -> None:
        """Count one layer."""
        bins = self.shape[0] * self.shape[1]
        with torch.no_grad():
            key = torch.where(self.key == bins, self.key, self.key + routing.expert)
            self.load.append(torch.bincount(key.flatten(), minlength=bins + 1)[:bins].view(self.shape))
            self.score.append(self.share.to(routing.logits.dtype) @ torch.sigmoid(routing.logits))
        z = torch.logsumexp(routing.logits, -1)
        self.z_loss.append(torch.dot(self.share.to(z.dtype), z * z))

    def stats(self) -> RouterStats:
        """All layers in one packed object; empty tensors for a model without routed experts."""
        if not self.load:
            empty = self.share.new_zeros(0)
            return RouterStats(self.key.new_zeros((0, *self.shape)), self.share.new_zeros(()), empty)
        mean = torch.stack(self.score)
        mean = mean / mean.sum(-1, keepdim=True)
        entropy = -(mean * mean.clamp(min=1e-30).log()).sum(-1)
        return RouterStats(torch.stack(self.load), torch.stack(self.z_loss).mean(), entropy)


class Gate(nn.Linear):
    """The router's matrix [E D]; it computes in float32 whatever the model's type or autocast say."""

    def __init__(self, width: int, experts: int) -> None:
        super().__init__(width, experts, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens [T D] -> logits [T E]."""
        if x.dtype == self.weight.dtype == torch.float32 and not torch.is_autocast_enabled(x.device.type):
            return F.linear(x, self.weight)
        with torch.autocast(x.device.type, enabled=False):
            dtype = torch.promote_types(x.dtype, torch.float32)
            return F.linear(x.to(dtype), self.weight.to(dtype))


@torch.no_grad()
def shift_bias(bias: Tensor, load: Tensor, step: float = BIAS_STEP) -> None:
    """Move `bias` [E] by `step` towards the experts with less than the mean `load` [E], in place."""
    load = load.to(torch.float32)
    bias += step * torch.sign(load.mean() - load)
