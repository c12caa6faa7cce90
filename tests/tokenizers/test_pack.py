"""Packing loses nothing, mixes nothing and counts what it costs."""

from __future__ import annotations

import sys
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from weft.tokenizers.grammar import parse
from weft.tokenizers.pack import PAD, collate, cut_stream, fit, pack, pack_rows, pair_number, unpack
from weft.tokenizers.plan import PRESETS
from weft.tokenizers.segment import Action, ActionSpace, Audio, Document, Image, Sensor, Text, Video
from weft.tokenizers.stream import Stream, StreamError

sys.path.insert(0, str(Path(__file__).parent))
from mixtures import bundle, documents

FIELDS = ("ids", "modality", "position", "channel", "landmark", "two_way", "output_slice", "weight")


def same(a: Stream, b: Stream) -> bool:
    return (
        all(np.array_equal(getattr(a, name), getattr(b, name)) for name in FIELDS)
        and a.features.keys() == b.features.keys()
        and all(np.array_equal(a.features[m], b.features[m]) for m in a.features)
        and all(np.array_equal(a.feature_at[m], b.feature_at[m]) for m in a.feature_at)
    )


def streams_of(docs: list[Document], plan: str = "dense") -> list[Stream]:
    rng = np.random.default_rng(0)
    return [bundle().encode(doc, PRESETS[plan], rng) for doc in docs]


@settings(deadline=None, max_examples=60)
@given(st.lists(documents, min_size=1, max_size=7), st.integers(0, 37), st.sampled_from([None, 1, 2, 5]))
def test_packing_and_unpacking_is_the_identity(docs: list[Document], extra: int, rows: int | None) -> None:
    streams = streams_of(docs)
    length = max(len(stream) for stream in streams) + extra
    batches = pack(streams, length, rows)
    found = [stream for batch in batches for stream in unpack(batch)]
    assert len(found) == len(streams)
    for stream in streams:
        at = next(i for i, other in enumerate(found) if same(stream, other))
        found.pop(at)
    for batch in batches:
        assert len(batch.ids) == batch.rows * length
        assert rows is None or batch.rows == rows


@settings(deadline=None, max_examples=40)
@given(st.lists(documents, min_size=1, max_size=5))
def test_a_batch_says_of_every_token_what_comes_next_in_its_document(docs: list[Document]) -> None:
    streams = streams_of(docs)
    length = max(len(s) for s in streams) + 3
    for batch in pack(streams, length, 2):
        document, ids = batch.document.numpy(), batch.ids.numpy()
        assert (np.diff(document) >= 0).all() and document[0] == 0 and len(np.unique(document)) == document[-1] + 1
        edge = np.arange(len(ids)) // length
        for number in np.unique(document):
            assert len(np.unique(edge[document == number])) == 1, "a document never crosses a row"
        inside = np.r_[document[1:] == document[:-1], False] & (ids != PAD)
        assert np.array_equal(batch.target.numpy()[inside], np.roll(ids, -1)[inside])
        assert (batch.target.numpy()[~inside] == 0).all() and (batch.weight.numpy()[~inside] == 0).all()
        first, end = np.array(bundle().vocabulary.slices)[batch.target_slice.numpy()[inside]].T
        target = batch.target.numpy()[inside]
        assert ((first <= target) & (target < end)).all()
        blocks = batch.two_way.numpy()
        for number in np.unique(blocks[blocks >= 0]):
            assert len(np.unique(document[blocks == number])) == 1
            assert (np.diff(np.flatnonzero(blocks == number)) == 1).all()
        assert set(batch.features) == {"image", "video", "audio", "sensor", "action"}


def test_every_modality_has_its_features_even_where_there_are_none() -> None:
    batch = collate([bundle().encode(Text(text="a"))])
    assert {name: tuple(rows.shape) for name, rows in batch.features.items()} == {
        "image": (0, 2),
        "video": (0, 2),
        "audio": (0, 2),
        "sensor": (0, 1),
        "action": (0, 1),
    }


def test_padding_is_a_document_of_its_own_in_every_row() -> None:
    a = bundle().encode(Text(text="a"))
    batch = collate([[a, a], [a], []], length=2 * len(a) + 2)
    assert batch.rows == 3
    ids = batch.ids.view(3, -1)
    document = batch.document.view(3, -1)
    assert (ids[2] == PAD).all() and document[2].unique().tolist() == [5]
    assert document[0].unique().tolist() == [0, 1, 2] and document[1].unique().tolist() == [3, 4]
    assert batch.weight[ids.reshape(-1) == PAD].sum() == 0


@settings(deadline=None, max_examples=100)
@given(st.lists(st.integers(1, 50), max_size=60), st.integers(50, 90))
def test_rows_hold_every_document_once_and_never_too_much(lengths: list[int], length: int) -> None:
    rows = fit(lengths, length)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in row) <= length for row in rows)
    # Best fit leaves at most one row half empty.
    assert sum(2 * sum(lengths[i] for i in row) < length for row in rows) <= 1


def test_pairs_are_embedded_at_the_last_closing_token_with_the_same_number() -> None:
    tok = bundle()
    streams = [
        tok.encode(Document(segments=(Image(pixels=np.zeros((1, 1))),), pair="x")),
        tok.encode(Document(segments=(Text(text="a"),))),
        tok.encode(Document(segments=(Text(text="a"), Text(text="b")), pair="x")),
    ]
    batch = collate([streams])
    assert batch.embed_pair.tolist() == [pair_number("x")] * 2
    assert [tok.vocabulary.describe(int(batch.ids[i])) for i in batch.embed_at] == ["</image>", "</text>"]
    assert int(batch.embed_at[1]) == len(batch.ids) - 2


def test_a_long_document_is_cut_at_segment_borders_and_counted() -> None:
    tok = bundle()
    parts = [Text(text=f"the ball {i}") for i in range(9)]
    stream = tok.encode(parts, PRESETS["dense"])
    length = len(stream) // 3
    rows, report = pack_rows([stream, tok.encode(Text(text="a"))], length)
    assert report.cut == 1 and report.parts >= 3 and report.documents == 2
    assert 0 <= report.waste < 1 and f"{report.waste:.1%} padding" in str(report)
    texts = []
    for part in cut_stream(stream, length):
        assert len(part) <= length and (part.position[0] == 0).all() and part.position[1:].min() == 1
        texts += [segment.text for segment in tok.decode(part)]  # type: ignore[attr-defined]
    assert texts == [f"the ball {i}" for i in range(9)]
    assert sum(len(row) for row in rows) == report.parts + 1


@settings(deadline=None, max_examples=60)
@given(documents.filter(lambda d: len(d.segments) > 0), st.integers(30, 60))
def test_parts_of_a_cut_document_are_streams_that_hold_all_of_it(document: Document, length: int) -> None:
    tok = bundle(0.05)
    stream = tok.encode(document, PRESETS["dense"], np.random.default_rng(1))
    parts = cut_stream(stream, length)
    whole: dict[int, list[int]] = {}
    for part in parts:
        assert len(part) <= length
        for piece in parse(part.ids, tok.vocabulary):
            whole.setdefault(int(part.segment[piece.start]), []).extend(piece.codes.tolist())
        for name, at in part.feature_at.items():
            assert len(at) == len(part.features[name])
    for number, (_, codes) in enumerate(tok.segments(stream)):
        assert whole[number] == codes.tolist()
    kept = sum(len(part.features[m]) for part in parts for m in part.features)
    assert kept == sum(map(len, stream.features.values()))


@pytest.mark.parametrize(
    "segment",
    [
        Text(text="the ball falls " * 20),
        Audio(samples=np.linspace(0, 1, 200), rate_hz=100.0),
        Video(frames=np.linspace(0, 1, 240).reshape(40, 2, 3), rate_hz=10.0),
        Sensor(values=np.linspace(-1, 1, 210).reshape(70, 3), kind="k3", rate_hz=9.0, start=0),
        Action(values=np.arange(150) % 5, space=ActionSpace(n=5), rate_hz=9.0),
    ],
    ids=lambda s: s.modality,
)
def test_a_segment_longer_than_a_row_is_cut_between_its_groups(segment) -> None:  # type: ignore[no-untyped-def]
    tok = bundle()
    stream = tok.encode(Document(segments=(Text(text="a"), segment)), PRESETS["gato"], np.random.default_rng(0))
    parts = cut_stream(stream, 53)
    assert len(parts) > 1
    codes = [p.codes for part in parts for p in parse(part.ids, tok.vocabulary) if part.segment[p.start] == 1]
    assert np.array_equal(np.concatenate(codes), tok.segments(stream)[1][1])
    closers = [part.weight[p.end - 1] for part in parts for p in parse(part.ids, tok.vocabulary) if part.segment[p.start] == 1]
    assert len(closers) > 1 and not any(closers[:-1]), "a closing token that the cut adds is not learnt"
    assert closers[-1] == (1.0 if segment.modality in ("text", "action") else 0.0)
    batch = collate(parts, 53)
    assert all(same(a, b) for a, b in zip(parts, unpack(batch)))


@pytest.mark.parametrize("timestamps", [False, True], ids=["plain", "timestamps"])
@pytest.mark.parametrize(
    "segment",
    [
        Text(text="the ball falls " * 20, start=3.0),
        Audio(samples=np.linspace(0, 1, 200), rate_hz=100.0, start=3.0),
        Video(frames=np.linspace(0, 1, 240).reshape(40, 2, 3), rate_hz=10.0, start=3.0),
        Sensor(values=np.linspace(-1, 1, 210).reshape(70, 3), kind="k3", rate_hz=9.0, start=3.0),
        Action(values=np.arange(150) % 5, space=ActionSpace(n=5), times=np.arange(150) ** 1.1 / 10, start=3.0),
    ],
    ids=lambda s: s.modality,
)
def test_parts_keep_the_clock_of_what_they_hold(segment, timestamps: bool) -> None:  # type: ignore[no-untyped-def]
    tok = bundle(timestamps=timestamps)
    stream = tok.encode(segment)
    parts, content = cut_stream(stream, 53), tok.entries[segment.modality].content
    assert len(parts) > 1
    found = []
    for part in parts:
        for piece in parse(part.ids, tok.vocabulary):
            first, last = piece.body[0], piece.body[1] - 1
            assert part.time[piece.start] == part.time[first] and part.time[piece.end - 1] == part.time[last]
            assert piece.stamp in (None, (int(part.time[first]) - 3 * 10**9) // 10**7)
            if segment.modality != "text":  # a text's tokens go on by one each
                assert part.position[[piece.start, piece.end - 1], 0].tolist() == part.position[[first, last], 0].tolist()
        (decoded,) = tok.decode(part)
        found.append(getattr(decoded, content))
        assert decoded.start == part.time[1]
        if segment.modality == "action":
            body = np.concatenate([np.arange(*piece.body) for piece in parse(part.ids, tok.vocabulary)])
            assert (np.array(decoded.times) + decoded.start).tolist() == part.time[body].tolist()
    (whole,) = tok.decode(stream)
    if segment.modality == "text":
        assert "".join(found) == segment.text
    else:
        assert np.array_equal(np.concatenate(found), getattr(whole, content))


def test_an_image_longer_than_a_row_is_an_error_that_says_so() -> None:
    stream = bundle().encode(Image(pixels=np.zeros((9, 9)), name="scan"))
    with pytest.raises(StreamError, match=r"image segment 'scan' has 8\d tokens .* raise its length"):
        pack([stream], 50)
    with pytest.raises(StreamError, match="length >= 2"):
        pack([stream], 1)
    with pytest.raises(StreamError, match="pack the documents first"):
        collate([[stream]], 20)


def test_a_batch_moves_whole() -> None:
    batch = collate([bundle().encode(Document(segments=(Image(pixels=np.zeros((1, 2))),), pair="p"))])
    moved = batch.to("meta")
    assert moved.rows == batch.rows
    for field in fields(batch):
        value = getattr(moved, field.name)
        tensors = value.values() if isinstance(value, dict) else [value]
        assert all(t.device.type == "meta" for t in tensors if isinstance(t, torch.Tensor))


def test_dtypes_are_those_that_the_model_reads() -> None:
    batch = collate([bundle().encode([Image(pixels=np.zeros((2, 2))), Text(text="a")])])
    int32 = {"position", "document", "two_way"}
    for field in fields(batch):
        value = getattr(batch, field.name)
        if isinstance(value, torch.Tensor):
            want = (
                torch.int32
                if field.name in int32
                else {"landmark": torch.bool, "weight": torch.float32}.get(field.name, torch.int64)
            )
            assert value.dtype == want, field.name
    assert all(rows.dtype == torch.float32 for rows in batch.features.values())
