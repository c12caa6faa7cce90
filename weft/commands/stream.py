"""`weft inspect`: one document as the model would read it, in words and as a page with every token."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def inspect(
    *files: str,
    out: str | None = None,
    tokenizer: str | None = None,
    line: int = 1,
    chunk_s: float = 2.0,
    steps: int = 400,
    rate_hz: float | None = None,
) -> None:
    """Show a document as one token stream.

    Args:
        files: a document as .json, a manifest as .jsonl (see --line), or media and texts that make one document in this order.
        out: page to write, for example page.html; without it only the summary is printed.
        tokenizer: folder of a saved tokenizer, or of a checkpoint; without it, tokenizers are fitted on the document itself.
        line: which document of a manifest, from 1.
        chunk_s: seconds that clocked segments are merged by, where the tokenizer is fitted here.
        steps: training steps of each codec that is fitted here; 0 leaves pictures and sound without codes.
        rate_hz: readings or frames per second of .npy, .csv and folders, which have none of their own.
    """
    document = read_document(files, line, rate_hz)  # a mistake is told before anything heavy is imported
    if tokenizer is not None:
        tokens = open_tokenizer(tokenizer)
    else:
        from weft.tokenizers.defaults import default_tokenizer, name_kinds
        from weft.tokenizers.stream import StreamConfig

        document = name_kinds(document)
        tokens = default_tokenizer(document, StreamConfig(chunk_s=chunk_s), steps=steps)
    from weft.tokenizers.inspect import inspect_document

    print(inspect_document(document, tokens, out))
    print(f"page: {out}" if out else "  (--out page.html writes a page with every token beside its media)")


def read_document(files: tuple[str, ...], line: int = 1, rate_hz: float | None = None) -> Any:
    """A `Document` from a manifest, or from media in the order given."""
    from weft.inference.files import read_prompt
    from weft.tokenizers.manifest import ManifestError, read_manifest
    from weft.tokenizers.segment import Document

    if not files:
        raise ManifestError("there is nothing to inspect; give a document as .json, a .jsonl manifest, or media files")
    if len(files) > 1 or Path(files[0]).suffix not in (".json", ".jsonl"):
        return Document(tuple(read_prompt(files, rate_hz)), id=Path(files[0]).name)
    count = 0
    for document in read_manifest(files[0]):
        count += 1
        if count == line:
            return document
    raise ManifestError(f"{files[0]} holds {count} documents, --line {line} asks for another; choose 1 to {count}")


def open_tokenizer(folder: str | Path) -> Any:
    """A `StreamTokenizer` from its own folder, from a checkpoint or from a run."""
    from weft.tokenizers.bundle import StreamTokenizer

    folder = Path(folder)
    inside = [folder / "tokenizer", folder / "final" / "tokenizer"]
    found = next((p for p in inside if p.is_dir()), folder)
    if not found.is_dir():
        raise FileNotFoundError(f"no tokenizer at {folder}; give the folder of a saved tokenizer or of a checkpoint")
    return StreamTokenizer.load(found)
