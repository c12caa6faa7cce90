"""The data report: figures of a folder of shards, and one HTML page with examples."""

from __future__ import annotations

from pathlib import Path

from weft.tokenizers.bundle import StreamTokenizer
from weft.training.data.figures import DataReport, describe
from weft.training.data.report_html import page


def data_report(
    folder: str | Path,
    out_html: str | Path | None = None,
    *,
    tokenizer: StreamTokenizer | None = None,
    length: int = 1024,
    sample: int = 512,
    examples: int = 12,
) -> DataReport:
    """Describe a folder of shards; with `out_html` also as a page that needs no other file. Damage is reported, not raised.

    With a tokenizer, `sample` documents are measured in tokens and packed into rows of `length`.
    """
    report = describe(folder, tokenizer=tokenizer, length=length, sample=sample, examples=examples)
    if out_html is not None:
        Path(out_html).write_text(page(report), encoding="utf-8")
    return report
