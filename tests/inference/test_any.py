"""`produce="any"`: the model chooses what comes next; with timestamps, when it happened is written too."""

from __future__ import annotations

import math

import numpy as np
import torch

from tests.inference.conftest import make_model, make_tokenizer, readings
from weft.inference.generalist import Generalist
from weft.inference.prompts import encode, prefill
from weft.tokenizers.stream import StreamConfig

PROMPT = ["say", readings(1, 3, start=1.0)]  # the third reading is at 1.04 s, so the next one is due at 1.06 s
DUE = 1_060_000_000


def eager(first: str, timestamps: bool) -> Generalist:
    """A model that begins a segment with the token `first` about every other time."""
    tokenizer = make_tokenizer(StreamConfig(timestamps=timestamps))
    model = Generalist(make_model(tokenizer), tokenizer)
    with torch.no_grad():
        ((_, state),) = prefill(model.model, [encode(tokenizer, PROMPT)])
        model.model.output_weight[tokenizer.vocabulary.special[first]] = state * math.log(300) / state.square().sum()
    return model


def test_clocked_segments_of_any_reply_state_their_time_and_go_on_with_the_clock() -> None:
    timed = eager("<time>", timestamps=True)
    stamp = timed.tokenizer.vocabulary.special["<time>"]
    seen = 0
    for seed in range(16):
        reply = timed.generate(PROMPT, "any", max_tokens=40, temperature=1.0, seed=seed)
        assert np.array_equal(np.concatenate([part.ids for part in reply.parts])[: len(reply.tokens)], reply.tokens)
        score = timed.score(PROMPT, reply)
        assert np.abs(score.logprobs - reply.logprobs)[reply.drawn].max() < 1e-4
        starts = [segment.start for segment in reply.segments if segment.modality == "sensor"]
        assert starts == sorted(starts) and starts[:1] in ([], [DUE])
        if starts:
            at = int(np.flatnonzero(reply.tokens == stamp)[0])
            assert reply.drawn[at] and not reply.drawn[at + 1 : at + 6].any()  # chosen to happen; when is the clock's
        seen += len(starts)
    assert seen >= 3


def test_any_goes_on_from_what_it_has_written() -> None:
    """A second sensor segment follows the first one of the same reply."""
    model = eager("<sensor>", timestamps=False)
    followed = 0
    for seed in range(16):
        reply = model.generate(PROMPT, "any", max_tokens=160, temperature=1.0, seed=seed)
        sensors = [segment for segment in reply.segments if segment.modality == "sensor"]
        due = DUE
        for segment in sensors:
            assert segment.start == due
            due += len(segment.values) * 20_000_000
        followed += len(sensors) > 1
    assert followed
