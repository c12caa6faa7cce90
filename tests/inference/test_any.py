"""`produce="any"`: the model chooses what comes next; with timestamps, when it happened is written too."""

from __future__ import annotations

import math

import numpy as np
import torch

from tests.inference.conftest import make_model, make_tokenizer, readings
from weft.inference.generalist import Generalist
from weft.inference.plans import producible
from weft.inference.prompts import encode, prefill
from weft.inference.writer import Writer, fork
from weft.tokenizers.bundle import StreamTokenizer
from weft.tokenizers.stream import StreamConfig

PROMPT = ["say", readings(1, 3, start=1.0)]  # the third reading is at 1.04 s, so the next one is due at 1.06 s
DUE = 1_060_000_000


def test_clocked_segments_of_any_reply_state_their_time_and_go_on_with_the_clock() -> None:
    tokenizer = make_tokenizer(StreamConfig(timestamps=True))
    timed, stamp = Generalist(make_model(tokenizer), tokenizer), tokenizer.vocabulary.special["<time>"]
    with torch.no_grad():  # a reply begins with a timestamp about every other time
        ((_, state),) = prefill(timed.model, [encode(tokenizer, PROMPT)])
        timed.model.output_weight[stamp] = state * math.log(300) / state.square().sum()
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


def test_any_goes_on_from_what_it_has_written(tokenizer: StreamTokenizer) -> None:
    """A second sensor segment follows the first one of the same reply, whoever chooses the tokens."""
    special, prompt = tokenizer.vocabulary.special, encode(tokenizer, PROMPT)
    writer = Writer(tokenizer, fork(prompt.builder))
    script = writer.write_any(lambda: producible(tokenizer, writer.builder.info, 99), 99)
    ask, tokens = next(script), []
    while True:
        wanted = [special["</doc>"]] if len(writer.written) == 2 else [special["<sensor>"], special["</sensor>"]]
        tokens.append(next((token for token in wanted if token in ask.legal), int(ask.legal[0])))
        try:
            ask = script.send(tokens[-1])
        except StopIteration:
            break
    written = np.concatenate([part.ids for part in writer.written])
    assert np.array_equal(written[: len(tokens)], tokens)
    sensors = [info for info in writer.builder.info if info.modality == "sensor"]
    assert [info.start for info in sensors] == [1_000_000_000, DUE, DUE + 20_000_000 * sensors[1].grid[0]]
