"""Alarms ring for what they are there for, and stay silent in a healthy run."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from tests.training.synthetic import FEATURES, VOCABULARY, small_model, stream
from weft.model.transformer import Transformer
from weft.tokenizers.pack import Batch, collate
from weft.tokenizers.stream import Stream
from weft.tokenizers.vocabulary import MODALITIES
from weft.training.distributed import World
from weft.training.engine import EngineConfig, LocalEngine
from weft.training.loss import LossConfig
from weft.training.monitors import MonitorConfig, Monitors, behind, entropies, modality_use, robust_z, router_report, shuffled
from weft.training.optim import OptimizerConfig

NONE = torch.zeros(0, 0, 0, dtype=torch.int64)
CALM = torch.tensor([1.0, 5.0])


def feed(monitors: Monitors, losses: list[float], grad_norm: float = 1.0) -> list[str]:
    """The alarms of some steps that differ in their loss alone."""
    return [a for step, x in enumerate(losses) for a in monitors.step(step, {"loss": x}, grad_norm, NONE, CALM)[1]]


@pytest.mark.parametrize("seed", range(20))
def test_a_healthy_run_rings_nothing(seed: int) -> None:
    """A loss that falls and wobbles by 3 %."""
    draw = np.random.default_rng(seed)
    losses = [5.0 * (1 + n / 40) ** -0.5 * (1 + 0.03 * draw.normal()) for n in range(400)]
    assert feed(Monitors(MonitorConfig(window=64)), losses) == []


def test_a_spike_rings_once_and_does_not_stay_in_the_window() -> None:
    draw = np.random.default_rng(0)
    losses = [3.0 * (1 + 0.02 * draw.normal()) for _ in range(100)]
    alarms = feed(Monitors(MonitorConfig(window=64)), [*losses, 6.0, *losses[:50]])
    assert len(alarms) == 1 and alarms[0].startswith("spike: loss = 6")
    assert robust_z(6.0, losses) > 6 > robust_z(3.1, losses)


def test_windows_travel_through_a_checkpoint() -> None:
    one, other = Monitors(MonitorConfig(window=16)), Monitors(MonitorConfig(window=16))
    feed(one, [3.0, 3.1, 2.9] * 6)
    other.load_state(one.state())
    assert feed(other, [9.0]) == feed(one, [9.0]) and len(feed(other, [9.0])) == 1


def load_of(*experts: list[int]) -> torch.Tensor:
    """One routed layer: tokens per expert of text, then of image, ..."""
    table = torch.zeros(1, len(MODALITIES), len(experts[0]), dtype=torch.int64)
    for m, row in enumerate(experts):
        table[0, m] = torch.tensor(row)
    return table


def test_router_collapse_and_dead_experts_ring_and_even_load_does_not() -> None:
    figures, alarms = router_report(load_of([250, 240, 260, 250], [10, 12, 9, 11]))
    assert alarms == [] and figures["router/0/evenness"] > 0.99 and figures["router/0/dead"] == 0
    assert figures["router/0/modality_nats"] == pytest.approx(0, abs=0.01)
    _, alarms = router_report(load_of([1000, 1, 1, 1]))
    assert "evenness 0.0" in alarms[0]
    _, alarms = router_report(load_of([500, 500, 0, 500]))
    assert "1 idle experts" in alarms[0]
    figures, _ = router_report(load_of([100, 0, 0, 0], [0, 100, 0, 0], [0, 0, 100, 0], [0, 0, 0, 100]))
    assert figures["router/0/modality_nats"] == pytest.approx(math.log(4))  # each modality has an expert of its own
    assert figures["router/0/text/evenness"] == pytest.approx(0, abs=1e-6)


def test_load_is_summed_over_its_period_before_it_is_judged() -> None:
    monitors = Monitors(MonitorConfig(router_every=4))
    alarms = []
    for step in range(4):  # every step uses one expert, four steps use all
        row = [0, 0, 0, 0]
        row[step] = 100
        alarms += monitors.step(step, {}, 1.0, load_of(row), CALM)[1]
    assert alarms == []


def test_growing_activations_and_attention_logits_ring() -> None:
    monitors = Monitors(MonitorConfig(router_every=10))
    alarms = []
    for step in range(0, 200):
        growth = torch.tensor([1.0 + step / 60, 5.0, 5.0 + step / 3])
        alarms += monitors.step(step, {}, 1.0, NONE, growth)[1]
    assert any("residual rms went from" in a for a in alarms)
    assert any("attention logits of layer 1 can reach" in a for a in alarms)
    assert not any("layer 0" in a for a in alarms)


# ---- is a modality used?


def sights(count: int, seed: int, kinds: int = 2) -> list[Stream]:
    """An observed picture of one of two kinds (all features alike), then a word that says which."""
    found = []
    rng = np.random.default_rng(seed)
    for i in range(count):
        made = stream([("image", False), ("text", True)], seed * 1000 + i, size=3)
        kind = int(rng.integers(kinds))
        made.features["image"][:] = kind
        first, end = VOCABULARY.spans["image"]
        made.ids[(made.ids >= first) & (made.ids < end)] = first + kind
        first, end = VOCABULARY.spans["text"]
        words = np.flatnonzero((made.ids >= first) & (made.ids < end) & (made.weight > 0))
        made.ids[words] = first + 3 + kind
        found.append(made)
    return found


def fit(model: Transformer, steps: int) -> Batch:
    """Train on pictures and words; returns a held-out batch."""
    engine = LocalEngine(model, EngineConfig(), OptimizerConfig(lr=1e-2), LossConfig(), World())
    for step in range(steps):
        batch = collate([sights(16, step + 1)], 256, FEATURES)
        outcome = engine.forward_backward([batch], engine.exchange([batch], []).whole)
        assert outcome.finite
        engine.step(1.0)
    model.eval()
    return collate([sights(32, 0)], 512, FEATURES)


@pytest.fixture(scope="module")
def seeing() -> tuple[Transformer, Batch]:
    """A model that learnt to name pictures."""
    torch.manual_seed(0)
    model = small_model()
    return model, fit(model, 50)


def test_shuffling_a_modality_that_is_used_costs_loss(seeing: tuple[Transformer, Batch]) -> None:
    model, batch = seeing
    delta, error = modality_use(model, batch)["image"]
    assert delta > 0.2 and delta > 3 * error
    monitors = Monitors(MonitorConfig())
    assert [a for _ in range(6) for a in monitors.probe(model, batch)[1]] == []
    assert entropies(model, batch)["entropy/text"] < 1.0


def test_a_modality_that_is_ignored_rings_at_the_fifth_probe(seeing: tuple[Transformer, Batch]) -> None:
    model, batch = seeing
    blind = small_model()
    blind.load_state_dict(model.state_dict())
    first, end = VOCABULARY.spans["image"]
    with torch.no_grad():  # pictures of every kind look alike
        blind.embedding.tokens.weight[first:end] = 0
        for p in blind.embedding.features["image"].parameters():
            p.zero_()
    monitors = Monitors(MonitorConfig())
    alarms = [monitors.probe(blind, batch)[1] for _ in range(6)]
    assert [len([a for a in rung if "ignored: shuffling image" in a]) for rung in alarms] == [0, 0, 0, 0, 1, 1]


def test_only_what_stands_behind_a_modality_can_use_it() -> None:
    streams = [stream([("text", True), ("image", False), ("sensor", True)], 1, size=2), stream([("text", True)], 2, size=3)]
    batch = collate([streams], 32, FEATURES)
    found = behind(batch, MODALITIES.index("image"))
    first = int(torch.nonzero(batch.modality == MODALITIES.index("image"))[0])
    end = len(streams[0].ids)
    assert found.tolist() == [first < i < end for i in range(32)]


def test_shuffling_moves_one_modality_and_nothing_else() -> None:
    batch = collate([sights(4, 3)], 64, FEATURES)
    m = MODALITIES.index("image")
    moved = shuffled(batch, m, VOCABULARY.slices)
    assert moved is not None
    changed = torch.nonzero(moved.ids != batch.ids).flatten()
    assert all(int(batch.modality[i]) == m and not bool(batch.landmark[i]) for i in changed)
    assert sorted(moved.ids.tolist()) == sorted(batch.ids.tolist())
    assert not torch.equal(moved.features["image"], batch.features["image"])
    assert torch.equal(moved.target, batch.target)
    assert shuffled(collate([[stream([("text", True)], 1)]], 32, FEATURES), m, VOCABULARY.slices) is None


def test_entropy_of_an_untrained_model_is_near_that_of_a_fair_die() -> None:
    model = small_model().eval()
    with torch.no_grad():
        model.output_weight.mul_(1e-4)
    batch = collate([[stream([("text", True)], 1), stream([("sensor", True)], 2)]], 64, FEATURES)
    sizes = [end - first for first, end in VOCABULARY.slices]
    found = entropies(model, batch)
    assert found["entropy/text"] == pytest.approx(math.log(sizes[0]), rel=0.01)
    assert set(found) == {"entropy/text", "entropy/sensor"}


def test_token_shares_count_what_was_learnt() -> None:
    monitors = Monitors(MonitorConfig())
    monitors.share({"text": 30, "image": 10})
    assert monitors.share({"text": 30, "image": 10}) == {"token_share/text": 0.75, "token_share/image": 0.25}
