"""What goes wrong slowly: loss spikes, growing activations, dead experts, a modality that the model ignores.

In: the outcome of every step. Out: figures for the log and alarms in plain words. Windows are plain lists that travel in the
checkpoint, so that a resumed run raises the same alarms. Thresholds are proposals to be calibrated on a first healthy run.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from weft.model.transformer import Transformer
from weft.tokenizers.pack import Batch
from weft.tokenizers.vocabulary import MODALITIES, SLICE_OF


@dataclass(frozen=True)
class MonitorConfig:
    """Which alarms ring, and how often the dearer figures are taken."""

    spike: float = 6.0
    """Robust z-score (median, MAD) of a loss or of the gradient norm against the window; 0 = off."""
    window: int = 128
    """Applied, finite steps that the window holds."""
    router_every: int = 50
    """Steps over which router load is summed for one report."""
    probe_every: int = 500
    """Steps between probes (entropy, is a modality used); 0 = off."""
    agree_every: int = 500
    """Steps between comparisons, bit by bit, of the weights that ranks hold together; every checkpoint is preceded by one too.
    0 = by that one only."""
    growth: float = 2.0
    """Alarm when the residual stream or an attention-logit bound grows by more than this factor in 1000 steps."""
    logit_bound: float = 50.0
    """Alarm when attention logits can exceed this: Chameleon's slow divergence (arXiv 2405.09818, section 2.2) begins there."""

    def __post_init__(self) -> None:
        for name, least in (("window", 8), ("router_every", 1), ("probe_every", 0), ("agree_every", 0), ("spike", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if self.growth <= 1:
            raise ValueError(f"growth must be a factor above 1, got {self.growth:g}")


class Monitors:
    """All windows of a run."""

    def __init__(self, config: MonitorConfig) -> None:
        self.config = config
        self.windows: dict[str, list[float]] = {}
        self.load: list[Any] = []
        self.growth: list[list[float]] = []
        self.ignored: dict[str, int] = {}
        self.seen: dict[str, int] = {}

    def state(self) -> dict[str, Any]:
        """Plain data for the checkpoint."""
        names = ("windows", "load", "growth", "ignored", "seen")
        return {name: getattr(self, name) for name in names}

    def load_state(self, state: dict[str, Any]) -> None:
        """Put back what `state` gave."""
        for name in self.state():
            setattr(self, name, state[name])

    def step(
        self, step: int, metrics: dict[str, float], grad_norm: float, load: Tensor, growth: Tensor
    ) -> tuple[dict[str, float], list[str]]:
        """Figures and alarms of one applied step."""
        alarms = [*self._spikes({**{k: v for k, v in metrics.items() if k.startswith("loss")}, "grad_norm": grad_norm})]
        figures, more = self._router(step, load)
        alarms += more
        more_figures, more = self._growth(step, growth)
        return figures | more_figures, alarms + more

    def _spikes(self, values: dict[str, float]) -> list[str]:
        alarms = []
        for name, value in values.items():
            window = self.windows.setdefault(name, [])
            if self.config.spike and len(window) >= self.config.window // 2:
                z = robust_z(value, window)
                if z > self.config.spike:
                    alarms.append(
                        f"spike: {name} = {value:.4g} is {z:.1f} robust deviations above its last {len(window)} steps"
                    )
            window.append(value)
            del window[: -self.config.window]
        return alarms

    def _router(self, step: int, load: Tensor) -> tuple[dict[str, float], list[str]]:
        if load.numel() == 0:
            return {}, []
        held = torch.tensor(self.load, dtype=torch.int64) if self.load else torch.zeros_like(load)
        total = held + load.cpu()
        if (step + 1) % self.config.router_every:
            self.load = total.tolist()
            return {}, []
        self.load = []
        return router_report(total)

    def _growth(self, step: int, growth: Tensor) -> tuple[dict[str, float], list[str]]:
        if (step + 1) % self.config.router_every:
            return {}, []
        now = [float(v) for v in growth]
        figures = {"residual_rms": now[0], "attention_logit_bound": max(now[1:], default=0.0)}
        alarms = []
        old = next((row for row in self.growth if step - row[0] <= 1000), None)
        if old is not None and now[0] > self.config.growth * old[1]:
            alarms.append(f"growth: residual rms went from {old[1]:.3g} to {now[0]:.3g} in {step - int(old[0])} steps")
        if figures["attention_logit_bound"] > self.config.logit_bound:
            layer = max(range(1, len(now)), key=lambda i: now[i]) - 1
            alarms.append(f"growth: attention logits of layer {layer} can reach {now[layer + 1]:.1f}")
        self.growth = [row for row in self.growth if step - row[0] <= 1000]
        if math.isfinite(now[0]):  # a checkpoint cannot hold another number
            self.growth.append([float(step), now[0]])
        return figures, alarms

    def probe(self, model: Transformer, batch: Batch) -> tuple[dict[str, float], list[str]]:
        """Entropy per modality, and what each observed modality is worth to the others' targets."""
        figures = entropies(model, batch)
        alarms = []
        for modality, (delta, error) in modality_use(model, batch).items():
            figures[f"use/{modality}"] = delta
            self.ignored[modality] = self.ignored.get(modality, 0) + 1 if delta <= 2 * error else 0
            if self.ignored[modality] >= 5:
                alarms.append(
                    f"ignored: shuffling {modality} between documents costs {delta:.4f} nats (+-{error:.4f}) in 5 probes"
                )
        return figures, alarms

    def share(self, tokens: dict[str, float]) -> dict[str, float]:
        """Each modality's share of the learnt tokens so far."""
        for modality, n in tokens.items():
            self.seen[modality] = self.seen.get(modality, 0) + int(n)
        total = max(1, sum(self.seen.values()))
        return {f"token_share/{m}": self.seen[m] / total for m in MODALITIES if self.seen.get(m)}


def robust_z(value: float, window: list[float]) -> float:
    """(value - median) / (1.4826 MAD), with a floor of 1 % of the median under the deviation."""
    ordered = sorted(window)
    median = ordered[len(ordered) // 2]
    deviation = sorted(abs(v - median) for v in window)[len(window) // 2] * 1.4826
    return (value - median) / max(deviation, 0.01 * abs(median), 1e-12)


def router_report(load: Tensor) -> tuple[dict[str, float], list[str]]:
    """Load [layers M E] of a window -> evenness, largest share, dead experts, and agreement of expert and modality."""
    figures: dict[str, float] = {}
    alarms: list[str] = []
    experts = load.size(-1)
    for layer, table in enumerate(load.double()):
        total = table.sum()
        if total == 0 or experts == 1:
            continue
        share = table.sum(0) / total
        even = float(_entropy(share) / math.log(experts))
        top = float(share.max() * experts)
        dead = int((share == 0).sum())
        joint = table / total
        mutual = float(_entropy(joint.sum(1)) + _entropy(share) - _entropy(joint.flatten()))
        prefix = f"router/{layer}"
        figures |= {f"{prefix}/evenness": even, f"{prefix}/top": top, f"{prefix}/dead": dead, f"{prefix}/modality_nats": mutual}
        if even < 0.7 or top > 4 or dead:
            alarms.append(
                f"router: routed layer {layer} has evenness {even:.2f}, busiest expert {top:.1f}x, {dead} idle experts"
            )
        for m, row in enumerate(table):
            if row.sum() and m < len(MODALITIES):
                figures[f"{prefix}/{MODALITIES[m]}/evenness"] = float(_entropy(row / row.sum()) / math.log(experts))
    return figures, alarms


def _entropy(p: Tensor) -> Tensor:
    return -(p * p.clamp(min=1e-30).log()).sum()


@torch.no_grad()
def entropies(model: Transformer, batch: Batch, per_modality: int = 256) -> dict[str, float]:
    """Mean entropy in nats of the predicted distribution, by target modality, on the first `per_modality` learnt tokens."""
    hidden = model(batch).hidden
    figures = {}
    for m, name in enumerate(MODALITIES):
        at = torch.nonzero((batch.weight > 0) & (batch.target_modality == m)).flatten()[:per_modality]
        parts = []
        for k in sorted(set(batch.target_slice[at].tolist())):
            logp = model.logits(hidden[at[batch.target_slice[at] == k]], int(k)).float().log_softmax(-1)
            parts.append(-(logp.exp() * logp).sum(-1))
        if parts:
            figures[f"entropy/{name}"] = float(torch.cat(parts).mean())
    return figures


@torch.no_grad()
def modality_use(model: Transformer, batch: Batch) -> dict[str, tuple[float, float]]:
    """For each modality with content in context: (mean nll of OTHER modalities' targets behind it in its document, with that
    content moved between documents, minus intact; standard error). Near zero: the model ignores it."""
    base = _nll(model, batch)
    found = {}
    for m, name in enumerate(MODALITIES):
        moved = shuffled(batch, m, model.config.slices)
        others = (batch.weight > 0) & (batch.target_modality != m) & behind(batch, m)
        if moved is None or not bool(others.any()):
            continue
        difference = (_nll(model, moved) - base)[others].double()
        error = float(difference.std(unbiased=False)) / math.sqrt(len(difference))
        found[name] = (float(difference.mean()), error)
    return found


def behind(batch: Batch, m: int) -> Tensor:
    """bool [T]: positions that come after content of modality m in the same document."""
    at = torch.arange(len(batch.ids), device=batch.ids.device)
    document = batch.document.long()
    content = (batch.modality == m) & ~batch.landmark
    first = at.new_full((int(document.max()) + 1,), len(at))
    first.scatter_reduce_(0, document[content], at[content], "amin")
    return at > first[document]


def shuffled(batch: Batch, m: int, slices: tuple[tuple[int, int], ...]) -> Batch | None:
    """The batch with the content of modality m moved half-way round the batch: features, and codes of its own slice."""
    name = MODALITIES[m]
    first, end = slices[min(SLICE_OF[name], len(slices) - 1)]
    content = (batch.modality == m) & ~batch.landmark & (batch.ids >= first) & (batch.ids < end)
    at = torch.nonzero(content).flatten()
    rows = batch.features.get(name)
    moved_rows = rows is not None and len(rows) > 1
    if len(at) < 2 and not moved_rows:
        return None
    ids = batch.ids.clone()
    ids[at] = batch.ids[at].roll(len(at) // 2)
    features = dict(batch.features)
    if moved_rows:
        assert rows is not None
        features[name] = rows.roll(len(rows) // 2, 0)
    return replace(batch, ids=ids, features=features)


def _nll(model: Transformer, batch: Batch) -> Tensor:
    from weft.kernels.sliced_loss import sliced_cross_entropy

    hidden = model(batch).hidden
    at = torch.nonzero(batch.weight > 0).flatten()
    nll, _ = sliced_cross_entropy(
        hidden[at], model.output_weight, batch.target[at], batch.target_slice[at], model.config.slices
    )
    return nll.new_zeros(len(hidden)).index_copy(0, at, nll)
