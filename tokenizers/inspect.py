"""One document as a person sees it: a summary in words, and one self-contained page with every token.

In: a `Document` and a `StreamTokenizer`. Out: the summary, and an HTML file that needs nothing else: tokens as coloured cells
beside their media, what each token is on hover, and below what decodes from the codes alone.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from weft.tokenizers.bundle import StreamTokenizer
from weft.tokenizers.grammar import Piece, parse
from weft.tokenizers.image import unstandardise
from weft.tokenizers.layout import grouped
from weft.tokenizers.preview import preview
from weft.tokenizers.segment import Document
from weft.tokenizers.stream import NO_TIME, SegmentInfo, Stream

COLOURS = {
    "text": "#7a8699",
    "image": "#e0803c",
    "video": "#d0517f",
    "audio": "#2a9d8f",
    "sensor": "#4f78d8",
    "action": "#8d5bd0",
}
_OTHERS = ("#a3902f", "#3f9a52", "#b0563d", "#5b8aa6")
MAX_TOKENS = 60_000
"""Tokens that a page draws; a browser becomes slow beyond."""


def inspect_document(document: Document, tokenizer: StreamTokenizer, out_html: str | Path | None = None) -> str:
    """The summary of a document's stream; with `out_html` the page is written there as well."""
    stream = tokenizer.encode(document)
    if out_html is not None:
        path = Path(out_html)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(page(document, stream, tokenizer), encoding="utf-8")
    return summary(document, stream, tokenizer)


def summary(document: Document, stream: Stream, tokenizer: StreamTokenizer) -> str:
    """What is in the stream, in a few lines of text."""
    pieces = parse(stream.ids, tokenizer.vocabulary, tokenizer.registry)
    seconds = _span(stream)
    title = f"document {document.id!r}" if document.id else "document"
    clock = f", {seconds:.2f} s on the clock" if seconds is not None else ", no clock"
    lines = [f"{title}: {len(stream)} tokens, {len(stream.info)} segments in {len(pieces)} pieces{clock}"]
    for name, count in shares(stream, tokenizer).items():
        of = sum(info.modality == name for info in stream.info)
        bar = "#" * max(1, round(30 * count / len(stream)))
        lines.append(f"  {name:<8} {count:>7} tokens {count / len(stream):>6.1%}  {of:>3} segments  {bar}")
    lines.append("  segment      shape            tokens  time")
    for number, info in enumerate(stream.info):
        count = int((stream.segment == number).sum())
        when = "-" if info.start is None else f"{(info.start - _origin(stream)) / 1e9:.3f} s"
        shape = " x ".join(map(str, info.grid))
        lines.append(f"  {number:>3} {info.modality:<8} {shape:<16} {count:>6}  {when}{'  ' + info.name if info.name else ''}")
    lines.append(f"  vocabulary {len(tokenizer.vocabulary)} ids, tokenizer {tokenizer.digest()[:16]}")
    return "\n".join(lines)


def shares(stream: Stream, tokenizer: StreamTokenizer) -> dict[str, int]:
    """Tokens per modality, opening and closing tokens included, in registry order."""
    counts = np.bincount(stream.modality, minlength=len(tokenizer.modalities))
    return {name: int(n) for name, n in zip(tokenizer.modalities, counts) if n}


def page(document: Document, stream: Stream, tokenizer: StreamTokenizer) -> str:
    """The page as one string of HTML."""
    if len(stream) > MAX_TOKENS:
        raise ValueError(f"the document has {len(stream)} tokens, a page draws {MAX_TOKENS}; inspect a part of it")
    template = Path(__file__).with_name("inspect.html").read_text(encoding="utf-8")
    # Inside a script element only `<` can end it, so it is written as an escape.
    data = json.dumps(page_data(document, stream, tokenizer), separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    return template.replace("__WEFT_DATA__", data)


def page_data(document: Document, stream: Stream, tokenizer: StreamTokenizer) -> dict[str, Any]:
    """Everything the page shows, as JSON values."""
    vocabulary = tokenizer.vocabulary
    pieces = parse(stream.ids, vocabulary, tokenizer.registry)
    origin = _origin(stream)
    clocked = stream.time != NO_TIME
    colours = {name: COLOURS.get(name, _OTHERS[i % len(_OTHERS)]) for i, name in enumerate(tokenizer.modalities)}
    seconds = _span(stream)
    return {
        "title": document.id or "document",
        "source": document.source,
        "digest": tokenizer.digest(),
        "vocabulary": len(vocabulary),
        "seconds": seconds,
        "chunk_s": tokenizer.config.chunk_s,
        "tick_s": tokenizer.config.tick_s,
        "modalities": [{"name": name, "colour": colours[name]} for name in tokenizer.modalities],
        "slices": [{"name": n, "first": a, "end": b} for n, (a, b) in zip(vocabulary.slice_names, vocabulary.slices)],
        "shares": shares(stream, tokenizer),
        "tokens": {
            "id": stream.ids.tolist(),
            "label": _labels(stream, tokenizer),
            "modality": stream.modality.tolist(),
            "position": stream.position.tolist(),
            "time": [round((t - origin) / 1e9, 6) if on else None for t, on in zip(stream.time.tolist(), clocked.tolist())],
            "channel": stream.channel.tolist(),
            "segment": stream.segment.tolist(),
            "landmark": np.flatnonzero(stream.landmark).tolist(),
            "two_way": stream.two_way.tolist(),
            "slice": stream.output_slice.tolist(),
            "colour": _cell_colours(stream, tokenizer),
        },
        "pieces": [_piece(piece, stream) for piece in pieces],
        "segments": [_segment(info, codes, document, tokenizer, origin) for info, codes in tokenizer.segments(stream)],
    }


def _origin(stream: Stream) -> int:
    clocked = stream.time[stream.time != NO_TIME]
    return int(clocked.min()) if len(clocked) else 0


def _span(stream: Stream) -> float | None:
    """Seconds between the first and the last clocked token."""
    clocked = stream.time[stream.time != NO_TIME]
    return float(clocked.max() - clocked.min()) / 1e9 if len(clocked) else None


def _labels(stream: Stream, tokenizer: StreamTokenizer) -> list[str]:
    """What each id is, in words; text pieces as they read."""
    vocabulary = tokenizer.vocabulary
    first, end = vocabulary.spans["text"]
    decode = getattr(tokenizer.tokenizers.get("text"), "decode_text", None)
    names: dict[int, str] = {}
    for token in np.unique(stream.ids).tolist():
        names[token] = decode([token - first]) if decode and first <= token < end else vocabulary.describe(token)
    return [names[token] for token in stream.ids.tolist()]


def _piece(piece: Piece, stream: Stream) -> dict[str, Any]:
    return {
        "modality": piece.modality,
        "segment": int(stream.segment[piece.start]),
        "start": piece.start,
        "end": piece.end,
        "body": list(piece.body),
        "shape": list(piece.shape),
    }


def _segment(
    info: SegmentInfo, codes: np.ndarray, document: Document, tokenizer: StreamTokenizer, origin: int
) -> dict[str, Any]:
    """Its media, and what its codes alone decode to."""
    times = info.times
    length = float(times[-1]) / 1e9 if len(times) else 0.0
    value: dict[str, Any] = {
        "modality": info.modality,
        "name": info.name,
        "grid": list(info.grid),
        "start": None if info.start is None else round((info.start - origin) / 1e9, 6),
        "length": round(length, 6),
        "media": preview(document.segments[info.source]),
    }
    try:
        value["decoded"] = preview(tokenizer.decode_segment(codes, info))
    except ValueError as error:
        value["decoded"] = {"kind": "note", "text": str(error)}
    return value


def _cell_colours(stream: Stream, tokenizer: StreamTokenizer) -> list[str | None]:
    """A colour for cells whose content has one: a patch its mean, a value its height; None leaves the modality's own."""
    out: list[str | None] = [None] * len(stream)
    for name, at in stream.feature_at.items():
        rows = np.nan_to_num(stream.features[name])
        if not len(at):
            continue
        if tokenizer.entries[name].place == "grid":
            config = getattr(tokenizer.tokenizers[name], "config", None)
            channels = getattr(config, "channels", 1)
            if name in ("image", "video"):
                rows = unstandardise(rows)
            mean = np.clip(rows.reshape(len(rows), -1, channels).mean(axis=1), 0, 1)
            mean = np.rint(np.broadcast_to(mean if channels == 3 else mean[:, :1], (len(rows), 3)) * 255).astype(int)
            shades: Sequence[str] = [f"#{r:02x}{g:02x}{b:02x}" for r, g, b in mean.tolist()]
        else:
            shades = [f"{v:.2f}" for v in _heights(rows.mean(axis=1), stream.segment[at]).tolist()]
        for i, shade in zip(at.tolist(), shades):
            out[i] = shade
    return out


def _heights(level: np.ndarray, segment: np.ndarray) -> np.ndarray:
    """Values [k] from 0 to 1 inside each segment."""
    out = np.full(len(level), 0.5)
    for _, at in grouped(segment):
        low, high = float(level[at].min()), float(level[at].max())
        if high > low:
            out[at] = (level[at] - low) / (high - low)
    return out
