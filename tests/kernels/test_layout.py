"""Laws of the key lifetimes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kernels.streams import Draw, draw, first_principles
from weft.kernels.layout import LayoutError, StreamLayout
from weft.kernels.tiles import key_tiles
from weft.kernels.xformers_bias import NotExpressible

STREAMS = st.builds(
    draw,
    seed=st.integers(0, 10**6),
    lengths=st.lists(st.integers(1, 17), min_size=1, max_size=4),
    landmarks=st.sampled_from([0.0, 0.15, 0.6]),
    blocks=st.sampled_from([0.0, 0.5, 1.0]),
    longest=st.sampled_from([2, 9, 17]),
)
WINDOWS = st.one_of(st.none(), st.integers(1, 20))
MANY = settings(max_examples=60, deadline=None)


def layout_of(stream: Draw, window: int | None, max_landmarks: int | None = None, last_medium: bool = False) -> StreamLayout:
    medium = stream.medium if last_medium else None
    return StreamLayout.build(stream.document, stream.landmark, stream.two_way, window, max_landmarks, medium)


@MANY
@given(STREAMS, WINDOWS, st.one_of(st.none(), st.integers(0, 3)), st.booleans())
def test_lifetimes_say_what_the_words_say(stream: Draw, window: int | None, most: int | None, last: bool) -> None:
    mask = layout_of(stream, window, most, last).dense_mask().numpy()
    np.testing.assert_array_equal(mask, first_principles(stream, window, most, last))


@MANY
@given(STREAMS, WINDOWS, st.one_of(st.none(), st.integers(0, 3)), st.booleans())
def test_ranges_hold_every_visible_key_once(stream: Draw, window: int | None, most: int | None, last: bool) -> None:
    layout = layout_of(stream, window, most, last)
    mask = layout.dense_mask().numpy()
    first, end = layout.first_key.numpy(), layout.end_key.numpy()
    assert (np.diff(first) >= 0).all() and (np.diff(end) >= 0).all()
    for query in range(len(layout)):
        listed = layout.landmark_at[int(layout.first_landmark[query]) : int(layout.end_landmark[query])].tolist()
        assert all(key < first[query] for key in listed)
        candidates = {*range(first[query], end[query]), *listed}
        assert set(np.flatnonzero(mask[query])) <= candidates
        assert query in candidates
        if not last:
            assert mask[query, first[query] : end[query]].all()


@MANY
@given(STREAMS, WINDOWS, st.sampled_from([1, 4, 7]))
def test_two_compares_per_tile_never_lie(stream: Draw, window: int | None, size: int) -> None:
    layout = layout_of(stream, window)
    mask = layout.dense_mask()
    tiles = key_tiles(layout.born, layout.dies, size)
    for a in range(0, len(layout), size):
        for number, first in enumerate(range(0, len(layout), size)):
            b = min(a + size, len(layout))
            block = mask[a:b, first : first + size]
            if tiles.dies_max[number] <= a or tiles.born_min[number] >= b:
                assert not block.any()
            if tiles.born_max[number] <= a and tiles.dies_min[number] >= b:
                assert block.all()


@MANY
@given(STREAMS, WINDOWS, st.sampled_from([1, 5]))
def test_query_tiles_cover_the_ranges_of_their_queries(stream: Draw, window: int | None, size: int) -> None:
    layout = layout_of(stream, window)
    tiles = layout.query_tiles(size)
    mask = layout.dense_mask().numpy()
    for number in range(len(tiles.first_key)):
        main = range(int(tiles.first_key[number]), int(tiles.end_key[number]))
        listed = layout.landmark_at[int(tiles.first_landmark[number]) : int(tiles.end_landmark[number])].tolist()
        seen = np.flatnonzero(mask[number * size : (number + 1) * size].any(0))
        assert set(seen) <= {*main, *listed}


@MANY
@given(STREAMS, WINDOWS)
def test_pairs_and_borders_count_the_mask(stream: Draw, window: int | None) -> None:
    layout = layout_of(stream, window)
    assert layout.pairs == int(layout.dense_mask().sum())
    assert layout.flops(heads=3, width=5) == 4 * 3 * 5 * layout.pairs
    lengths = torch.bincount(stream.document.long())
    assert layout.cu_seqlens().diff().tolist() == lengths[lengths > 0].tolist()


@MANY
@given(STREAMS, WINDOWS)
def test_block_mask_says_the_same(stream: Draw, window: int | None) -> None:
    layout = layout_of(stream, window)
    mask, size = layout.dense_mask(), 4
    block = layout.to_block_mask(size)
    tiles = -(-len(layout) // size)
    padded = torch.zeros(tiles * size, tiles * size, dtype=torch.bool)
    padded[: len(layout), : len(layout)] = mask
    needed = padded.view(tiles, size, tiles, size).any(3).any(1)
    assert bool((block.to_dense()[0, 0].bool() >= needed).all())
    full = torch.zeros(tiles, tiles, dtype=torch.bool)
    for row in range(tiles):
        full[row, block.full_kv_indices[0, 0, row, : block.full_kv_num_blocks[0, 0, row]].long()] = True
    assert bool((padded.view(tiles, size, tiles, size).all(3).all(1) >= full).all())
    at = torch.arange(len(layout))
    assert torch.equal(block.mask_mod(None, None, at[:, None], at[None]), mask)


def test_full_tiles_are_found_where_they_are() -> None:
    layout = layout_of(draw(0, [64], 0.0, 0.0), None)
    assert int(layout.to_block_mask(16).full_kv_num_blocks.sum()) == 6  # strictly below the diagonal of 4 x 4 tiles


@pytest.mark.parametrize("window", [None, 1, 5, 64])
def test_xformers_bias_materializes_to_the_same_mask(window: int | None) -> None:
    pytest.importorskip("xformers.ops.fmha.attn_bias")
    layout = layout_of(draw(1, [11, 1, 7, 5], 0.0, 0.0), window)
    bias = layout.to_xformers().materialize((1, len(layout), len(layout)))[0]
    assert torch.equal(bias == 0, layout.dense_mask())


def test_xformers_bias_of_documents_that_are_one_block_each() -> None:
    pytest.importorskip("xformers.ops.fmha.attn_bias")
    document = torch.tensor([0, 0, 0, 1, 1], dtype=torch.int32)
    layout = StreamLayout.build(document, torch.zeros(5, dtype=torch.bool), document, 2)
    assert torch.equal(layout.to_xformers().materialize((5, 5)) == 0, layout.dense_mask())


def test_what_xformers_cannot_say_is_named() -> None:
    with pytest.raises(NotExpressible, match="landmarks"):
        layout_of(draw(0, [30], 0.3, 0.0), 3).to_xformers()
    with pytest.raises(NotExpressible, match="two-way"):
        layout_of(draw(0, [30], 0.0, 1.0), None).to_xformers()


def test_a_layout_of_nothing_is_a_layout() -> None:
    none = torch.zeros(0, dtype=torch.int32)
    layout = StreamLayout.build(none, none.bool(), none, 4, 2, none)
    assert len(layout) == 0 and layout.pairs == 0 and layout.cu_seqlens().tolist() == [0]


def test_two_batches_of_equal_numbers_are_built_alike_on_int64() -> None:
    stream = draw(3, [13, 8])
    wide = Draw(stream.document.long(), stream.landmark, stream.two_way.long(), stream.medium.long())
    a, b = layout_of(stream, 5, 2, True), layout_of(wide, 5, 2, True)
    assert b.born.dtype == torch.int32 and torch.equal(a.born, b.born) and torch.equal(a.dies, b.dies)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"window": 0}, "window is 0"),
        ({"max_landmarks": -1}, "max_landmarks is -1"),
        ({"landmark": torch.zeros(4)}, "must be bool"),
        ({"two_way": torch.zeros(3)}, "two_way has shape"),
        ({"document": torch.tensor([0, 1, 0, 1])}, "must not decrease"),
    ],
)
def test_wrong_inputs_are_named(change: dict[str, object], message: str) -> None:
    right = {
        "document": torch.zeros(4),
        "landmark": torch.zeros(4, dtype=torch.bool),
        "two_way": torch.full((4,), -1),
        "window": 2,
    }
    with pytest.raises(LayoutError, match=message):
        StreamLayout.build(**{**right, **change})  # type: ignore[arg-type]
