"""Other people's data as shards: what a name or folder points to, and which adapter reads it.

In: `manifest.jsonl`, tar files or URLs in WebDataset layout, a folder of Parquet files or of a saved Hugging Face dataset,
`minari:PATH`, or a folder of media with sidecar text. Out: shards (`prepare_from`) or a `Source` of records (`open_source`).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from weft.training.data import minari_files
from weft.training.data.prepare import PrepareError, PrepareReport, prepare, prepare_records
from weft.training.data.source import Source
from weft.training.data.source_folder import media_source
from weft.training.data.source_minari import minari_source
from weft.training.data.source_table import table_source
from weft.training.data.source_tar import tar_source


def prepare_from(
    where: str | os.PathLike[str],
    out_dir: str | Path,
    *,
    columns: Mapping[str, str] | None = None,
    name: str | None = None,
    rate_hz: float | None = None,
    **settings: Any,
) -> PrepareReport:
    """`prepare` for whatever `where` points to; see `open_source`. `settings` are those of `prepare_records`."""
    text = os.fspath(where)
    if text.endswith(".jsonl"):
        return prepare(text, out_dir, **settings)
    source = open_source(text, columns=columns, name=name, rate_hz=rate_hz)
    return prepare_records(source.records, out_dir, origin=source.origin, **settings)


def open_source(
    where: str, *, columns: Mapping[str, str] | None = None, name: str | None = None, rate_hz: float | None = None
) -> Source:
    """Choose the adapter. `columns` maps Parquet columns to modalities; `rate_hz` is the clock of Minari episodes."""
    if where.startswith("minari:"):
        return minari_source(where.removeprefix("minari:"), name=name, rate_hz=rate_hz)
    if ".tar" in Path(where).name:
        return tar_source(where, name=name)
    folder = Path(where)
    if not folder.is_dir():
        raise PrepareError(f"{where} is no .jsonl manifest, .tar file or URL, minari: dataset or folder; check the path")
    if minari_files.layout(folder):
        return minari_source(where, name=name, rate_hz=rate_hz)
    tables = sorted(f for kind in ("parquet", "arrow") for f in folder.rglob(f"*.{kind}") if not f.name.startswith("cache-"))
    if tables:
        return table_source(tables, folder, columns=columns, name=name)
    if any(folder.glob("*.tar")):
        return tar_source(str(folder / "*.tar"), name=name)
    return media_source(folder, name=name)
