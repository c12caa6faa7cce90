"""Training with compiled blocks is training: the same losses, any lengths, a resume, and no program per batch."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch._dynamo.utils import counters

from tests.training import runs
from tests.training.synthetic import FEATURES, mixed_streams, small_model
from weft.tokenizers.pack import Batch, collate
from weft.training.distributed import World
from weft.training.engine import EngineConfig, LocalEngine, compile_blocks
from weft.training.loss import LossConfig
from weft.training.optim import OptimizerConfig
from weft.training.tracking import read_jsonl

pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute")


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    """Nothing compiled before, nothing left behind."""
    torch.compiler.reset()
    counters.clear()
    yield
    torch.compiler.reset()


def engine(**given: object) -> LocalEngine:
    """Three blocks: a dense one, and routed ones with two of four experts, one local and one full."""
    model = small_model(layers=3, experts=4, experts_per_token=2)
    return LocalEngine(model, EngineConfig(**given), OptimizerConfig(lr=1e-2), LossConfig(), World())  # type: ignore[arg-type]


def batch(documents: int, seed: int) -> Batch:
    row = mixed_streams(documents, seed)
    return collate([row], -(-sum(map(len, row)) // 32) * 32, FEATURES)


def take(one: LocalEngine, made: Batch) -> float:
    outcome = one.forward_backward([made], one.exchange([made], []).whole)
    assert outcome.finite
    one.step(1.0)
    one.model.update_router_bias(outcome.load)
    return outcome.metrics["loss"]


@pytest.mark.parametrize("backend", ["eager", pytest.param("aot_eager", marks=pytest.mark.slow)])
def test_losses_equal_the_plain_ones_and_new_lengths_need_no_new_program(backend: str) -> None:
    """eager: what the compiler takes apart and guards. aot_eager: its gradients too. Inductor is in the test below."""
    plain, compiled = engine(), engine()
    compile_blocks(compiled.model, backend=backend)
    lengths, programs = [], []
    for step, documents in enumerate((3, 5, 2, 9, 4, 7, 6)):
        made = batch(documents, step)
        lengths.append(len(made.ids))
        assert take(compiled, made) == pytest.approx(take(plain, made), rel=1e-5)
        programs.append(counters["stats"]["unique_graphs"])
    assert len(set(lengths)) >= 5
    assert 0 < programs[0] == programs[-1], programs
    for documents in (4, 8, 5):
        made = batch(documents, 50 + documents)
        assert compiled.evaluate([made])["loss"] == pytest.approx(plain.evaluate([made])["loss"], rel=1e-5)
        programs.append(counters["stats"]["unique_graphs"])
    assert programs[-3] == programs[-1] <= 2 * programs[0], programs
    assert not counters["recompile_limit"] and not counters["frames"].get("cache_limit")


@pytest.mark.slow
def test_a_compiled_run_that_is_stopped_and_continued_is_the_plain_run(tmp_path):
    """With inductor, through the run file's own switch."""
    steady = {"schedule": {"kind": "constant"}, "monitors": {"probe_every": 0}}
    runs.go(runs.config(tmp_path / "plain", max_steps=8, **steady))
    for steps in (4, 8):
        runs.go(runs.config(tmp_path / "compiled", max_steps=steps, engine={"compile": True}, **steady))
        torch.compiler.reset()
    rows = [read_jsonl(tmp_path / name / "metrics.jsonl") for name in ("compiled", "plain")]
    losses = [[row["loss"] for row in some if "loss" in row] for some in rows]
    assert len(losses[0]) == 8 and losses[0] == pytest.approx(losses[1], rel=1e-5)
