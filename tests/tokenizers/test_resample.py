"""Media that are read through a resampler: no row is lost, positions follow, and nothing else changes."""

from __future__ import annotations

import sys
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings

from weft.tokenizers.audio import AudioConfig, AudioTokenizer
from weft.tokenizers.bundle import StreamTokenizer
from weft.tokenizers.grammar import parse
from weft.tokenizers.image import ImageTokenizer
from weft.tokenizers.inspect import inspect_document
from weft.tokenizers.pack import cut_stream, pack, unpack
from weft.tokenizers.plan import PRESETS
from weft.tokenizers.resample import read_resample
from weft.tokenizers.segment import Audio, Document, Image, Text, Video
from weft.tokenizers.stream import Resample, Stream, StreamConfig, StreamError, join

sys.path.insert(0, str(Path(__file__).parent))
from mixtures import bundle, documents, text_tokenizer, tokenizers

SHAPES = {"image": Resample(6, 2), "video": Resample(4, 2), "audio": Resample(5, 1)}
rng = np.random.default_rng(0)


@lru_cache
def shortened(**config: float) -> StreamTokenizer:
    return StreamTokenizer.build(tokenizers(), StreamConfig(resample=SHAPES, **config))  # type: ignore[arg-type]


def rows_of(stream: Stream, segment: int, name: str) -> np.ndarray:
    """The feature rows of one segment, in order, without those that are absent."""
    mine = stream.segment[stream.feature_at[name]] == segment
    rows = stream.features[name][mine].reshape(-1, 2)
    return rows[~np.isnan(rows[:, 0])]


def whole_groups(stream: Stream) -> bool:
    at = {name: stream.feature_at[name].reshape(-1, shape.latents) for name, shape in SHAPES.items()}
    return all((np.diff(places, axis=1) == 1).all() for places in at.values())


@settings(deadline=None, max_examples=40)
@given(documents)
def test_every_row_is_in_the_stream_and_targets_are_as_before(document: Document) -> None:
    plain = bundle().encode(document, PRESETS["dense"], np.random.default_rng(1))
    stream = shortened().encode(document, PRESETS["dense"], np.random.default_rng(1))
    parse(stream.ids, shortened().vocabulary)
    assert whole_groups(stream)
    places = {info.source: i for i, info in enumerate(stream.info)}
    codes = [{info.source: codes for info, codes in tok.segments(s)} for tok, s in ((bundle(), plain), (shortened(), stream))]
    for i, info in enumerate(plain.info):
        j = places[info.source]
        assert stream.info[j].target == info.target, "which segments are drawn does not depend on the resampler"
        if info.target or info.modality not in SHAPES:
            assert np.array_equal(codes[0][info.source], codes[1][info.source]) and stream.info[j].grid == info.grid
            continue
        shape, before = SHAPES[info.modality], rows_of(plain, i, info.modality)
        assert np.array_equal(rows_of(stream, j, info.modality), before)
        groups = -(-len(before) // shape.tokens)
        assert (stream.segment[stream.feature_at[info.modality]] == j).sum() == groups * shape.latents
        medium = stream.info[j].medium
        assert medium is not None and (medium.grid, medium.group) == (info.grid, info.group)
        assert np.array_equal(medium.times, info.times) and len(stream.info[j].times) == groups ** (info.modality != "image")


def test_a_group_stands_at_the_time_of_its_first_row() -> None:
    seconds = Audio(samples=np.arange(11) / 10, rate_hz=1.0, start=0)
    stream = shortened().encode(seconds)
    at = stream.feature_at["audio"]
    assert (stream.time[at] / 1e9).tolist() == [0, 5, 10]
    film = Video(frames=np.zeros((3, 1, 2)), rate_hz=2.0, start=0)  # 6 rows: a group of two frames, and a group of one
    stream = shortened().encode(film)
    assert (stream.time[stream.feature_at["video"]] / 1e9).tolist() == [0, 0, 1, 1]
    assert np.isnan(stream.features["video"]).sum() == 2 * 2
    picture = shortened().encode(Image(np.zeros((4, 3))))
    at = picture.feature_at["image"]
    assert (picture.position[at, 1:] - picture.position[at[0], 1:]).tolist() == [[0, 0], [1, 0], [2, 0], [3, 0]]
    assert (picture.two_way[at] == 0).all()


@settings(deadline=None, max_examples=30)
@given(documents, documents)
def test_packing_keeps_rows_and_positions_in_step(one: Document, two: Document) -> None:
    streams = [shortened().encode(document) for document in (one, two)]
    (batch,) = pack(streams, max(map(len, streams)) + 3)
    found = {stream.ids.tobytes(): stream for stream in unpack(batch)}
    for stream in streams:
        again = found[stream.ids.tobytes()]
        for name in stream.features:
            assert np.array_equal(again.feature_at[name], stream.feature_at[name])
            assert np.array_equal(again.features[name], stream.features[name], equal_nan=True)


def test_long_media_are_cut_between_groups() -> None:
    sound = Audio(samples=rng.random(103), rate_hz=10.0)
    film = Video(frames=rng.random((31, 2, 2)), rate_hz=5.0)
    picture = Image(rng.random((5, 5)))
    stream = shortened().encode([sound, film, picture, Text("end")])
    parts = cut_stream(stream, 17)
    assert max(map(len, parts)) <= 17 and len(parts) > 4
    for part in parts:
        parse(part.ids, shortened().vocabulary)
        assert whole_groups(part)
    for name in SHAPES:
        pieces = np.concatenate([part.features[name] for part in parts])
        assert np.array_equal(pieces, stream.features[name], equal_nan=True)


def test_parts_of_a_document_are_the_document() -> None:
    segments = [
        Text("a"),
        Image(rng.random((3, 3))),
        Audio(rng.random(7), rate_hz=3.0),
        Video(rng.random((2, 1, 3)), rate_hz=2.0),
    ]
    whole, builder = shortened().encode(segments), shortened().builder()
    parts = [builder.open(), *(builder.add(shortened().prepare([segment])) for segment in segments), builder.close()]
    again = join([part for part in parts if part is not None])
    for name in ("ids", "position", "segment", "channel", "landmark", "two_way", "weight"):
        assert np.array_equal(getattr(again, name), getattr(whole, name)), name
    for name in SHAPES:
        assert np.array_equal(again.features[name], whole.features[name], equal_nan=True)


def test_the_order_of_handing_in_does_not_matter() -> None:
    segments = [
        Audio(rng.random(9), rate_hz=3.0, start=0.5),
        Video(rng.random((5, 2, 2)), rate_hz=2.0, start=0.0),
        Image(rng.random((2, 3)), start=1.0),
        Image(rng.random((2, 3)), start=1.0),
    ]
    one, two = shortened(chunk_s=1.0).encode(segments), shortened(chunk_s=1.0).encode(segments[::-1])
    assert np.array_equal(one.ids, two.ids) and np.array_equal(one.position, two.position)
    assert all(np.array_equal(one.features[m], two.features[m], equal_nan=True) for m in SHAPES)


def test_saved_with_the_tokenizer_and_part_of_its_digest(tmp_path: Path) -> None:
    parts = [text_tokenizer(), ImageTokenizer(), AudioTokenizer(AudioConfig(n_mels=4))]
    plain = StreamTokenizer.build(parts)
    tok = StreamTokenizer.build(parts, StreamConfig(resample={"image": {"tokens": 8, "latents": 2}, "audio": Resample(25, 5)}))  # type: ignore[dict-item]
    assert plain.config.to_dict() == {"chunk_s": 2.0, "tick_s": 0.04, "timestamps": False}, "digests of before stay valid"
    tok.save(tmp_path)
    again = StreamTokenizer.load(tmp_path, expect=tok.digest())
    assert again.resample() == tok.resample() == {"audio": {"tokens": 25, "latents": 5}, "image": {"tokens": 8, "latents": 2}}
    assert len({t.digest() for t in (plain, tok, replace_config(tok, {"image": Resample(8, 4)}))}) == 3
    assert tok.feature_sizes() == {"audio": 5 * plain.feature_sizes()["audio"], "image": 4 * plain.feature_sizes()["image"]}


def replace_config(tok: StreamTokenizer, shapes: dict[str, Resample]) -> StreamTokenizer:
    return StreamTokenizer.build(tok.tokenizers, replace(tok.config, resample=shapes))


@pytest.mark.parametrize(
    ("resample", "message"),
    [
        ({"image": {"tokens": 5, "latents": 2}}, "tokens=5 must be a multiple of latents=2"),
        ({"image": {"tokens": 5}}, "needs the keys tokens and latents"),
        ({"image": {"tokens": True, "latents": True}}, "from 1 to 65536"),
        ([("image", 4, 2)], "must map modalities"),
        ({"sensor": Resample(4, 2)}, r"resample\[sensor\]: only media"),
        ({"text": Resample(4, 2)}, r"resample\[text\]: only media"),
        ({"touch": Resample(4, 2)}, "there is no touch tokenizer"),
    ],
)
def test_what_cannot_be_resampled_is_refused(resample: object, message: str) -> None:
    with pytest.raises(StreamError, match=message):
        StreamTokenizer.build(tokenizers(), StreamConfig(resample=resample))  # type: ignore[arg-type]


def test_shapes_are_read_from_a_command_line() -> None:
    assert read_resample("") == {}
    assert read_resample("image=16:4, audio=25:5") == {"image": Resample(16, 4), "audio": Resample(25, 5)}
    for wrong in ("image", "image=16", "image=16:4:2", "image=a:b"):
        with pytest.raises(StreamError, match="write modality=rows:positions"):
            read_resample(wrong)


def test_a_picture_of_more_groups_than_there_are_numbers_is_refused() -> None:
    tok = replace_config(shortened(), {"image": Resample(1, 1)})
    with pytest.raises(StreamError, match="h=144 does not fit number tokens"):
        tok.encode(Image(np.zeros((12, 12))))


def test_resampled_media_are_shown_but_not_decoded() -> None:
    picture = Document((Image(rng.random((3, 3))),))
    with pytest.raises(StreamError, match="was read through a resampler"):
        shortened().decode(shortened().encode(picture))
    assert "2 x 2" in inspect_document(picture, shortened())
