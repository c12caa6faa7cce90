"""Laws of the stream: spans, order, positions, roles, and the way back to media."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from weft.tokenizers.bundle import StreamTokenizer
from weft.tokenizers.clock import segment_start, segment_times
from weft.tokenizers.grammar import parse
from weft.tokenizers.plan import PRESETS, LossPlan
from weft.tokenizers.segment import Action, ActionSpace, Audio, Document, Image, Segment, Sensor, Text, Video
from weft.tokenizers.stream import ARRAYS, NO_TIME, Stream, StreamConfig, StreamError, join

sys.path.insert(0, str(Path(__file__).parent))
from mixtures import BOX, LevelImage, bundle, documents, segments, tokenizers

chunks = st.sampled_from([0.0, 0.05, 2.0])
plans = st.sampled_from([None, *PRESETS])


def encode(tok: StreamTokenizer, document: Document, plan: str | None = None, seed: int = 0) -> Stream:
    return tok.encode(document, PRESETS[plan] if plan else None, np.random.default_rng(seed))


def assert_same(a: Stream, b: Stream) -> None:
    for name in ARRAYS:
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name), err_msg=name)
    assert a.features.keys() == b.features.keys()
    for name in a.features:
        np.testing.assert_array_equal(a.features[name], b.features[name])
        np.testing.assert_array_equal(a.feature_at[name], b.feature_at[name])


# -- law 3: spans


@settings(deadline=None, max_examples=60)
@given(documents, chunks, plans)
def test_every_id_lies_in_the_span_and_slice_of_its_modality(document: Document, chunk_s: float, plan: str | None) -> None:
    tok = bundle(chunk_s)
    stream = encode(tok, document, plan)
    v = tok.vocabulary
    for piece in parse(stream.ids, v):
        entry = tok.entries[piece.modality]
        first, end = v.slices[v.slice_of[piece.modality]]
        body = stream.ids[piece.body[0] : piece.body[1]]
        assert ((first <= body) & (body < end)).all()
        assert v.modalities[stream.modality[piece.body[0]]] == piece.modality
        spans = [v.spans[name] for name in entry.spans]
        others = [span for name, span in v.spans.items() if name not in entry.spans]
        for token in body.tolist():
            assert not any(a <= token < b for a, b in others)
            tail = token in (v.special.get(entry.hole), v.special["<missing>"])
            assert tail or any(a <= token < b for a, b in spans)
    for token, slice_index in zip(stream.ids.tolist(), stream.output_slice.tolist()):
        assert v.slices[slice_index][0] <= token < v.slices[slice_index][1]


# -- law 4: the way back


def offsets(segment: Segment, count: int) -> np.ndarray:
    if isinstance(segment, (Text, Image)):
        return np.zeros(count, np.int64)
    return segment_times(segment, count)


def media(segment: Segment) -> np.ndarray | str:
    if isinstance(segment, Text):
        return segment.text
    field = {"image": "pixels", "video": "frames", "audio": "samples"}.get(segment.modality, "values")
    return np.asarray(getattr(segment, field), np.float64)


@settings(deadline=None, max_examples=120)
@given(documents, chunks, plans, st.booleans(), st.integers(0, 99))
def test_any_document_comes_back_with_its_times(
    document: Document, chunk_s: float, plan: str | None, timestamps: bool, seed: int
) -> None:
    tok = bundle(chunk_s, timestamps)
    stream = encode(tok, document, plan, seed)
    back = tok.decode(stream)
    assert len(back) == len(document.segments)
    for info, found in zip(stream.info, back):
        given_ = document.segments[info.source]
        assert type(found) is type(given_) and found.name == given_.name
        assert segment_start(found) == segment_start(given_)
        want, got = media(given_), media(found)
        if isinstance(want, str):
            assert want == got
            continue
        assert got.reshape(-1).shape == want.reshape(-1).shape
        step = {"image": 1 / 32, "video": 1 / 32, "audio": 1 / 32, "sensor": 1 / 61, "action": 2.5 / 41}[found.modality]
        assert np.array_equal(np.isnan(want.reshape(-1)), np.isnan(got.reshape(-1)))
        assert np.nanmax(np.abs(want.reshape(-1) - got.reshape(-1)), initial=0) <= step + 1e-9
        if isinstance(given_, Action) and given_.space.n is not None:
            assert np.array_equal(want.reshape(-1), got.reshape(-1))
        assert np.abs(offsets(found, len(want)) - offsets(given_, len(want))).max(initial=0) < tok.config.tick_ns


@settings(deadline=None, max_examples=60)
@given(documents, chunks, plans, st.booleans())
def test_the_grammar_reads_every_stream_that_is_written(
    document: Document, chunk_s: float, plan: str | None, timestamps: bool
) -> None:
    tok = bundle(chunk_s, timestamps)
    stream = encode(tok, document, plan)
    grammar = tok.grammar()
    for token, slice_index in zip(stream.ids, stream.output_slice):
        assert grammar.output_slice == slice_index
        assert grammar.mask()[token - tok.vocabulary.slices[slice_index][0]]
        grammar.push(token)
    assert grammar.done
    closers = np.zeros(len(stream), bool)
    closers[[piece.end - 1 for piece in grammar.pieces]] = True
    closers[0] = True
    assert np.array_equal(closers, stream.landmark)


# -- law 5: order


@settings(deadline=None, max_examples=100)
@given(st.lists(segments(clocked=True), max_size=7), st.randoms(use_true_random=False), chunks, plans)
def test_the_order_of_clocked_segments_does_not_matter(parts: list[Segment], random: object, chunk_s: float, plan: str) -> None:
    tok = bundle(chunk_s)
    shuffled = list(parts)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    head, tail = Text(text="before"), Text(text="after")
    a = encode(tok, Document(segments=(head, *parts, tail)), plan)
    b = encode(tok, Document(segments=(head, *shuffled, tail)), plan)
    assert_same(a, b)


def test_a_segment_without_a_clock_is_a_barrier() -> None:
    late, early = (
        Sensor(values=[[0.5]], kind="k1", start=9.0, rate_hz=1.0),
        Sensor(values=[[-0.5]], kind="k1", start=1.0, rate_hz=1.0),
    )
    stream = bundle().encode([late, Text(text="stop"), early])
    assert [info.start for info in stream.info] == [9 * 10**9, None, 10**9]
    stream = bundle().encode([late, early, Text(text="stop")])
    assert [info.start for info in stream.info] == [10**9, 9 * 10**9, None]


def test_control_documents_alternate_observation_and_action() -> None:
    sensor = Sensor(values=np.linspace(-1, 1, 10).reshape(5, 2), kind="k2", start=0, rate_hz=50.0)
    action = Action(values=[0, 1, 2, 3, 4], space=ActionSpace(n=5), start=0, rate_hz=50.0)
    tok = bundle(0.0)
    for order in ([sensor, action], [action, sensor]):
        pieces = parse(tok.encode(order).ids, tok.vocabulary)
        assert [p.modality for p in pieces] == ["sensor", "action"] * 5
        assert [int(p.codes[0]) for p in pieces[1::2]] == [0, 1, 2, 3, 4]
    assert len(parse(bundle(2.0).encode([sensor, action]).ids, tok.vocabulary)) == 2


def test_chunks_of_two_seconds_take_turns() -> None:
    video = Video(frames=np.zeros((8, 1, 1)), rate_hz=2.0, start=0)
    audio = Audio(samples=np.zeros(12), rate_hz=3.0, start=0)
    pieces = parse(bundle(2.0).encode([audio, video]).ids, bundle().vocabulary)
    assert [(p.modality, len(p.codes)) for p in pieces] == [("video", 4), ("audio", 6)] * 2


def test_groups_are_never_split() -> None:
    sensor = Sensor(values=np.zeros((40, 3)), kind="k3", start=0, rate_hz=100.0)
    video = Video(frames=np.zeros((5, 2, 3)), rate_hz=30.0, start=0.003)
    tok = bundle(0.0)
    for piece in parse(tok.encode([sensor, video]).ids, tok.vocabulary):
        assert len(piece.codes) % {"sensor": 3, "video": 6}[piece.modality] == 0


def test_a_video_longer_than_the_number_tokens_is_written_in_pieces() -> None:
    video = Video(frames=np.linspace(0, 1, 300)[:, None, None].repeat(2, 2), rate_hz=10.0)
    tok = bundle()
    stream = tok.encode(video)
    pieces = parse(stream.ids, tok.vocabulary)
    assert [p.shape[0] for p in pieces] == [127, 127, 46]
    back = tok.decode(stream)
    assert len(back) == 1 and back[0].frames.shape == (300, 1, 2)  # type: ignore[attr-defined]


# -- positions


@settings(deadline=None, max_examples=60)
@given(documents, chunks)
def test_positions_depend_on_the_document_alone_and_never_go_below_its_start(document: Document, chunk_s: float) -> None:
    tok = bundle(chunk_s)
    first, second = encode(tok, document), encode(tok, document)
    assert_same(first, second)
    assert (first.position >= 0).all() and (first.position[0] == 0).all()
    # Every segment without a clock starts after everything before it.
    for number, info in enumerate(first.info):
        at = np.flatnonzero(first.segment == number)
        if info.start is None:
            assert first.position[at].min() > first.position[: at[0]].max()


def test_text_moves_the_three_axes_together() -> None:
    position = bundle().encode(Text(text="the ball falls")).position
    assert np.array_equal(position, np.arange(len(position))[:, None].repeat(3, 1))


def test_an_image_keeps_t_and_spreads_rows_and_columns() -> None:
    stream = bundle().encode([Image(pixels=np.zeros((2, 5))), Text(text="a")])
    body = stream.position[4:14]
    assert (body[:, 0] == 4).all()
    assert np.array_equal(body[:, 1] - 4, np.arange(2).repeat(5))
    assert np.array_equal(body[:, 2] - 4, np.tile(np.arange(5), 2))
    assert (stream.position[14] == 9).all()


def test_t_is_the_clock_in_ticks_of_40_ms_across_modalities() -> None:
    sensor = Sensor(values=np.zeros((200, 2)), kind="k2", start=1.0, rate_hz=100.0)
    video = Video(frames=np.zeros((10, 1, 2)), rate_hz=10.0, start=1.5)
    stream = bundle(0.0).encode([Text(text="a"), sensor, video])
    clocked = stream.time != NO_TIME
    assert clocked.sum() > 400
    base = stream.position[clocked, 0].min()
    assert np.array_equal(stream.position[clocked, 0] - base, (stream.time[clocked] - 10**9) // 40_000_000)
    body = (stream.modality == 4) & (stream.output_slice == 3) & ~stream.landmark
    place = stream.position[body]
    assert np.array_equal(place[:, 1] - base, stream.channel[body])
    assert len(np.unique(place, axis=0)) == len(place), "four readings share a tick, each has a place of its own"
    assert (place[:, 2] - base).max() == 3


def test_what_follows_a_clock_starts_after_the_maximum() -> None:
    stream = bundle().encode([Sensor(values=np.zeros((5, 1)), kind="k1", start=0, rate_hz=1.0), Text(text="a")])
    text = np.flatnonzero(stream.segment == 1)[0]
    assert (stream.position[text] == stream.position[:text].max() + 1).all()


def test_a_span_beyond_the_t_axis_is_refused() -> None:
    years = [Sensor(values=[[0.0]], kind="k1", start=int(y * 3.15e16), rate_hz=1.0) for y in (0, 9)]
    with pytest.raises(StreamError, match=r"raise stream\.tick_s"):
        bundle().encode(years)
    StreamTokenizer.build(tokenizers(), StreamConfig(tick_s=60.0)).encode(years)


@settings(deadline=None, max_examples=40)
@given(st.integers(2, 40), st.sampled_from([7.0, 50.0, 160.0]))
def test_a_session_that_pushes_readings_writes_what_a_recording_would(n: int, rate_hz: float) -> None:
    tok = bundle(0.0)
    values = np.linspace(-1, 1, 2 * n).reshape(n, 2)
    sensor = Sensor(values=values, kind="k2", start=10**9, rate_hz=rate_hz)
    action = Action(values=np.arange(n) % 5, space=ActionSpace(n=5), start=10**9, rate_hz=rate_hz)
    whole = tok.encode([Text(text="go"), sensor, action], close=False)
    times = segment_times(sensor, n) + 10**9
    builder = tok.builder()
    parts = [builder.open(), builder.add(tok.prepare([Text(text="go")]))]
    for i, time in enumerate(times.tolist()):
        parts.append(builder.add(tok.prepare([Sensor(values=values[i : i + 1], kind="k2", start=time, rate_hz=rate_hz)])))
        parts.append(builder.add(tok.prepare([Action(values=[i % 5], space=ActionSpace(n=5), start=time, rate_hz=rate_hz)])))
    pushed = join([part for part in parts if part is not None])
    for name in ARRAYS:
        if name != "segment":
            np.testing.assert_array_equal(getattr(whole, name), getattr(pushed, name), err_msg=name)
    np.testing.assert_array_equal(whole.features["sensor"], pushed.features["sensor"])


@settings(deadline=None, max_examples=100)
@given(documents, chunks, plans)
def test_segments_added_one_by_one_stand_as_if_added_at_once(document: Document, chunk_s: float, plan: str | None) -> None:
    tok, end, parts = bundle(chunk_s), 0, []
    for segment in document.segments:  # of those with a clock each begins after the last one has ended
        (item,) = tok.prepare([segment])
        if item.start is not None:
            segment = replace(segment, start=end)
            end = int(tok.prepare([segment])[0].clock[-1]) + 1_000_000
        parts.append(segment)
    chosen, rng = PRESETS[plan] if plan else None, np.random.default_rng(0)
    builder = tok.builder()
    added = [builder.open(), *(builder.add(tok.prepare([part]), chosen, rng) for part in parts), builder.close()]
    assert_same(encode(tok, Document(segments=tuple(parts)), plan), join([part for part in added if part is not None]))


def test_a_session_refuses_what_lies_before_its_clock() -> None:
    tok = bundle()
    builder = tok.builder()
    builder.add(tok.prepare([Sensor(values=[[0.0]], kind="k1", start=5.0, rate_hz=1.0)]))
    with pytest.raises(StreamError, match="in order of time"):
        builder.add(tok.prepare([Sensor(values=[[0.0]], kind="k1", start=4.0, rate_hz=1.0)]))


# -- roles and weights


@settings(deadline=None, max_examples=80)
@given(documents, st.sampled_from(list(PRESETS)), st.integers(0, 99), chunks)
def test_targets_carry_codes_only_and_observed_media_bear_no_loss(
    document: Document, plan: str, seed: int, chunk_s: float
) -> None:
    tok = bundle(chunk_s)
    stream = encode(tok, document, plan, seed)
    featured = np.zeros(len(stream), bool)
    for name, at in stream.feature_at.items():
        assert len(at) == len(stream.features[name]) and (np.diff(at) > 0).all()
        featured[at] = True
    for number, info in enumerate(stream.info):
        mine = stream.segment == number
        role = document.segments[info.source].role
        assert info.target == (role == "target") or role == "either"
        if info.target:
            assert not featured[mine].any() and (stream.two_way[mine] == -1).all()
        elif info.modality != "text":
            assert stream.weight[mine].sum() == 0
        if info.target and info.modality in ("image", "video"):
            assert (stream.weight[mine & stream.landmark] == 0).all(), "a forced closing token is not learnt"
    assert stream.weight[0] == 0


def test_weights_follow_the_plan() -> None:
    plan = LossPlan(target={"text": 1.0, "image": 0.25, "audio": 0.5}, observed={"text": 0.125})
    parts = [
        Text(text="a", role="observed"),
        Image(pixels=np.zeros((1, 2)), role="target"),
        Audio(samples=np.zeros(3), rate_hz=1.0, role="target"),
    ]
    stream = bundle().encode(parts, plan)
    per = [stream.weight[stream.segment == i].tolist() for i in range(3)]
    assert set(per[0]) == {0.125}
    assert per[1] == [0.25] * 5 + [0.0]
    assert per[2] == [0.5] * 5
    assert stream.weight[-1] == 1.0, "</doc> is text, and the last segment is a target"
    assert bundle().encode([*parts, Text(text="b", role="observed")], plan).weight[-1] == 0


def test_an_undecided_segment_is_drawn_with_the_plans_probability() -> None:
    tok, rng = bundle(), np.random.default_rng(0)
    plan = LossPlan(target={"image": 1.0}, generate={"image": 0.3})
    image = Image(pixels=np.zeros((1, 1)))
    drawn = sum(tok.encode(image, plan, rng).info[0].target for _ in range(400))
    assert 90 <= drawn <= 150
    with pytest.raises(StreamError, match="hand in rng"):
        tok.encode(image, plan)


def test_a_target_without_codes_is_an_error_that_names_the_modality() -> None:
    class InputOnly(LevelImage):
        def encode(self, segment: Segment):  # type: ignore[no-untyped-def]
            return replace(super().encode(segment), codes=np.full(segment.pixels.size, -1))  # type: ignore[attr-defined]

    tok = StreamTokenizer.build({"image": InputOnly("image", size=0)})
    image = Image(pixels=np.zeros((2, 2)), role="target", name="scan")
    with pytest.raises(StreamError, match=r"image segment 'scan' is a target, but the image tokenizer is input-only"):
        tok.encode(image, PRESETS["dense"])
    stream = tok.encode(replace(image, role="either"), PRESETS["dense"])
    assert tok.vocabulary.describe(int(stream.ids[4])) == "<hole image>"
    assert (stream.two_way[4:8] == 0).all()
    with pytest.raises(StreamError, match="no codes"):
        tok.decode(stream)


def test_an_observed_frame_is_one_two_way_block_and_an_image_another() -> None:
    stream = bundle().encode([Image(pixels=np.zeros((2, 2))), Video(frames=np.zeros((3, 1, 2)), rate_hz=1.0)])
    blocks = stream.two_way[stream.two_way >= 0]
    assert blocks.tolist() == [0] * 4 + [1, 1, 2, 2, 3, 3]


def test_loss_on_observed_media_is_refused() -> None:
    with pytest.raises(StreamError, match=r"move the weight to plan\.target"):
        bundle().encode(Image(pixels=np.zeros((1, 1)), role="observed"), LossPlan(observed={"image": 1.0}))


# -- refusals


def test_an_unknown_modality_and_an_empty_segment_are_named() -> None:
    tok = StreamTokenizer.build({"text": tokenizers()["text"]})
    with pytest.raises(StreamError, match=r"no image tokenizer \(it has text\)"):
        tok.encode(Image(pixels=np.zeros((1, 1))))
    with pytest.raises(StreamError, match="has no tokens"):
        bundle().encode(Audio(samples=np.zeros(0), rate_hz=1.0, name="silence"))
    with pytest.raises(StreamError, match="wrap it"):
        bundle().encode(["hello"])  # type: ignore[list-item]


def test_a_shape_beyond_the_number_tokens_says_what_to_raise() -> None:
    with pytest.raises(StreamError, match=r"w=200 does not fit.*vocabulary\.numbers"):
        bundle().encode(Image(pixels=np.zeros((1, 200))))


def test_repeated_media_are_tokenised_once() -> None:
    calls = []

    class Counting(LevelImage):
        def encode(self, segment: Segment):  # type: ignore[no-untyped-def]
            calls.append(1)
            return super().encode(segment)

    tok = StreamTokenizer.build({**tokenizers(), "image": Counting("image")})
    cache: dict = {}
    image = Image(pixels=np.zeros((2, 2)))
    for name in ("a", "b"):
        tok.encode([image, replace(image, name=name, start=3.0), Image(pixels=np.ones((2, 2)))], cache=cache)
    assert len(calls) == 2 and len(cache) == 2


def test_timestamps_say_the_documents_time_in_centiseconds() -> None:
    tok = bundle(0.0, True)
    stream = tok.encode([Sensor(values=np.zeros((3, 1)), kind="k1", start=100.0, times=[0.0, 0.125, 700.0])])
    assert [p.stamp for p in parse(stream.ids, tok.vocabulary)] == [0, 12, 70000]
    with pytest.raises(StreamError, match="timestamps=false"):
        tok.encode([Text(text="a", start=0), Text(text="b", start=2_000_000.0)])


def test_bad_configs_are_refused() -> None:
    with pytest.raises(StreamError, match="unknown keys"):
        StreamConfig.from_dict({"chunks": 1})
    for values in ({"chunk_s": -1.0}, {"chunk_s": float("nan")}, {"tick_s": 0.0}):
        with pytest.raises(StreamError):
            StreamConfig(**values)
    assert BOX.dims == 2
