"""From hidden states to one number per modality: cross-entropy on the legal slice, two z-losses, and contrastive pairs.

    loss = sum_m  scale_m * (sum of weight * nll over m's learnt tokens) / (number of m's learnt tokens)
         + z_loss * mean z^2 + router_z_loss * router z + contrastive * InfoNCE

Normalisation. A token's `weight` is the loss plan's, so the divisor counts tokens (weight > 0) instead of summing
weights: dividing by the sum would cancel JAT's 0.005 exactly. A mean per modality keeps 40 action tokens from drowning
among 4,000 image codes (Unified-IO 2, 4M). Counts are taken over all ranks and micro-steps BEFORE the first forward, so
that accumulation, and any number of ranks, give the gradient of one big batch; dividing each micro-batch by its own
count does not (transformers PR 34191).

Every term runs in one fixed order on every rank, on whatever rows it has, also none: see the design's rule on empty slices.
Axes: `T tokens  D width  P embedded documents  M modalities  W ranks`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from weft.kernels.sliced_loss import sliced_cross_entropy
from weft.model.transformer import Transformer
from weft.tokenizers.pack import Batch
from weft.tokenizers.vocabulary import MODALITIES
from weft.training.distributed import gather_rows

REPORT = (*(f"nll/{m}" for m in MODALITIES), "main", "z_loss", "router_z_loss", "contrastive")
"""Names of the numbers that one micro-batch reports; all of them add up over micro-batches and ranks."""


@dataclass(frozen=True)
class LossConfig:
    """Weights of the loss terms."""

    modality_weight: dict[str, float] = field(default_factory=dict)
    """scale_m; 1 where it is not given. A token's own weight comes from the data's loss plan."""
    mean_over: Literal["modality", "tokens"] = "modality"
    """modality: every modality's mean counts once. tokens: one mean over all learnt tokens."""
    label_smoothing: float = 0.0
    z_loss: float = 1e-5
    """On log^2 of the output softmax's normaliser (PaLM, arXiv 2204.02311, section 5)."""
    router_z_loss: float = 1e-3
    """On the router's logits (ST-MoE, arXiv 2202.08906, equation 5)."""
    contrastive: float = 0.0
    """On InfoNCE between documents with the same pair key (arXiv 1807.03748); negatives are the documents of the same
    micro-step on all ranks, so its value (alone among the terms) depends on how a batch is split."""

    def __post_init__(self) -> None:
        for name in self.modality_weight:
            if name not in MODALITIES:
                raise ValueError(f"modality_weight names {name!r}; known modalities are {', '.join(MODALITIES)}")
        for name, weight in self.modality_weight.items():
            if weight < 0:
                raise ValueError(f"modality_weight of {name} must be 0 or more, got {weight:g}")
        for name in ("z_loss", "router_z_loss", "contrastive"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be 0 or more, got {getattr(self, name):g}")
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"label_smoothing must lie in [0, 1), got {self.label_smoothing:g}")


COUNTS = len(MODALITIES) + 2


def count(batch: Batch) -> Tensor:
    """float64 [M + 2]: learnt tokens of each target modality, tokens that are not padding, embedded documents."""
    learnt = torch.bincount(batch.target_modality[batch.weight > 0], minlength=len(MODALITIES))[: len(MODALITIES)]
    real = torch.count_nonzero(batch.ids)
    return torch.cat([learnt, real[None], torch.tensor([len(batch.embed_at)], device=learnt.device)]).double()


@dataclass(frozen=True)
class Totals:
    """What the whole step holds, on all ranks and micro-steps, and this micro-step's part of the contrastive exchange."""

    tokens: tuple[float, ...]  # per modality
    real: float
    pairs: float
    pair_sizes: tuple[int, ...]  # documents per rank in this micro-step


def totals(counts_WKN: Tensor) -> list[Totals]:
    """Counts [W, micro-steps, M + 2] of all ranks -> one `Totals` per micro-step."""
    whole = counts_WKN.sum((0, 1)).tolist()
    return [
        Totals(tuple(whole[:-2]), whole[-2], whole[-1], tuple(int(n) for n in counts_WKN[:, k, -1].tolist()))
        for k in range(counts_WKN.size(1))
    ]


def info_nce(embedding: Tensor, pair: Tensor, scale: Tensor) -> Tensor:
    """Sum over anchors of -log softmax mass on their positives; an anchor without a positive counts nothing.

    embedding [P D] of unit length, pair int64 [P], scale = 1 / temperature. Several positives share the mass (SupCon, arXiv
    2004.11362, "in" form). No documents, or no positives, give a zero that is still connected to every parameter.
    """
    logits = (embedding @ embedding.mT) * scale
    itself = torch.eye(len(pair), dtype=torch.bool, device=pair.device)
    positive = (pair[:, None] == pair[None]) & ~itself
    has = positive.any(-1)
    rows = logits.masked_fill(itself, float("-inf"))[has]
    mass = torch.logsumexp(rows.masked_fill(~positive[has], float("-inf")), -1) if len(rows) else rows.sum(-1)
    whole = torch.logsumexp(rows, -1) if len(rows) else rows.sum(-1)
    return (whole - mass).sum()


class Objective(nn.Module):
    """Model and loss as one module: what an engine runs forward and backward."""

    def __init__(self, model: Transformer, config: LossConfig, recompute: bool = False) -> None:
        super().__init__()
        self.model = model
        self.config = config
        self.recompute = recompute
        self.slices = model.config.slices
        self.scale = [config.modality_weight.get(m, 1.0) for m in MODALITIES]

    def forward(self, batch: Batch, whole: Totals) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(loss to differentiate, report float64 [R] in the order of `REPORT`, router load int64 [layers M E], growth [1 +
        layers]: rms of the residual stream and every layer's bound on attention logits)."""
        output = self.model(batch, recompute=self.recompute)
        nll, z = self.token_losses(output.hidden, batch)
        weight = self.token_weight(batch, whole)
        main = torch.dot(weight, nll.float())
        learnt = batch.weight > 0
        z_term = torch.dot(learnt.to(z.dtype), z) / max(1.0, sum(whole.tokens))
        router = output.router.z_loss * (torch.count_nonzero(batch.ids) / max(1.0, whole.real))
        pairs = self.contrastive(output.hidden, batch, whole)
        c = self.config
        loss = main + c.z_loss * z_term + c.router_z_loss * router + c.contrastive * pairs
        report = self.report(nll, batch, [main, z_term, router, pairs])
        growth = torch.cat([output.monitors["residual_rms"][None], output.monitors["logit_bound"]])
        return loss, report, output.router.load, growth.double()

    def token_losses(self, hidden: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """(nll [T], squared log-normaliser [T]); positions without weight give zeros."""
        at = torch.nonzero(batch.weight > 0).flatten()
        nll, z = sliced_cross_entropy(
            hidden[at],
            self.model.output_weight,
            batch.target[at],
            batch.target_slice[at],
            self.slices,
            label_smoothing=self.config.label_smoothing,
        )
        zeros = nll.new_zeros(hidden.size(0))
        return zeros.index_copy(0, at, nll), zeros.index_copy(0, at, z)

    def token_weight(self, batch: Batch, whole: Totals) -> Tensor:
        """float32 [T]: what each token's nll is multiplied by."""
        if self.config.mean_over == "tokens":
            per = [scale / max(1.0, sum(whole.tokens)) for scale in self.scale]
        else:
            per = [scale / max(1.0, n) for scale, n in zip(self.scale, whole.tokens)]
        return batch.weight * torch.tensor(per, device=batch.weight.device)[batch.target_modality]

    def contrastive(self, hidden: Tensor, batch: Batch, whole: Totals) -> Tensor:
        """InfoNCE over the micro-step's documents on all ranks, divided by the step's documents."""
        wanted = slice(None) if self.config.contrastive else slice(0)  # the head runs either way, perhaps on no rows
        sizes = list(whole.pair_sizes) if self.config.contrastive else [0] * len(whole.pair_sizes)
        embedding = self.model.embed(hidden[batch.embed_at[wanted]])
        everyone = gather_rows(embedding, sizes)
        pair = gather_rows(batch.embed_pair[wanted, None], sizes)[:, 0]
        scale = self.model.embed_head.scale
        scale = scale.detach() + (scale - scale.detach()) / len(
            sizes
        )  # every rank computes the whole term, and ranks are summed
        return info_nce(everyone, pair, scale) / max(1.0, whole.pairs)

    def report(self, nll: Tensor, batch: Batch, terms: list[Tensor]) -> Tensor:
        """float64 [R], without gradient."""
        with torch.no_grad():
            learnt = torch.where(batch.weight > 0, nll, 0.0).double()
            sums = learnt.new_zeros(len(MODALITIES)).index_add_(0, batch.target_modality, learnt)
            return torch.cat([sums, torch.stack([term.detach().double() for term in terms])])


def means(report: Tensor, whole: Totals, config: LossConfig, world: int = 1) -> dict[str, float]:
    """Summed reports -> what a reader wants: the loss, mean nll in nats per modality that occurs, and each term.

    The contrastive term is computed whole on every rank, so its sum over ranks is divided by their number.
    """
    values = dict(zip(REPORT, report.tolist()))
    terms = {name: values[name] for name in ("z_loss", "router_z_loss")} | {"contrastive": values["contrastive"] / world}
    loss = values["main"] + config.z_loss * terms["z_loss"] + config.router_z_loss * terms["router_z_loss"]
    out: dict[str, float] = {"loss": loss + config.contrastive * terms["contrastive"]}
    out.update({f"loss/{m}": values[f"nll/{m}"] / n for m, n in zip(MODALITIES, whole.tokens) if n})
    return out | {name: value for name, value in terms.items() if name != "contrastive" or config.contrastive}
