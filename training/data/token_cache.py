"""Tokens of media that were tokenised before: the same clip stands in many documents and comes again every pass.

In: `media_key` of a segment (its content and the fields that change its tokens). Out: its `Tokens`, from memory (least
recently used go first, by bytes) or from a folder named by the tokenizer's digest, where another run or rank may have
left them.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator, MutableMapping
from pathlib import Path
from typing import Any

import numpy as np

from weft.tokenizers.base import Tokens
from weft.training.data.bounded import Bounded

log = logging.getLogger(__name__)
ARRAYS = ("codes", "time", "features", "place")


def token_bytes(tokens: Tokens) -> int:
    """Memory that tokens take."""
    return 512 + sum(a.nbytes for name in ARRAYS if (a := getattr(tokens, name)) is not None)


class TokenCache(MutableMapping[str, Tokens]):
    """`media_key` -> `Tokens`, bounded. A key that fell out is simply tokenised again."""

    def __init__(self, max_bytes: int = 2**30, folder: str | Path | None = None, digest: str = "") -> None:
        if folder is not None and not digest:
            raise ValueError("a token cache on disk needs the tokenizer's digest, so that no other tokenizer reads it")
        self.memory: Bounded[str, Tokens] = Bounded(max_bytes)
        self.hits, self.misses = 0, 0
        self._folder = None if folder is None else Path(folder) / digest[:32]
        self._writes = True

    def __getitem__(self, key: str) -> Tokens:
        tokens = self.memory.get(key)
        if tokens is None:
            tokens = self._from_disk(key)
            if tokens is None:
                self.misses += 1
                raise KeyError(key)
            self.memory.put(key, tokens, token_bytes(tokens))
        self.hits += 1
        return tokens

    def __setitem__(self, key: str, tokens: Tokens) -> None:
        self._to_disk(key, tokens)
        self.memory.put(key, tokens, token_bytes(tokens))

    def __delitem__(self, key: str) -> None:
        if not self.memory.drop(key):
            raise KeyError(key)

    def __iter__(self) -> Iterator[str]:
        return iter(self.memory.keys())

    def __len__(self) -> int:
        return len(self.memory)

    def _path(self, key: str) -> Path | None:
        return None if self._folder is None else self._folder / key[:2] / f"{key}.safetensors"

    def _from_disk(self, key: str) -> Tokens | None:
        from safetensors import SafetensorError, safe_open

        path = self._path(key)
        if path is None or not path.exists():
            return None
        try:
            with safe_open(path, "numpy") as file:
                facts = json.loads(file.metadata()["tokens"])
                arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return tokens_from(arrays, facts)
        except (SafetensorError, ValueError, KeyError, TypeError, OSError):
            path.unlink(missing_ok=True)  # half-written by a full disk: tokenise again
            return None

    def _to_disk(self, key: str, tokens: Tokens) -> None:
        from safetensors import SafetensorError
        from safetensors.numpy import save_file

        path = self._path(key)
        if path is None or not self._writes or path.exists():
            return
        part = path.with_name(f"{key}.{os.getpid()}.part")
        facts = {"grid": [int(n) for n in tokens.grid], "group": int(tokens.group)}
        arrays = {n: np.ascontiguousarray(a) for n in ARRAYS if (a := getattr(tokens, n)) is not None}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            save_file(arrays, part, metadata={"tokens": json.dumps(facts)})
            os.replace(part, path)
        except (OSError, SafetensorError) as error:  # a full disk costs speed, not the run
            self._writes = False
            log.warning("%s takes no more tokens (%s); they stay in memory only", self._folder, error)
            part.unlink(missing_ok=True)


def tokens_from(arrays: dict[str, np.ndarray], facts: dict[str, Any]) -> Tokens:
    """Tokens of named arrays and {"grid", "group"}."""
    return Tokens(
        codes=arrays["codes"],
        grid=tuple(int(n) for n in facts["grid"]),
        time=arrays["time"],
        features=arrays.get("features"),
        place=arrays.get("place"),
        group=int(facts["group"]),
    )
