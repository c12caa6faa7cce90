"""A reply in pieces, each as soon as it can be decoded: text by characters, an image row by row, sound by stretches.

Abandoning the iterator frees caches at once: nothing runs in the background.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from weft.inference.generate import Task, cut, decode, steps, trim
from weft.inference.reply import Piece
from weft.inference.writer import Writer
from weft.tokenizers.bundle import StreamTokenizer
from weft.tokenizers.grammar import Piece as Parsed
from weft.tokenizers.segment import Text

SOUND = 25
"""Sound tokens per piece: a second at the default 40 ms. A stretch is decoded with what came before it; only the new part is
handed on."""


def pieces(model: Any, tokenizer: StreamTokenizer, task: Task) -> Iterator[Piece]:
    """The pieces of one reply, in order; each segment ends with a final one."""
    done = 0
    said = 0  # of the open segment: characters, rows or sound tokens that were handed on
    for job in steps(model, tokenizer, task):
        while done < len(job.writer.written):
            segments = [trim(s, task.stop) for s in decode(tokenizer, job.writer.written[done : done + 1])]
            for segment in segments:
                text = segment.text[said:] if isinstance(segment, Text) else segment
                yield Piece(done, segment.modality, text, True)
            done, said = done + 1, 0
        opened = _open(job.writer)
        if opened is not None and not job.done:
            content, said = _news(tokenizer, task, opened, said)
            if content is not None:
                yield Piece(done, opened.modality, content, False)


def _open(writer: Writer) -> Parsed | None:
    """The segment that is being written, if its body has begun."""
    piece = writer.grammar.unfinished() if writer.grammar else None
    return piece if piece is not None and len(piece.codes) else None


def _news(tokenizer: StreamTokenizer, task: Task, piece: Parsed, said: int) -> tuple[Any, int]:
    """What can be shown of an open segment beyond `said`, and how far that reaches."""
    owner: Any = tokenizer.tokenizers[piece.modality]
    if piece.modality == "text":
        text = cut(owner.decode(piece.codes).text, task.stop)
        return _characters(text, said, max((len(s) for s in task.stop), default=0))
    if piece.modality == "image":
        rows = len(piece.codes) // piece.shape[1]
        if rows > said:
            return owner.decode(piece.codes[: rows * piece.shape[1]], (rows, piece.shape[1])), rows
    if piece.modality == "audio" and len(piece.codes) - said >= SOUND:
        sound = owner.decode(piece.codes)
        per_token = owner.config.token_samples
        return type(sound)(samples=sound.samples[said * per_token :], rate_hz=sound.rate_hz), len(piece.codes)
    return None, said


def _characters(text: str, said: int, hold: int) -> tuple[str | None, int]:
    """New characters that later codes cannot change: an unfinished one and a possible beginning of a stop string wait."""
    stable = text.rstrip("\ufffd")
    end = max(len(stable) - max(hold - 1, 0), said)
    return (stable[said:end], end) if end > said else (None, said)
