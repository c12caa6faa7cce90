"""Sessions: the same stream as a whole document, flat memory, snapshots, many at once."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.inference.conftest import PUSH, make_model, make_tokenizer, picture, readings
from weft.benchmarks.speed.session import still_seen
from weft.inference import feed
from weft.inference.errors import SessionError
from weft.inference.generalist import Generalist
from weft.inference.request import Produce
from weft.inference.rollout import EpisodeSpec
from weft.inference.sampling import Sampling
from weft.inference.session import Session, Sessions, SessionSpec
from weft.tokenizers.plan import PRESETS
from weft.tokenizers.segment import Action, ActionSpace, Document, Sensor, Text
from weft.tokenizers.stream import ARRAYS, StreamConfig

STEP_NS = 20_000_000


def reading(k: int) -> Sensor:
    return Sensor(np.random.default_rng(k).normal(size=(1, 3)), rate_hz=50.0, kind="imu")


def test_a_session_writes_what_a_whole_document_would(tiny: Generalist) -> None:
    session = tiny.session(space=4, prompt="balance", sampling=Sampling(temperature=1.0))
    segments: list = [Text("balance", role="observed")]
    for k in range(7):
        session.push(reading(k), k * STEP_NS)
        action = int(session.act())
        segments.append(Sensor(reading(k).values, rate_hz=50.0, kind="imu", start=k * STEP_NS, role="observed"))
        segments.append(Action(np.array([action]), ActionSpace(n=4), start=k * STEP_NS, role="target"))
    whole = tiny.tokenizer.encode(Document(tuple(segments)), PRESETS["instruct"], close=False)
    with torch.inference_mode():
        (hidden,) = feed.extend(tiny.model, [tiny.model.new_cache()], [feed.part_of(whole)])
    assert len(whole) == len(session)
    assert (hidden[-1] - session.state()).abs().max() < 1e-5


def test_pushed_parts_equal_the_encoded_document() -> None:
    for chunk_s in (0.0, 2.0):
        tokenizer = make_tokenizer(StreamConfig(chunk_s=chunk_s))
        builder = tokenizer.builder()
        parts = [builder.open()]
        segments = []
        for k in range(6):
            for segment in (
                Sensor(reading(k).values, rate_hz=50.0, kind="imu", start=k * STEP_NS),
                Action(np.array([[0.5, 1.0]]), PUSH, start=k * STEP_NS),
            ):
                segments.append(segment)
                parts.append(builder.add(tokenizer.prepare([segment])))
        whole = tokenizer.encode(segments, close=False)
        for name in ARRAYS:
            if name != "segment":
                assert np.array_equal(getattr(whole, name), np.concatenate([getattr(p, name) for p in parts])), name


def bounded(tiny: Generalist) -> Generalist:
    return Generalist(make_model(tiny.tokenizer, window=16, full_every=2, layers=2), tiny.tokenizer)


def run_long(model: Generalist, tokens: int) -> list[int]:
    session = model.session(space=4, full_tokens=48, landmarks=8)
    sizes = []
    k = 0
    while len(session) < tokens:
        session.push(readings(k, 10), k * STEP_NS * 10)
        session.act()
        k += 1
        sizes.append(session.nbytes())
    kept = session.cache.local.landmarks, session.cache.full.landmarks, session.writer.builder.info
    assert all(len(part) <= 8 for part in kept)
    return sizes


def test_a_long_session_holds_memory_flat(tiny: Generalist) -> None:
    sizes = run_long(bounded(tiny), 5_000)
    assert len(set(sizes[len(sizes) // 10 :])) == 1


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_session_of_100_000_tokens_holds_memory_flat(tiny: Generalist) -> None:
    sizes = run_long(bounded(tiny), 100_000)
    assert len(set(sizes[len(sizes) // 100 :])) == 1


def check_fresh(tiny: Generalist, steps: int) -> int:
    """One layer, so that a token knows nothing but the keys it sees: a window of 16 and the last 3 landmarks."""
    model = make_model(tiny.tokenizer, window=16, full_every=0, layers=1, max_landmarks=3)
    session = Session(model, tiny.tokenizer, SessionSpec())
    written: list[feed.Part] = []
    for k in range(steps):
        session.push(reading(k), k * STEP_NS)
        written += session.writer.pending
        session.read()
    with torch.inference_mode():
        (hidden,) = feed.extend(model, [model.new_cache()], [still_seen(written, 16, 3)])
    assert (hidden[-1] - session.state()).abs().max() < 1e-5
    return len(session)


def test_a_long_session_answers_as_a_fresh_model_over_what_it_still_sees(tiny: Generalist) -> None:
    check_fresh(tiny, 60)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_session_of_100_000_tokens_answers_as_a_fresh_model(tiny: Generalist) -> None:
    assert check_fresh(tiny, 16_700) > 100_000


def test_snapshot_restores_and_forks_go_their_own_ways(tiny: Generalist) -> None:
    session = tiny.session(space=PUSH, sampling=Sampling(temperature=1.0, seed=3))
    for k in range(4):
        session.push(reading(k), k * STEP_NS)
        session.act()
    moment = session.snapshot()

    def go_on(s: Session) -> list[list[float]]:
        out = []
        for k in range(4, 8):
            s.push(reading(k), k * STEP_NS)
            out.append(s.act().tolist())
        return out

    twin = session.fork()
    first = go_on(session)
    assert go_on(twin) == first
    session.restore(moment)
    assert go_on(session) == first
    assert len({tuple(a) for a in first}) > 1


def test_many_sessions_get_what_each_gets_alone(tiny: Generalist) -> None:
    def begin(i: int) -> Session:
        s = tiny.session(space=4, sampling=Sampling(temperature=1.0, seed=i), prompt="go" * (1 + i))
        return s

    together, alone = [begin(i) for i in range(5)], [begin(i) for i in range(5)]
    group = Sessions(together)
    for k in range(5):
        group.push([reading(10 * i + k) for i in range(5)], k * STEP_NS)
        joint = group.act()
        for i, one in enumerate(alone):
            one.push(reading(10 * i + k), k * STEP_NS)
            assert int(one.act()) == int(joint[i])
    for one, other in zip(alone, together):
        assert torch.equal(one.state(), other.state())


def test_a_control_step_costs_one_pass_per_number(tiny: Generalist, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = 0
    extend = tiny.model.extend

    def counted(*args: object) -> object:
        nonlocal calls
        calls += 1
        return extend(*args)

    monkeypatch.setattr(tiny.model, "extend", counted)
    group = Sessions([tiny.session(space=4) for _ in range(20)])
    for k in range(3):
        group.push([reading(k)] * 20, k * STEP_NS)
        group.act()
    assert calls == 3


def test_say_and_forecast(tiny: Generalist) -> None:
    session = tiny.session()
    session.push(["watch", picture(1)])
    session.push(readings(1, 5), 1.0)
    before = len(session)
    forecast = session.forecast(3, samples=5)
    assert forecast.values.shape == (5, 3, 3) and len(session) == before
    assert (forecast.quantiles[0.05] <= forecast.quantiles[0.95]).all()
    said = session.say(max_tokens=6)
    assert len(session) == before + len(said.tokens)
    session.push(readings(2, 5), 2.0)


def test_rollout_is_the_same_in_any_batch_and_legal() -> None:
    gymnasium = pytest.importorskip("gymnasium")
    tokenizer = make_tokenizer()
    tokenizer.tokenizers["sensor"].fit("cartpole", [np.random.default_rng(0).normal(size=(50, 4))])
    model = Generalist(make_model(tokenizer), tokenizer)
    spec = EpisodeSpec("cartpole", 50.0, "balance the pole", sampling=Sampling(temperature=1.0))
    demo = [
        Sensor(np.zeros((1, 4)), rate_hz=50.0, kind="cartpole", start=0.0),
        Action(np.array([1]), ActionSpace(n=2), start=0.0),
    ]
    options = {"demonstrations": [demo], "max_steps": 12, "seed": 5}
    whole = model.rollout("CartPole-v1", spec, 4, **options)
    parts = model.rollout(lambda: gymnasium.make("CartPole-v1"), spec, 4, batch=3, **options)
    vector = model.rollout(gymnasium.make_vec("CartPole-v1", num_envs=3, vectorization_mode="sync"), spec, 4, **options)
    for other in (parts, vector):
        assert whole.returns.tolist() == other.returns.tolist()
        for a, b in zip(whole.episodes, other.episodes):
            assert np.array_equal(a.actions, b.actions) and np.array_equal(a.observations, b.observations)
    assert len({tuple(int(a) for a in e.actions) for e in whole.episodes}) > 1
    pendulum = EpisodeSpec("pendulum", 20.0)
    tokenizer.tokenizers["sensor"].fit("pendulum", [np.random.default_rng(0).normal(size=(50, 3))])
    (episode,) = model.rollout("Pendulum-v1", pendulum, 1, max_steps=3).episodes
    assert len(episode) == 3 and all(-2.0 <= float(a[0]) <= 2.0 for a in episode.actions)


def test_history_begins_a_fresh_document_every_so_many_steps() -> None:
    pytest.importorskip("gymnasium")
    tokenizer = make_tokenizer()
    tokenizer.tokenizers["sensor"].fit("pendulum", [np.random.default_rng(0).normal(size=(50, 3))])
    model = Generalist(make_model(tokenizer), tokenizer)
    space = ActionSpace(low=(-2.0,), high=(2.0,))
    for history in (1, 3):
        spec = EpisodeSpec("pendulum", 20.0, history=history)
        (episode,) = model.rollout("Pendulum-v1", spec, 1, max_steps=7, seed=2).episodes
        for t, action in enumerate(episode.actions):
            fresh = model.session(space=space, rate_hz=20.0)
            for k, at in enumerate(range(t - t % history, t + 1)):
                fresh.push(Sensor(episode.observations[at], rate_hz=20.0, kind="pendulum"), 50_000_000 * k)
                if at < t:
                    own = Action(episode.actions[at][None], space, rate_hz=20.0)
                    fresh.push(own, 50_000_000 * k, own=True)
            assert np.array_equal(fresh.act(), action)
    with pytest.raises(ValueError, match="history=0"):
        EpisodeSpec("pendulum", 20.0, history=0)


def test_own_actions_pushed_again_continue_the_same_stream(tiny: Generalist) -> None:
    first, again = tiny.session(space=PUSH), tiny.session(space=PUSH)
    for k in range(4):
        first.push(reading(k), k * STEP_NS)
        action = first.act()
        again.push(reading(k), k * STEP_NS)
        again.push(Action(action[None], PUSH), k * STEP_NS, own=True)
    assert (first.state() - again.state()).abs().max() < 1e-5


def test_an_action_is_taken_at_the_latest_reading(tiny: Generalist) -> None:
    """A block of readings that is pushed at once ends later than it starts, and the action belongs to its end."""
    block, last = readings(1, 5), 4 * STEP_NS
    now, then = tiny.session(space=4), tiny.session(space=4)
    for session in (now, then):
        session.push(block, 0)
    now.act()
    then.act(time=last)
    assert (now.state() - then.state()).abs().max() == 0 and now.now == last
    with pytest.raises(SessionError, match="in order of time"):
        now.push(reading(1), last - 1)


def test_what_was_planned_ahead_does_not_move_the_clock(tiny: Generalist) -> None:
    """After four actions at once, an action on the next reading is taken at that reading."""
    session = tiny.session(space=4, rate_hz=50.0)
    session.push(reading(0), 0)
    session.produce(Produce("action", space=4, readings=4, start=0, rate_hz=50.0))
    session.push(reading(1), STEP_NS)
    session.act()
    assert session.now == STEP_NS


def test_predict_acts_as_a_session_does(tiny: Generalist) -> None:
    """The same document, so the same action: its clock is that of what it answers."""
    for count in range(1, 5):
        clocked = Sensor(readings(count, count).values, rate_hz=50.0, kind="imu", start=0)
        session = tiny.session(space=4, sampling=Sampling(temperature=1.0, seed=count))
        session.push(clocked)
        reply = session.produce(Produce("action", space=4, start=(count - 1) * STEP_NS))
        alone = tiny.generate([clocked], "action", space=4, temperature=1.0, seed=count)
        assert np.array_equal(reply.tokens, alone.tokens)
        assert np.abs(reply.logprobs - alone.logprobs).max() < 1e-5


def test_a_session_stops_where_generate_stops(tiny: Generalist) -> None:
    options = {"temperature": 1.0, "seed": 5}
    whole = tiny.generate("the quick", max_tokens=40, **options).text
    stop = whole[3:5]
    session = tiny.session(prompt="the quick")
    said = session.say(40, stop=stop, **options)
    asked = tiny.generate("the quick", max_tokens=40, stop=stop, **options)
    assert said.text == asked.text == whole[: whole.index(stop)] and said.finish == asked.finish == "stop"
    assert session.say(3, **options).finish != "stop"


def test_a_horizon_in_seconds_is_one_in_readings(tiny: Generalist) -> None:
    forecasts = []
    for horizon in (0.06, 3):
        session = tiny.session()
        session.push(readings(1, 4), 0)
        forecasts.append(session.forecast(horizon, samples=3))
    assert forecasts[0].values.shape == (3, 3, 3) and np.array_equal(forecasts[0].values, forecasts[1].values)
