"""Decoding over a paged cache against `extend`, from a prefill of its own and from a past that `extend` built."""

from __future__ import annotations

import pytest
import streams
import torch

from weft.model.cache import CacheError
from weft.model.paged import PagedDecoder
from weft.model.transformer import Transformer


def build(**changes: object) -> Transformer:
    torch.manual_seed(0)
    return Transformer(streams.small_config(**changes)).eval()


LENGTHS, STEPS = (1, 11, 13, 14, 40), 18


@pytest.mark.parametrize("from_extend", [False, True], ids=["prefill", "adopt"])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"max_landmarks": 2},
        {"max_landmarks": 1, "window": 3, "full_every": 0},
        {"window": None, "head_width": 8, "rope_split": (2, 1, 1)},
        {"window": 64, "max_landmarks": 3},
    ],
    ids=["all landmarks", "two landmarks", "no full layers", "full layers", "a wide window"],
)
def test_steps_equal_extend(changes: dict[str, object], from_extend: bool) -> None:
    model = build(**changes)
    documents = [streams.document(n + STEPS, seed, two_way=False) for seed, n in enumerate(LENGTHS)]
    heads = [streams.cut(document, 0, n) for document, n in zip(documents, LENGTHS)]
    caches = [model.new_cache() for _ in documents]
    rows = [6, 2, 3, 5, 0]
    decoder = PagedDecoder(model, rows=7, max_length=max(LENGTHS) + STEPS, page=8)
    expect = model.extend(streams.join(heads), caches, LENGTHS)
    if from_extend:
        for row, cache in zip(rows, caches):
            decoder.adopt(row, cache)
    else:
        assert (decoder.prefill(streams.join(heads), rows) - expect).abs().max() < 1e-5
    for turn in range(STEPS):
        live = [s for s in range(len(LENGTHS)) if (turn + s) % 4]  # not every document takes part in every step
        tokens = streams.join([streams.cut(documents[s], caches[s].length, caches[s].length + 1) for s in live])
        expect = model.extend(tokens, [caches[s] for s in live], [1] * len(live))
        assert (decoder.step(tokens, [rows[s] for s in live]) - expect).abs().max() < 1e-5
    assert decoder.cache.faults() == []


def test_rows_that_do_not_fit_are_refused() -> None:
    model = build()
    decoder = PagedDecoder(model, rows=2, max_length=30)
    documents = [streams.document(5, 1, two_way=False), streams.document(4, 2, two_way=False)]
    with pytest.raises(CacheError, match="2 documents need as many different rows"):
        decoder.prefill(streams.join(documents), [0])
    with pytest.raises(CacheError, match="1 new tokens need as many different rows"):
        decoder.step(streams.cut(documents[0], 0, 1), [0, 0])
