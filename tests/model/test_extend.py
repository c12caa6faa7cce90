"""Cached decoding and streaming against the full forward, and against themselves in other company."""

from itertools import pairwise

import pytest
import streams
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from weft.model.cache import CacheError, StreamCache
from weft.model.count import cache_bytes
from weft.model.transformer import Transformer


def build(**changes: object) -> Transformer:
    torch.manual_seed(0)
    return Transformer(streams.small_config(**changes)).eval()


def push(model: Transformer, document: object, borders: list[int], cache: StreamCache) -> torch.Tensor:
    return torch.cat([model.extend(streams.cut(document, a, b), [cache], [b - a]) for a, b in pairwise(borders)])


@settings(max_examples=15, deadline=None)
@given(
    length=st.integers(1, 97),
    seed=st.integers(0, 10**6),
    most=st.sampled_from([1, 2, 9, 50, 97]),
    window=st.sampled_from([None, 2, 5, 13, 64]),
    max_landmarks=st.sampled_from([None, 1, 3]),
)
def test_cached_equals_full_forward(length: int, seed: int, most: int, window: int | None, max_landmarks: int | None) -> None:
    model = build(window=window, max_landmarks=max_landmarks, full_every=3)
    document = streams.document(length, seed)
    with torch.no_grad():
        full = model(streams.join([document])).hidden
    cache = model.new_cache()
    assert (push(model, document, streams.cuts(document, seed, most), cache) - full).abs().max() < 1e-5
    assert cache.length == length


def test_prefill_longer_than_a_mask_block_equals_full_forward() -> None:
    model = build(layers=2, window=29, full_every=2, max_landmarks=7)
    document = streams.document(613, 5)
    with torch.no_grad():
        full = model(streams.join([document])).hidden
    assert (push(model, document, [0, 601, 602, 613], model.new_cache()) - full).abs().max() < 1e-5


@pytest.mark.parametrize("threads", [1, 2])
def test_a_document_has_the_same_bits_alone_and_in_company(threads: int) -> None:
    model = build(layers=2, full_every=2)
    documents = [streams.document(n, n) for n in (33, 47, 1, 21, 67)]
    borders = [streams.cuts(d, 7, 30) for d in documents]
    torch.set_num_threads(threads)
    try:
        alone = [push(model, d, b, model.new_cache()) for d, b in zip(documents, borders)]
        caches = [model.new_cache() for _ in documents]
        together: list[list[torch.Tensor]] = [[] for _ in documents]
        for turn in range(max(map(len, borders)) - 1):
            live = [s for s in range(5) if turn + 1 < len(borders[s])]
            parts = [streams.cut(documents[s], borders[s][turn], borders[s][turn + 1]) for s in live]
            lengths = [len(p.ids) for p in parts]
            hidden = model.extend(streams.join(parts), [caches[s] for s in live], lengths)
            for s, rows in zip(live, hidden.split(lengths)):
                together[s].append(rows)
    finally:
        torch.set_num_threads(1)
    assert all(torch.equal(torch.cat(rows), a) for rows, a in zip(together, alone, strict=True))
    hidden = torch.randn(19, 40)
    with torch.no_grad():
        assert torch.equal(model.logits(hidden, 1)[7:8], model.logits(hidden[7:8], 1))
        assert torch.equal(model.embed(hidden)[7:8], model.embed(hidden[7:8]))


def test_documents_of_equal_length_keep_their_bits_when_they_share_a_call() -> None:
    model = build()
    documents = [streams.document(31, seed, two_way=False) for seed in range(5)]
    alone = [push(model, d, [0, 20, *range(21, 32)], model.new_cache()) for d in documents]
    caches = [model.new_cache() for _ in documents]
    together = []
    for a, b in pairwise([0, 20, *range(21, 32)]):
        hidden = model.extend(streams.join([streams.cut(d, a, b) for d in documents]), caches, [b - a] * 5)
        together.append(hidden.view(5, b - a, -1))
    assert torch.equal(torch.cat(together, 1), torch.stack(alone))


def test_memory_of_local_layers_is_bounded() -> None:
    model = build(full_every=0, window=13, max_landmarks=4)
    document = streams.document(400, 1, two_way=False)
    cache = model.new_cache()
    push(model, document, list(range(0, 401, 8)), cache)
    assert 13 <= cache.local.used <= 13 + 4
    assert cache.nbytes() == cache_bytes(model.config, 400, landmarks=100)


def test_live_slots_are_what_the_config_says() -> None:
    model = build(window=13, max_landmarks=4)
    cache = model.new_cache()
    push(model, streams.document(90, 1, two_way=False), [0, 90], cache)
    live = sum(t.numel() * t.element_size() for name, t in cache.to_tensors().items() if name.endswith("data"))
    assert live == cache_bytes(model.config, 90, landmarks=cache.local.used - 13)


def test_clones_and_snapshots_continue_as_the_original() -> None:
    model = build(max_landmarks=3)
    document = streams.document(70, 9, two_way=False)
    cache = model.new_cache()
    push(model, document, [0, 40, 41], cache)
    copies = [cache.clone(), StreamCache.from_tensors(model.config, cache.to_tensors())]
    original = push(model, document, [41, 50, 51, 70], cache)
    for copy in copies:
        assert copy.length == 41
        assert torch.equal(push(model, document, [41, 50, 51, 70], copy), original)
    with pytest.raises(CacheError, match="snapshot"):
        StreamCache.from_tensors(streams.small_config(layers=3), cache.to_tensors())


def test_calls_that_do_not_fit_are_refused() -> None:
    model = build()
    document = streams.document(60, 2, modality=1)
    at = int(torch.nonzero(document.two_way >= 0)[0]) + 1
    assert document.two_way[at] == document.two_way[at - 1]
    cache = model.new_cache()
    model.extend(streams.cut(document, 0, at), [cache], [at])
    with pytest.raises(CacheError, match="image whole"):
        model.extend(streams.cut(document, at, 60), [cache], [60 - at])
    with pytest.raises(CacheError, match="do not fit"):
        model.extend(streams.cut(document, 0, 5), [cache], [4])
    with pytest.raises(CacheError, match="twice"):
        model.extend(streams.cut(document, 0, 4), [cache, cache], [2, 2])
