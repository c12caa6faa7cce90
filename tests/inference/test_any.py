"""`produce="any"`: the model chooses what comes next; with timestamps, when it happened is written too."""

from __future__ import annotations

import numpy as np
import pytest

from tests.inference.conftest import make_model, make_tokenizer, readings
from weft.inference.generalist import Generalist
from weft.tokenizers.stream import StreamConfig


@pytest.fixture(scope="module")
def timed() -> Generalist:
    """A model whose streams state times."""
    tokenizer = make_tokenizer(StreamConfig(timestamps=True))
    return Generalist(make_model(tokenizer), tokenizer)


def test_clocked_segments_of_any_reply_state_their_time_and_go_on_with_the_clock(timed: Generalist) -> None:
    prompt = ["say", readings(1, 3, start=1.0)]  # the third reading is at 1.04 s, so the next one is due at 1.06 s
    stamp = timed.tokenizer.vocabulary.special["<time>"]
    seen = 0
    for seed in range(24):
        reply = timed.generate(prompt, "any", max_tokens=60, temperature=1.5, seed=seed)
        assert np.array_equal(np.concatenate([part.ids for part in reply.parts])[: len(reply.tokens)], reply.tokens)
        score = timed.score(prompt, reply)
        assert np.abs(score.logprobs - reply.logprobs)[reply.drawn].max() < 1e-4
        starts = [segment.start for segment in reply.segments if segment.modality == "sensor"]
        assert starts == sorted(starts) and all(start >= 1_060_000_000 for start in starts)
        if starts:
            assert starts[0] == 1_060_000_000
            assert np.count_nonzero(reply.tokens == stamp) >= 1
            at = int(np.flatnonzero(reply.tokens == stamp)[0])
            assert reply.drawn[at] and not reply.drawn[at + 1 : at + 6].any()  # chosen to happen; when is the clock's
        seen += len(starts)
    assert seen >= 5


def test_any_goes_on_from_what_it_has_written(tiny: Generalist) -> None:
    """A second sensor segment follows the first one of the same reply."""
    for seed in range(40):
        reply = tiny.generate([readings(1, 3, start=1.0)], "any", max_tokens=120, temperature=1.5, seed=seed)
        sensors = [segment for segment in reply.segments if segment.modality == "sensor"]
        if len(sensors) >= 2:
            step = 20_000_000
            assert sensors[1].start == sensors[0].start + len(sensors[0].values) * step
            return
    raise AssertionError("no reply held two sensor segments; draw more seeds")
