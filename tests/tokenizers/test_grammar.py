"""The grammar accepts exactly what can be decoded, and wants narrow it to what was asked for."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from weft.tokenizers.bundle import StreamTokenizer
from weft.tokenizers.grammar import Grammar, Want, parse
from weft.tokenizers.segment import Action, ActionSpace, Image, Sensor, Text
from weft.tokenizers.stream import StreamError
from weft.tokenizers.vocabulary import Vocabulary

sys.path.insert(0, str(Path(__file__).parent))
from mixtures import BOX, bundle, tokenizers

V = bundle().vocabulary
S = V.special
N = V.spans["numbers"][0]
TEXT, IMAGE, SENSOR = V.spans["text"][0] + 5, V.spans["image"][0], V.spans["sensor"][0]
DISCRETE, BINS = V.spans["discrete"][0], V.spans["bins"][0]


def walk(grammar: Grammar, rng: np.random.Generator, most: int = 400, stop: float = 0.2) -> list[int]:
    """Random legal ids until the grammar is done."""
    ids: list[int] = []
    closers = {S[f"</{m}>"] for m in V.modalities} | {S["</doc>"]}
    while not grammar.done and len(ids) < most:
        legal = grammar.legal()
        closing = [a for a, b in legal if a in closers and b - a == 1]
        if closing and rng.random() < stop:
            token = closing[0]
        else:
            first, end = legal[rng.integers(len(legal))]
            token = int(rng.integers(first, end))
        grammar.push(token)
        ids.append(token)
    return ids


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 2**20))
def test_whatever_the_grammar_allows_can_be_decoded(seed: int) -> None:
    tok = bundle()
    rng = np.random.default_rng(seed)
    wants = [
        Want.text(9),
        Want("image", max_tokens=12),
        Want("video", max_tokens=12),
        Want.audio(1, 5),
        Want("sensor", shape=(2,), min_tokens=2, max_tokens=7, missing=True),
        Want.action(ActionSpace(n=5), None),
    ]
    grammar = tok.grammar(allowed=wants, holes=False, inside=True, stamps=False)
    ids = walk(grammar, rng)
    if not grammar.between:
        return
    pieces = parse(ids, V)
    for piece in pieces:
        tok.decode_piece(piece, **({"space": ActionSpace(n=5)} if piece.modality == "action" else {"kind": "k2"}))
        limit = next(want.max_tokens for want in wants if want.modality == piece.modality)
        assert limit is None or len(piece.codes) <= limit


@settings(deadline=None, max_examples=100)
@given(st.lists(st.one_of(st.sampled_from(sorted(S.values())), st.integers(0, len(V) - 1)), max_size=12))
def test_push_refuses_exactly_what_is_not_legal(ids: list[int]) -> None:
    grammar = Grammar(V, inside=True)
    for token in ids:
        first, end = V.slices[grammar.output_slice]
        mask = grammar.mask()
        legal = first <= token < end and bool(mask[token - first])
        assert mask.sum() == sum(b - a for a, b in grammar.legal())
        try:
            grammar.push(token)
            assert legal
        except StreamError:
            assert not legal


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (
            [S["<image>"], N + 2, N + 2, IMAGE, IMAGE, IMAGE, S["</image>"]],
            r"token 6 \(</image>\) .* inside image at body token 3",
        ),
        ([S["<image>"], N + 1, N + 1, IMAGE, IMAGE], r"token 4 \(image 0\) .* expected </image>"),
        ([S["<image>"], N + 1, N + 1, IMAGE, S["</video>"]], r"token 4 \(</video>\)"),
        ([S["<image>"], N, N + 1], r"token 1 \(<0>\)"),
        ([S["<image>"], N + 1, TEXT], r"token 2 \(text 5\) .* expected <1> .. <127>"),
        ([S["<sensor>"], N + 2, SENSOR, S["</sensor>"]], r"token 3 \(</sensor>\) .* body token 1"),
        ([S["<sensor>"], N + 2, S["</sensor>"]], r"token 2 \(</sensor>\)"),
        ([S["<action>"], N + 1, DISCRETE, BINS], r"token 3 \(bins 0\)"),
        ([S["<action>"], N + 2, BINS, S["</action>"]], r"token 3 \(</action>\)"),
        ([S["<audio>"], SENSOR], r"token 1 \(sensor 0\)"),
        ([S["<audio>"], S["</audio>"]], r"token 1 \(</audio>\)"),
        ([TEXT, S["<image>"]], r"token 1 \(<image>\) .* inside text"),
        ([S["</doc>"], TEXT], "comes after </doc>"),
        ([S["<doc>"], S["<doc>"]], r"token 1 \(<doc>\)"),
        ([S["<pad>"]], r"token 0 \(<pad>\)"),
        ([N + 3], r"token 0 \(<3>\) is not legal between pieces"),
        ([S["<time>"], N + 100], r"token 1 \(<100>\)"),
        ([S["<time>"], N, N, N, N, S["</doc>"]], r"token 5 \(</doc>\)"),
        ([len(V)], "outside the vocabulary"),
        ([-1], "outside the vocabulary"),
        ([S["<image>"], N + 1], "ends at token 2 inside image; it is cut off"),
        ([S["<time>"], N], "cut off"),
    ],
)
def test_what_could_not_be_decoded_is_refused_with_place_and_reason(ids: list[int], message: str) -> None:
    with pytest.raises(StreamError, match=message):
        parse(ids, V)


def test_a_refused_token_leaves_the_grammar_as_it_was() -> None:
    grammar = Grammar(V, inside=True)
    grammar.push(S["<audio>"])
    before = grammar.legal()
    with pytest.raises(StreamError):
        grammar.push(TEXT)
    assert grammar.legal() == before and grammar.at == 1


def test_wants_force_shape_length_and_space() -> None:
    tok, rng = bundle(), np.random.default_rng(0)
    sequence = [Want.image(2, 3), Want.sensor(2, 4), Want.action(BOX, 3), Want.action(ActionSpace(n=3), 2), Want.text(4)]
    for _ in range(20):
        grammar = tok.grammar(sequence=sequence, holes=False, inside=True)
        walk(grammar, rng, stop=0.0)
        assert grammar.done and grammar.legal() == []
        image, sensor, box, discrete, text = grammar.pieces
        assert image.shape == (2, 3) and len(image.codes) == 6
        assert len(sensor.codes) == 8 and sensor.codes.max() < 61, "a generated reading is never missing unless asked for"
        assert box.span == "bins" and len(box.codes) == 6
        assert discrete.span == "discrete" and len(discrete.codes) == 2 and discrete.codes.max() < 3
        assert 1 <= len(text.codes) <= 4
    with pytest.raises(StreamError, match="everything that was wanted"):
        grammar.push(TEXT)


def test_shape_and_forced_tokens_leave_one_choice() -> None:
    grammar = bundle().grammar(sequence=[Want.image(1, 2)], holes=False, inside=True)
    seen = []
    while not grammar.done:
        seen.append(sum(b - a for a, b in grammar.legal()))
        grammar.push(grammar.legal()[0][0])
    assert seen == [1, 1, 1, 17, 17, 1]


@pytest.mark.parametrize(
    ("want", "message"),
    [
        (lambda: Want.image(0, 3), "numbers"),
        (lambda: Want.image(3, 128), "from 1 to 127"),
        (lambda: Want("smell"), "no modality 'smell'"),
        (lambda: Want.action(ActionSpace(n=8)), "8 codes wanted, its span has 7"),
        (lambda: Want("action", span="pixels"), "no span"),
        (lambda: Want("sensor", shape=(3,), min_tokens=1, max_tokens=2), "no multiple of 3"),
        (lambda: Want.text(0), "min <= max"),
        (lambda: Want("sensor", codes=0), "at least one legal code"),
    ],
)
def test_an_impossible_want_is_refused_at_once(want, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(StreamError, match=message):
        bundle().grammar(sequence=[want()])


def test_a_modality_without_codes_cannot_be_generated() -> None:
    tok = StreamTokenizer.build({"text": tokenizers()["text"]})
    with pytest.raises(StreamError, match="image cannot be generated"):
        tok.grammar(sequence=[Want.image(1, 1)])


def test_pieces_that_stand_for_nothing_are_never_legal_but_bytes_are() -> None:
    tok = bundle()
    text = tokenizers()["text"]
    assert tok.forbidden() == (V.spans["text"][0],), "SentencePiece's unknown piece"
    grammar = tok.grammar(inside=True)
    with pytest.raises(StreamError, match="stands for no text"):
        grammar.push(tok.forbidden()[0])
    byte = next(i for i in range(text.size) if text._bytes[i] == b"\xc3")  # type: ignore[attr-defined]
    grammar.push(V.spans["text"][0] + byte)


def test_holes_are_read_but_never_generated() -> None:
    ids = [S["<image>"], N + 1, N + 1, S["<hole image>"], S["</image>"]]
    assert parse(ids, V)[0].codes.tolist() == [-1]
    grammar = Grammar(V, inside=True, holes=False)
    for token in ids[:3]:
        grammar.push(token)
    with pytest.raises(StreamError):
        grammar.push(ids[3])


def test_plain_ids_decode_with_what_the_caller_knows() -> None:
    tok = bundle()
    parts = [
        Text(text="go"),
        Image(pixels=np.full((1, 2), 0.5)),
        Sensor(values=[[0.0, 1.0]], kind="k2", start=0, rate_hz=2.0),
        Action(values=[3], space=ActionSpace(n=5), start=0, rate_hz=2.0),
    ]
    back = tok.decode(tok.encode(parts).ids.tolist(), sensor={"kind": "k2"}, action={"space": ActionSpace(n=5)})
    assert [segment.modality for segment in back] == ["text", "image", "sensor", "action"]
    assert back[0].text == "go" and back[3].values.tolist() == [3]  # type: ignore[attr-defined]


def test_an_open_piece_is_read_as_far_as_it_goes() -> None:
    pieces = parse([TEXT, S["</text>"], S["<sensor>"], N + 2, SENSOR], V, partial=True)
    assert [p.complete for p in pieces] == [True, False]
    assert pieces[1].body == (4, 5) and pieces[1].shape == (2,)


def test_few_number_tokens_leave_no_timestamps() -> None:
    small = Vocabulary(text=10, numbers=20)
    ranges = Grammar(small, inside=True).legal()
    assert not any(a <= small.special["<time>"] < b for a, b in ranges)
