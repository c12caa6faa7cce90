"""Compiled decoding gives the model's own answers, to rounding: replies, batches, sessions, snapshots."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.inference.alike import check_equal, check_threads
from tests.inference.conftest import PUSH, make_model, mixed_prompts, readings
from weft.inference.compiled import INPUTS, CompiledModel, Step, routed
from weft.inference.errors import CheckpointError
from weft.inference.generalist import Generalist
from weft.inference.lanes import KINDS, Lanes, idle, lanes_for
from weft.inference.load import load
from weft.inference.request import Produce
from weft.inference.sampling import Sampling
from weft.inference.session import Sessions


class Uncompiled(CompiledModel):
    """The same steps over the same lanes without the compiler: everything but the code that it writes."""

    def __init__(self, model: object) -> None:
        super().__init__(model, compiler=lambda step: step)


def test_steps_over_lanes_equal_the_model(tiny: Generalist) -> None:
    check_equal(tiny, Generalist(Uncompiled(tiny.model), tiny.tokenizer), 24)


def test_windows_and_landmarks_keep_their_lifetimes_in_lanes(tiny: Generalist) -> None:
    model = make_model(tiny.tokenizer, window=7, max_landmarks=2, full_every=0)
    plain, other = (Generalist(m, tiny.tokenizer) for m in (model, Uncompiled(model)))
    check_equal(plain, other, 12)


def test_sessions_in_lanes_act_as_sessions_do(tiny: Generalist) -> None:
    other = Generalist(Uncompiled(tiny.model), tiny.tokenizer)
    acted = []
    for model in (tiny, other):
        session = model.session(space=PUSH, rate_hz=50.0, full_tokens=40, landmarks=4, sampling=Sampling(temperature=1.0))
        actions = []
        for k in range(40):
            session.push(readings(k, 1), 0.02 * k)
            actions.append(session.act().tolist())
            if k == 20:
                moment = session.snapshot()
        session.restore(moment)
        acted.append((actions, session.act(time=1.0).tolist(), session.say(max_tokens=12).tokens.tolist()))
    assert acted[0] == acted[1]


def test_a_cache_that_leaves_its_lane_and_comes_back_is_the_same(tiny: Generalist) -> None:
    """Forks share nothing, and an idle neighbour's keys stay as they are."""
    model = Generalist(Uncompiled(tiny.model), tiny.tokenizer)
    group = [model.session(prompt=f"the fox {i}") for i in range(4)]
    alone = [tiny.session(prompt=f"the fox {i}") for i in range(4)]
    for chosen in ([0, 1, 2, 3], [1], [0, 1, 2], [2, 3], [0, 1, 2, 3], [3]):
        said = Sessions([group[i] for i in chosen]).produce([Produce("text", max_tokens=30)] * len(chosen))
        for i, reply in zip(chosen, said):
            assert np.array_equal(reply.tokens, alone[i].say(max_tokens=30).tokens)
    for one, two in zip(group, alone):
        assert (one.state() - two.state()).abs().max() < 1e-4


def test_threads_have_lanes_of_their_own(tiny: Generalist) -> None:
    check_threads(tiny, Generalist(Uncompiled(tiny.model), tiny.tokenizer), 8)


@pytest.mark.filterwarnings("ignore")  # the compiler's own
def test_loading_compiles_every_step_there_will_be(tiny: Generalist) -> None:
    """One version for one document and one for several, whatever their number and length."""
    made = []

    def compiler(step: Step) -> Callable[..., torch.Tensor]:
        def backend(graph: torch.fx.GraphModule, inputs: object) -> Callable[..., object]:
            made.append(graph)
            return graph.forward

        return torch.compile(step, dynamic=True, fullgraph=True, backend=backend)

    small = make_model(tiny.tokenizer, layers=2, full_every=2, window=16, experts=2)
    plain, model = Generalist(small, tiny.tokenizer), Generalist(CompiledModel(small, compiler), tiny.tokenizer)
    assert len(made) == 2
    for count, tokens in ((1, 3), (2, 70), (9, 3)):
        prompts = [["the fox " * (1 + i), readings(i)] for i in range(count)]
        for a, b in zip(*(g.generate(prompts, max_tokens=tokens, min_tokens=tokens) for g in (plain, model))):
            assert np.array_equal(a.tokens, b.tokens)
    assert len(made) == 2


def test_an_explanation_is_that_of_the_plain_model(tiny: Generalist) -> None:
    prompt = ["the fox", readings(2)]
    plain, other = (g.explain(prompt, "jumps") for g in (tiny, Generalist(Uncompiled(tiny.model), tiny.tokenizer)))
    assert plain == other


def test_lanes_of_finished_replies_are_used_again(tiny: Generalist) -> None:
    inner = Uncompiled(tiny.model)
    model = Generalist(inner, tiny.tokenizer)
    for i in range(5):
        model.generate([["the", readings(i)]], max_tokens=4)
    assert len(inner._pool) == 1
    assert [lanes_for(n) for n in (1, 2, 3, 4, 5, 16, 17)] == [1, 2, 4, 4, 8, 16, 32]


def test_gathered_experts_equal_masked_ones(tiny: Generalist) -> None:
    mlp = tiny.model.blocks[1].mlp
    x = torch.randn(5, tiny.model.config.width)
    with torch.inference_mode():
        together = routed(mlp, x)
        truth, _ = mlp(x)
        for i in range(5):
            assert (routed(mlp, x[i : i + 1])[0] - together[i]).abs().max() < 1e-5
    assert (together - truth).abs().max() < 1e-5


def test_a_compiler_that_fails_is_a_clear_error(tiny: Generalist) -> None:
    def broken(step: object) -> object:
        raise RuntimeError("no C++ compiler")

    with pytest.raises(CheckpointError, match=r"no C\+\+ compiler.*load without compile=True"):
        CompiledModel(tiny.model, compiler=broken)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.filterwarnings("ignore")  # the compiler's own
def test_the_compiled_step_equals_the_model(tiny: Generalist, folder: Path) -> None:
    compiled = load(folder, device="cpu", compile=True)
    assert isinstance(compiled.model, CompiledModel)
    check_equal(tiny, compiled, 40)
    prompts = mixed_prompts(20, 3)
    for a, b in zip(tiny.generate(prompts, max_tokens=40), compiled.generate(prompts, max_tokens=40)):
        assert np.array_equal(a.tokens, b.tokens)


def test_an_idle_lane_is_never_nan(tiny: Generalist) -> None:
    model = tiny.model
    lanes = Lanes(model.new_cache(), 4, dict.fromkeys(KINDS, 128))
    rows = {name: torch.zeros((4, 3) if name == "position" else 4, dtype=torch.int64) for name in INPUTS}
    with torch.inference_mode():
        hidden = Step(model)(**rows, **idle(lanes, model.device), **lanes.data)
    assert torch.isfinite(hidden).all()
