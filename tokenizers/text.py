"""Text <-> SentencePiece codes, exactly: any Unicode string comes back as it was, bit for bit.

SentencePiece alone loses U+2581 (it stands for a space), NUL and whatever a model's normaliser rewrites. Here the model's
normaliser is switched off, so that the pieces of a stretch are a partition of it; U+2581 and NUL are written as byte pieces;
and codes turn back into bytes through our own table. So the law holds for any model with byte fallback.
"""

from __future__ import annotations

import hashlib
import io
import logging
import re
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from weft.tokenizers import files
from weft.tokenizers.base import Tokens
from weft.tokenizers.clock import label
from weft.tokenizers.files import TokenizerError
from weft.tokenizers.segment import Segment, Text

logger = logging.getLogger(__name__)

SPACE = "\u2581"
# Appended to a serialised model: a repeated protobuf message field merges, the last scalar wins. Field 3 is the normaliser:
# name "identity", no character map, no dummy prefix, whitespace kept, spaces escaped.
_IDENTITY = b"\x0a\x08identity\x12\x00\x18\x00\x20\x00\x28\x01"
_OVERRIDE = b"\x1a" + bytes([len(_IDENTITY)]) + _IDENTITY
_SENTENCE = 4096  # characters per training sentence; longer texts are cut, not dropped
_ODD = re.compile(f"([{SPACE}\x00]+)")
_STRETCH = 1 << 14  # characters encoded at once: keeps time linear


@dataclass(frozen=True)
class TextConfig:
    """How a model is trained and what is accepted."""

    model_type: Literal["unigram", "bpe"] = "unigram"
    """Algorithm of `fit`; a loaded model keeps its own."""
    max_bytes: int = 4 << 20
    """Longest input in UTF-8 bytes."""

    def __post_init__(self) -> None:
        if self.model_type not in ("unigram", "bpe"):
            raise TokenizerError(f"model_type {self.model_type!r} must be 'unigram' or 'bpe'")
        if self.max_bytes < 1:
            raise TokenizerError(f"max_bytes must be at least 1, got {self.max_bytes}")


class TextTokenizer:
    """SentencePiece with byte fallback. Codes are the model's ids; grid (n,); no features."""

    modality = "text"
    feature_size = 0

    def __init__(self, model: bytes, config: TextConfig | None = None) -> None:
        """`model` is a serialised SentencePiece model with byte fallback."""
        from sentencepiece import SentencePieceProcessor

        self.config = config or TextConfig()
        self.model = model
        try:
            self._pieces = SentencePieceProcessor(model_proto=model + _OVERRIDE)
        except Exception as error:
            raise TokenizerError(f"not a SentencePiece model ({error}); train one with TextTokenizer.fit") from error
        self.size = self._pieces.get_piece_size()
        self._bytes = [self._piece_bytes(i) for i in range(self.size)]
        byte_id = {self._bytes[i]: i for i in range(self.size) if self._pieces.is_byte(i)}
        if len(byte_id) != 256:
            raise TokenizerError(f"the model has {len(byte_id)} of 256 byte pieces; train it with byte_fallback=true")
        self._byte_id = [byte_id[bytes([b])] for b in range(256)]
        self._length = np.array([len(b) for b in self._bytes], np.int64)

    def _piece_bytes(self, i: int) -> bytes:
        """What piece i stands for; control and unknown pieces stand for nothing."""
        if self._pieces.is_byte(i):
            return bytes([int(self._pieces.id_to_piece(i)[3:5], 16)])
        if self._pieces.is_control(i) or self._pieces.is_unknown(i):
            return b""
        return self._pieces.id_to_piece(i).replace(SPACE, " ").encode()

    @classmethod
    def fit(
        cls,
        texts: Iterable[str],
        size: int = 8192,
        *,
        symbols: Iterable[str] = (),
        config: TextConfig | None = None,
    ) -> TextTokenizer:
        """Train on `texts`. A corpus too small for `size` pieces gets the largest size it supports, and the log says so.

        `symbols` are strings that always become one piece each. Training is deterministic (one thread).
        """
        config = config or TextConfig()
        symbols = [_checked_symbol(s) for s in symbols]
        least = 257 + len(symbols)
        if size <= least:
            raise TokenizerError(
                f"text size {size} is too small: 256 byte pieces, one unknown and {len(symbols)} symbols come first"
            )
        sentences = list(_sentences(texts))
        if not sentences:
            raise TokenizerError("TextTokenizer.fit got no text; give at least one non-empty string")
        wanted, low = size, least
        while True:
            try:
                return cls(_train(sentences, size, symbols, config.model_type), config)
            except RuntimeError as error:
                size = _smaller_size(str(error), size, low)
            logger.warning("text: the corpus supports %d pieces, not %d; using %d", size, wanted, size)

    @classmethod
    def from_file(cls, path: str | Path, config: TextConfig | None = None) -> TextTokenizer:
        """A user's .model file. Its normaliser and dummy prefix are switched off so that text round-trips exactly."""
        try:
            return cls(Path(path).read_bytes(), config)
        except OSError as error:
            raise TokenizerError(f"{path} cannot be read ({error.strerror}); give a SentencePiece .model file") from error

    def encode(self, segment: Segment) -> Tokens:
        """Tokens of a `Text` segment."""
        if not isinstance(segment, Text):
            raise TokenizerError(f"TextTokenizer encodes Text, got {type(segment).__name__}")
        codes = self.encode_text(segment.text, label(segment))
        return Tokens(codes=codes, grid=(len(codes),), time=np.zeros(len(codes), np.int64))

    def encode_text(self, text: str, where: str = "text") -> np.ndarray:
        """int64 [n] codes of a string."""
        if not isinstance(text, str):
            raise TokenizerError(f"{where} is {type(text).__name__}, a str is needed")
        if len(text) > self.config.max_bytes:
            raise TokenizerError(
                f"{where} has {len(text)} characters, at most {self.config.max_bytes} bytes are allowed; split it"
            )
        try:
            size = len(text.encode())
        except UnicodeEncodeError as error:
            raise TokenizerError(
                f"{where} has a lone surrogate U+{ord(text[error.start]):04X} at character {error.start}; "
                "decode the source with errors='replace' or drop it"
            ) from error
        if size > self.config.max_bytes:
            raise TokenizerError(f"{where} has {size} bytes, at most {self.config.max_bytes} are allowed; split it")
        return np.concatenate([np.zeros(0, np.int64), *map(self._exact, _stretches(text, _STRETCH))])

    def _exact(self, text: str) -> np.ndarray:
        """int64 codes whose bytes are exactly those of `text`."""
        if _ODD.search(text) is None:
            codes = np.array(self._pieces.encode(text), np.int64)
            if self._length[codes].sum() == len(text.encode()):
                return codes
        parts = [p for p in _ODD.split(text) if p]
        if len(parts) == 1:  # a stretch that the model still rewrites, or U+2581 and NUL alone
            return np.array([self._byte_id[b] for b in text.encode()], np.int64)
        return np.concatenate([self._exact(part) for part in parts])

    def decode(self, codes: np.ndarray, grid: tuple[int, ...] | None = None, **shape: Any) -> Text:
        """Codes [n] to a `Text` segment."""
        codes = np.asarray(codes)
        return Text(text=self.decode_text(files.checked_codes(codes, self.size, grid or (len(codes),), "text")))

    def decode_text(self, codes: Iterable[int]) -> str:
        """Codes to a string; bytes that are no UTF-8 (a model's free output) become U+FFFD."""
        return b"".join([self._bytes[int(i)] for i in codes]).decode("utf-8", errors="replace")

    def stream_decoder(self) -> TextStream:
        """A decoder that is fed code by code."""
        return TextStream(self._bytes)

    def _state(self) -> dict[str, Any]:
        model = hashlib.sha256(self.model).hexdigest()
        return {"modality": self.modality, "config": asdict(self.config), "model": model}

    def save(self, folder: Path) -> None:
        """Write `tokenizer.json` and `text.model`."""
        files.write(folder, self._state())
        (Path(folder) / "text.model").write_bytes(self.model)

    @classmethod
    def load(cls, folder: Path) -> TextTokenizer:
        """Read what `save` wrote."""
        settings, _ = files.read(folder, "text")
        try:
            model = (Path(folder) / "text.model").read_bytes()
        except OSError as error:
            raise TokenizerError(f"{folder} has no text.model; save the tokenizer again") from error
        tokenizer = cls(model, files.config_from(TextConfig, settings.get("config"), str(folder)))
        if (found := tokenizer._state()["model"]) != settings.get("model"):
            raise TokenizerError(f"{folder}/text.model has digest {found}, tokenizer.json says {settings.get('model')}")
        return tokenizer

    def digest(self) -> str:
        """SHA-256 over the model and the config."""
        return files.digest(self._state())


class TextStream:
    """Turns codes into text as they come: a character appears as soon as its last byte is there."""

    def __init__(self, table: list[bytes]) -> None:
        import codecs

        self._table = table
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, code: int) -> str:
        """The characters that this code completes, maybe none."""
        return self._decoder.decode(self._table[int(code)])

    def finish(self) -> str:
        """What an unfinished character becomes: U+FFFD or nothing."""
        return self._decoder.decode(b"", final=True)


def _checked_symbol(symbol: str) -> str:
    if not symbol or SPACE in symbol or "\x00" in symbol:
        raise TokenizerError(f"symbol {symbol!r} must be a non-empty string without NUL and U+2581")
    return symbol


def _stretches(text: str, length: int) -> Iterator[str]:
    """Cut `text` in pieces of about `length`, before a space where there is one near."""
    length, at = max(length, 1), 0
    while at < len(text):
        end = at + length
        if end < len(text):
            space = text.rfind(" ", at + max(length // 2, 1), end)
            end = space if space > at else end
        yield text[at:end]
        at = end


def _sentences(texts: Iterable[str]) -> Iterator[str]:
    """Training sentences: no NUL, no U+2581, none longer than SentencePiece reads."""
    for text in texts:
        yield from _stretches(text.encode("utf-8", "ignore").decode().replace("\x00", "").replace(SPACE, ""), _SENTENCE)


def _train(sentences: list[str], size: int, symbols: list[str], model_type: str) -> bytes:
    from sentencepiece import SentencePieceTrainer

    model = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter(sentences),
        model_writer=model,
        vocab_size=size,
        model_type=model_type,
        byte_fallback=True,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        character_coverage=0.9995,
        max_sentence_length=8 * _SENTENCE,
        unk_id=0,
        bos_id=-1,
        eos_id=-1,
        pad_id=-1,
        user_defined_symbols=symbols,
        num_threads=1,
        minloglevel=3,
    )
    return model.getvalue()


def _smaller_size(message: str, size: int, least: int) -> int:
    """The largest size that SentencePiece's refusal allows."""
    allowed = re.search(r"<= (\d+)", message)
    if "too high" not in message or not allowed or not least < int(allowed[1]) < size:
        raise TokenizerError(f"SentencePiece could not train {size} pieces: {message.strip()}; give more text or another size")
    return int(allowed[1])
