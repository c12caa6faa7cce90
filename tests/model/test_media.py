"""Media that have passed: hidden in training, in packed batches and in cached decoding alike."""

from itertools import pairwise

import pytest
import streams
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from weft.model.cache import CacheError, StreamCache
from weft.model.config import ConfigError
from weft.model.paged import PagedDecoder
from weft.model.transformer import Transformer

CHOSEN = (1, 2, 3)


def build(**changes: object) -> Transformer:
    torch.manual_seed(0)
    return Transformer(streams.small_config(last_medium=CHOSEN, **changes)).eval()


def push(model: Transformer, document: object, borders: list[int], cache: StreamCache) -> torch.Tensor:
    return torch.cat([model.extend(streams.cut(document, a, b), [cache], [b - a]) for a, b in pairwise(borders)])


def openings(document: object) -> list[int]:
    """First tokens of the media of a document."""
    kind, closes = document.modality.tolist(), document.landmark.tolist()
    return [i for i in range(1, len(kind)) if kind[i] in CHOSEN and (closes[i - 1] or kind[i - 1] != kind[i])]


@settings(max_examples=10, deadline=None)
@given(lengths=st.lists(st.integers(1, 47), min_size=1, max_size=3), seed=st.integers(0, 10**6))
def test_exactly_the_keys_of_passed_media_are_hidden(lengths: list[int], seed: int) -> None:
    model, plain = build(max_landmarks=4), Transformer(streams.small_config(max_landmarks=4))
    documents = [streams.document(n, seed + i) for i, n in enumerate(lengths)]
    batch = streams.join(documents)
    hidden = torch.zeros(sum(lengths), sum(lengths), dtype=torch.bool)
    start = 0
    for document in documents:
        begins = openings(document)
        for first, following in pairwise(begins):
            end = first
            while document.modality[end] == document.modality[first] and not document.landmark[end]:
                end += 1
            end += int(document.modality[end] == document.modality[first])
            hidden[start + following :, start + first : start + end] = True
        start += len(document.ids)
    for seen, all_seen in zip(model.layouts(batch), plain.layouts(batch), strict=True):
        assert torch.equal(seen.dense_mask(), all_seen.dense_mask() & ~hidden)


@settings(max_examples=12, deadline=None)
@given(
    length=st.integers(1, 97),
    seed=st.integers(0, 10**6),
    most=st.sampled_from([1, 2, 9, 97]),
    window=st.sampled_from([None, 2, 13, 64]),
    max_landmarks=st.sampled_from([None, 1, 3]),
)
def test_cached_equals_full_forward(length: int, seed: int, most: int, window: int | None, max_landmarks: int | None) -> None:
    model = build(window=window, max_landmarks=max_landmarks, full_every=3)
    document = streams.document(length, seed)
    with torch.no_grad():
        full = model(streams.join([document])).hidden
    assert (push(model, document, streams.cuts(document, seed, most), model.new_cache()) - full).abs().max() < 1e-5


def test_packed_documents_equal_each_alone_and_the_option_changes_something() -> None:
    model = build()
    documents = [streams.document(n, n) for n in (41, 1, 29)]
    batch = streams.join(documents)
    with torch.no_grad():
        packed = model(batch).hidden
        alone = torch.cat([model(streams.join([d])).hidden for d in documents])
        plain = Transformer(streams.small_config())
        plain.load_state_dict(model.state_dict())
        assert (plain(batch).hidden - packed).abs().max() > 1e-3
    assert (packed - alone).abs().max() < 1e-5


def test_clones_continue_as_the_original_and_documents_keep_their_bits_in_company() -> None:
    model = build(max_landmarks=3)
    document, other = streams.document(70, 9, two_way=False), streams.document(70, 4, two_way=False)
    cache = model.new_cache()
    push(model, document, [0, 40, 41], cache)
    copy, beside = cache.clone(), model.new_cache()
    push(model, other, [0, 41], beside)
    original = push(model, document, [41, 42, 70], cache)
    parts = [
        model.extend(streams.join([streams.cut(d, a, b) for d in (other, document)]), [beside, copy], [b - a] * 2)[b - a :]
        for a, b in pairwise([41, 42, 70])
    ]
    assert torch.equal(torch.cat(parts), original)


def test_what_cannot_hide_passed_media_refuses_them() -> None:
    with pytest.raises(CacheError, match="last_medium"):
        PagedDecoder(build(), rows=2, max_length=30)
    with pytest.raises(CacheError, match="media"):
        StreamCache.from_tensors(build().config, Transformer(streams.small_config()).new_cache().to_tensors())
    with pytest.raises(ConfigError, match="last_medium"):
        streams.small_config(last_medium=(6,))
    assert streams.small_config(last_medium=[1, 2]).last_medium == (1, 2)
