"""Per-sample results as JSON lines that survive an interruption.

The file's name carries the digest of everything that decides the answers (task, variant, shots, seed, weights, training pool);
each line carries the digest of its document. A line that was cut off by a kill is ignored and asked again.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any

Record = dict[str, Any]


def _whole(path: Path) -> list[tuple[str, Record]]:
    """Lines and records up to the first torn one: what follows it was not promised to be whole."""
    found = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            record = json.loads(line)
            found.append((line, {**record, "key": record["key"]}))
        except (ValueError, KeyError, TypeError):
            break
    return found


def read_records(path: Path) -> dict[str, Record]:
    """The latest record of every key; nothing where there is no file."""
    return {record["key"]: record for _, record in _whole(path)} if path.is_file() else {}


class RecordFile:
    """Records by key; safe to append from threads."""

    def __init__(self, path: Path) -> None:
        self.path, self._lock = path, threading.Lock()
        self.records: dict[str, Record] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            self._read()

    def _read(self) -> None:
        whole = _whole(self.path)
        self.records = {record["key"]: record for _, record in whole}
        text = "".join(line + "\n" for line, _ in whole)
        if text != self.path.read_text(encoding="utf-8"):
            draft = self.path.with_suffix(".part")
            draft.write_text(text, encoding="utf-8")
            draft.replace(self.path)

    def has(self, key: str, digest: str) -> bool:
        """Whether this document was asked, as it is now."""
        return self.records.get(key, {}).get("digest") == digest

    def add(self, records: Iterable[Record]) -> None:
        """Append and flush."""
        records = list(records)
        with self._lock, self.path.open("a", encoding="utf-8") as file:
            for record in records:
                file.write(json.dumps(record, sort_keys=True, allow_nan=False) + "\n")
                self.records[record["key"]] = record
