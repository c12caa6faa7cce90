"""Text: any Unicode comes back exactly; models, sizes and streams."""

from __future__ import annotations

import io
import logging
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from weft.tokenizers.base import Tokenizer
from weft.tokenizers.files import TokenizerError
from weft.tokenizers.segment import Image, Text
from weft.tokenizers.text import TextConfig, TextTokenizer

CORPUS = [
    "The quick brown fox jumps over the lazy dog, and then over the other dog.\n",
    "  Two  spaces, a\ttab and a newline.\n\nNumbers 0 1 2 3 4 5 6 7 8 9.",
    "Gr\u00fc\u00dfe aus M\u00fcnchen, \u6f22\u5b57 and e\u0301.",
] * 20
AWKWARD = [
    "",
    " ",
    "   ",
    "\n",
    " lead",
    "trail ",
    "a  b   c",
    "\u2581",
    "\u2581\u2581 a\u2581b ",
    "\x00",
    "a\x00b\x00",
    "\ufeffbom",
    "e\u0301\u0301\u0301",
    "\ud7ff\ue000\U0010ffff",
    "\r\n\r",
    "\u2028\u2029\x85",
    "<0x41><unk></s><tool>",
    "\ufffd",
    "".join(map(chr, range(32))),
    "\U0001f468\u200d\U0001f469\u200d\U0001f467",
    "\ufb01 \u00bd \u2460 \uff21",  # what NFKC would rewrite
]


@pytest.fixture(scope="module", params=["unigram", "bpe"])
def tokenizer(request: pytest.FixtureRequest) -> TextTokenizer:
    config = TextConfig(model_type=request.param)
    return TextTokenizer.fit(CORPUS, 320, symbols=["<tool>"], config=config)


def nmt_model() -> bytes:
    """A model as others train it: NFKC normalisation, dummy prefix, squeezed whitespace, control symbols."""
    from sentencepiece import SentencePieceTrainer

    out = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS), model_writer=out, vocab_size=319, byte_fallback=True, minloglevel=3, num_threads=1
    )
    return out.getvalue()


@pytest.mark.parametrize("text", AWKWARD)
def test_awkward_text_round_trips(tokenizer: TextTokenizer, text: str) -> None:
    codes = tokenizer.encode_text(text)
    assert tokenizer.decode_text(codes) == text
    assert all(0 <= c < tokenizer.size for c in codes)


@settings(max_examples=400, deadline=None)
@given(st.text(st.characters(exclude_categories=("Cs",)), max_size=80))
def test_any_unicode_round_trips_exactly(text: str) -> None:
    tokenizer = _cached()
    tokens = tokenizer.encode(Text(text))
    assert isinstance(tokens.grid, tuple) and tokens.grid == (len(tokens),)
    segment = tokenizer.decode(tokens.codes, tokens.grid)
    assert segment.text == text
    stream = tokenizer.stream_decoder()
    assert "".join(map(stream.push, tokens.codes)) + stream.finish() == text


@settings(max_examples=200, deadline=None)
@given(st.text(st.sampled_from("ab \u2581\x00\n\u0301\ufb01\U0001f600"), max_size=60))
def test_a_foreign_model_with_nfkc_and_dummy_prefix_round_trips_too(text: str) -> None:
    tokenizer = _cached_foreign()
    assert tokenizer.decode_text(tokenizer.encode_text(text)) == text


_made: dict[str, TextTokenizer] = {}


def _cached() -> TextTokenizer:
    return _made.setdefault("own", _made.get("own") or TextTokenizer.fit(CORPUS, 320))


def _cached_foreign() -> TextTokenizer:
    return _made.setdefault("foreign", _made.get("foreign") or TextTokenizer(nmt_model()))


def test_a_foreign_model_still_uses_its_own_pieces() -> None:
    tokenizer = _cached_foreign()
    text = "The quick brown fox jumps over the lazy dog"
    assert len(tokenizer.encode_text(text)) < 0.8 * len(text)


@pytest.mark.parametrize(("text", "at"), [("\ud800", 0), ("ab\udc00c", 2), ("\U0001f600\udfff", 1)])
def test_a_lone_surrogate_is_refused_with_its_place(tokenizer: TextTokenizer, text: str, at: int) -> None:
    with pytest.raises(TokenizerError, match=rf"'note'.* lone surrogate U\+D.* at character {at};"):
        tokenizer.encode(Text(text, name="note"))


def test_a_symbol_is_one_piece(tokenizer: TextTokenizer) -> None:
    with_symbol, without = tokenizer.encode_text("x<tool>x"), tokenizer.encode_text("xx")
    assert len(with_symbol) == len(without) + 1


def test_a_small_corpus_lowers_the_size_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="weft.tokenizers.text"):
        tokenizer = TextTokenizer.fit(["to be or not to be"], 5000)
    assert 257 < tokenizer.size < 5000
    assert "the corpus supports" in caplog.text and "5000" in caplog.text
    assert tokenizer.decode_text(tokenizer.encode_text("anything \u6f22 at all")) == "anything \u6f22 at all"


def test_training_is_deterministic() -> None:
    assert TextTokenizer.fit(CORPUS, 310).digest() == TextTokenizer.fit(iter(CORPUS), 310).digest()


@pytest.mark.parametrize("texts", [[], [""], ["\x00"]])
def test_an_empty_corpus_is_an_error(texts: list[str]) -> None:
    with pytest.raises(TokenizerError, match="no text"):
        TextTokenizer.fit(texts)


def test_a_size_below_the_byte_pieces_is_an_error() -> None:
    with pytest.raises(TokenizerError, match="too small"):
        TextTokenizer.fit(CORPUS, 256)


def test_a_model_without_byte_fallback_is_an_error() -> None:
    from sentencepiece import SentencePieceTrainer

    out = io.BytesIO()
    SentencePieceTrainer.train(sentence_iterator=iter(CORPUS), model_writer=out, vocab_size=60, minloglevel=3)
    with pytest.raises(TokenizerError, match="byte_fallback=true"):
        TextTokenizer(out.getvalue())
    with pytest.raises(TokenizerError, match="not a SentencePiece model"):
        TextTokenizer(b"\x00\x01garbage")


def test_input_over_the_limit_is_refused(tokenizer: TextTokenizer) -> None:
    with pytest.raises(TokenizerError, match="split it"):
        tokenizer.encode_text("a" * ((4 << 20) + 1))
    with pytest.raises(TokenizerError, match="split it"):
        tokenizer.encode_text("\u6f22" * (2 << 20))


@pytest.mark.parametrize("unit", ["hello world ", "\u0301", "\u2581a", "\U0001f600"])
def test_time_is_linear_in_length(unit: str) -> None:
    """Processor time per character at 200,000 characters is at most 4 times that at 20,000 (quadratic would be 10)."""

    def cost(count: int) -> float:
        text = (unit * count)[:count]
        best = 1e9
        for _ in range(3):
            begin = time.process_time()
            _cached().encode_text(text)
            best = min(best, time.process_time() - begin)
        return best / count

    assert cost(200_000) < 4 * cost(20_000)


def test_a_model_stops_in_the_middle_of_a_character() -> None:
    tokenizer = _cached()
    codes = tokenizer.encode_text("a\U0001f600")
    stream = tokenizer.stream_decoder()
    shown = [stream.push(c) for c in codes[:-1]]
    assert "".join(shown) == "a" and stream.finish() == "\ufffd"
    assert tokenizer.decode_text(codes[:-1]) == "a\ufffd"


def test_codes_outside_the_model_are_refused(tokenizer: TextTokenizer) -> None:
    for bad in ([-1], [tokenizer.size], [0.5]):
        with pytest.raises(TokenizerError):
            tokenizer.decode(bad, (1,))
    with pytest.raises(TokenizerError, match="needs 3 codes, got 1"):
        tokenizer.decode([1], (3,))


def test_save_and_load_keep_everything(tokenizer: TextTokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path)
    loaded = TextTokenizer.load(tmp_path)
    assert isinstance(loaded, Tokenizer) and loaded.digest() == tokenizer.digest()
    assert loaded.encode_text("fox \u6f22").tolist() == tokenizer.encode_text("fox \u6f22").tolist()
    (tmp_path / "text.model").write_bytes(nmt_model())
    with pytest.raises(TokenizerError, match="digest"):
        TextTokenizer.load(tmp_path)


def test_a_model_file_of_the_user_is_read(tmp_path: Path) -> None:
    path = tmp_path / "mine.model"
    path.write_bytes(nmt_model())
    tokenizer = TextTokenizer.from_file(path)
    assert tokenizer.decode_text(tokenizer.encode_text("  x\u2581 ")) == "  x\u2581 "
    with pytest.raises(TokenizerError, match=r"nowhere\.model"):
        TextTokenizer.from_file(tmp_path / "nowhere.model")


def test_other_segments_are_refused(tokenizer: TextTokenizer) -> None:
    with pytest.raises(TokenizerError, match="got Image"):
        tokenizer.encode(Image(pixels=None))
    with pytest.raises(TokenizerError, match="is bytes"):
        tokenizer.encode(Text(text=b"x"))  # type: ignore[arg-type]
