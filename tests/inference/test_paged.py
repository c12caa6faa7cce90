"""Decoding over pages gives the model's own answers: replies, sessions, clones, snapshots, from threads."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.inference.alike import check_equal, check_threads
from tests.inference.conftest import PUSH, make_model, mixed_prompts, readings
from weft.inference.errors import CheckpointError
from weft.inference.feed import clone
from weft.inference.generalist import Generalist
from weft.inference.load import load
from weft.inference.paged import PagedModel
from weft.inference.sampling import Sampling
from weft.model.paged import CHOICE


def test_mixed_tasks_over_pages_equal_the_model(tiny: Generalist) -> None:
    check_equal(tiny, Generalist(PagedModel(tiny.model), tiny.tokenizer), 16)


def test_greedy_tokens_are_the_model_s_own(tiny: Generalist) -> None:
    inner = PagedModel(tiny.model)
    model, prompts = Generalist(inner, tiny.tokenizer), mixed_prompts(9, 3)
    for a, b in zip(tiny.generate(prompts, max_tokens=30), model.generate(prompts, max_tokens=30)):
        assert np.array_equal(a.tokens, b.tokens)
    assert len(inner._guests) == 16  # nine documents did not fit the first pages


def test_windows_and_landmarks_keep_their_lifetimes_in_pages(tiny: Generalist) -> None:
    model = make_model(tiny.tokenizer, window=7, max_landmarks=2, full_every=0)
    check_equal(Generalist(model, tiny.tokenizer), Generalist(PagedModel(model), tiny.tokenizer), 8)


@pytest.mark.parametrize("limits", [{}, {"full_tokens": 40, "landmarks": 4}], ids=["far limits", "limits that are met"])
def test_sessions_act_alike_and_come_back_from_a_snapshot(tiny: Generalist, limits: dict[str, int]) -> None:
    acted = []
    for model in (tiny, Generalist(PagedModel(tiny.model), tiny.tokenizer)):
        session = model.session(space=PUSH, rate_hz=50.0, sampling=Sampling(temperature=1.0), **limits)
        actions = []
        for k in range(12):
            session.push(readings(k, 1), 0.02 * k)
            actions.append(session.act().tolist())
            if k == 6:
                moment = session.snapshot()
        said = session.say(max_tokens=12).tokens.tolist()
        session.restore(moment)
        acted.append((actions, said, session.act(time=1.0).tolist(), session.say(max_tokens=12).tokens.tolist()))
    assert acted[0] == acted[1]


@pytest.mark.parametrize("limits", [{}, {"window": 5, "max_landmarks": 2, "full_every": 0}], ids=["as it is", "small windows"])
def test_what_comes_back_from_pages_is_what_the_model_would_hold(tiny: Generalist, limits: dict[str, int]) -> None:
    model = make_model(tiny.tokenizer, **limits) if limits else tiny.model
    sessions = [Generalist(m, tiny.tokenizer).session(prompt="the fox") for m in (model, PagedModel(model))]
    for _ in range(3):
        for session in sessions:
            session.say(max_tokens=9)
            session.push("and then")
            session.say(max_tokens=2)
        paged = sessions[1].cache.local.stay
        assert paged is not None and paged.row == 0, "the document did not lie in pages"
        copies = [clone(session.cache) for session in sessions]
        for kind in ("local", "full"):
            plain, other = (getattr(copy, kind) for copy in copies)
            assert (plain.length, plain.landmarks, plain.kept) == (other.length, other.landmarks, other.kept)
            live = [store.data[:, :, :, : store.used] for store in (plain, other)]
            assert live[0].shape == live[1].shape
            assert live[0].numel() == 0 or (live[0] - live[1]).abs().max() < 1e-5
        assert sessions[1].cache.local.stay is None


def test_rows_of_finished_replies_are_used_again(tiny: Generalist) -> None:
    inner = PagedModel(tiny.model)
    model = Generalist(inner, tiny.tokenizer)
    for i in range(3):
        model.generate([["the", readings(i)]], max_tokens=4)
    assert len(inner._guests) == 1


def test_threads_do_not_meet(tiny: Generalist) -> None:
    check_threads(tiny, Generalist(PagedModel(tiny.model), tiny.tokenizer), 4)


def test_load_takes_it_by_name_and_refuses_what_does_not_fit(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not isinstance(load(folder, device="cpu").model, PagedModel)
    assert isinstance(load(folder, device="cpu", cache="paged").model, PagedModel)
    monkeypatch.setenv(CHOICE.variable, "paged")
    assert isinstance(load(folder, device="cpu").model, PagedModel)
    with pytest.raises(CheckpointError, match="two ways to decode"):
        load(folder, device="cpu", compile=True)
    with pytest.raises(CheckpointError, match="'books' is unknown"):
        load(folder, device="cpu", cache="books")
