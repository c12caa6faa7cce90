"""Search by meaning: L2-normalised vectors under string keys, in memory and in one file.

In: keys, vectors [n E] from `Generalist.embed`, and JSON payloads to hand back. Out: `Hit`s by descending inner product.
`flat` is exact; `hnsw` is approximate and fast from about 100,000 vectors on (faiss, extra `search`). Without faiss, flat
runs on numpy with the same results. The file is safetensors: vectors plus keys and payloads as JSON, published by one
rename, so a reader sees the old index or the new one. The graph of `hnsw` is rebuilt at load, never read from the file.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from weft.inference.errors import IndexFileError, SearchError
from weft.inference.publish import publish

_BLOCK = 65536  # rows per matrix product in the numpy path: bounds its memory at 256 KiB per query


@dataclass(frozen=True)
class Hit:
    """One search result."""

    key: str
    score: float
    """Inner product of normalised vectors, in [-1, 1]."""
    payload: Any = None


@dataclass
class Index:
    """Vectors of one model under unique keys."""

    width: int
    """E, numbers per vector."""
    kind: str = "flat"
    """"flat" (exact) or "hnsw" (approximate; needs faiss)."""
    model: str = ""
    """Digest of the model that made the vectors; two indexes or a query of another model are refused."""
    _rows: np.ndarray = field(init=False, repr=False)
    _keys: list[str] = field(init=False, repr=False, default_factory=list)
    _payloads: dict[str, Any] = field(init=False, repr=False, default_factory=dict)
    _at: dict[str, int] = field(init=False, repr=False, default_factory=dict)
    _graph: Any = field(init=False, repr=False, default=None)

    def __post_init__(self) -> None:
        if self.kind not in ("flat", "hnsw"):
            raise SearchError(f"an index is 'flat' or 'hnsw', got {self.kind!r}")
        if self.width < 1:
            raise SearchError(f"an index needs a vector width of at least 1, got {self.width}")
        if self.kind == "hnsw":
            _faiss(required=True)
        self._rows = np.zeros((0, self.width), np.float32)

    def __len__(self) -> int:
        return len(self._keys)

    def __contains__(self, key: str) -> bool:
        return key in self._at

    @property
    def keys(self) -> tuple[str, ...]:
        """All keys, in row order."""
        return tuple(self._keys)

    def add(self, keys: Sequence[str], vectors: Any, payloads: Sequence[Any] | None = None) -> None:
        """Add `vectors` [n E] under `keys`; a key that exists is replaced. Payloads are anything that JSON holds."""
        vectors = checked(vectors, self.width)
        keys = paired(keys, vectors, payloads)
        self.remove([key for key in keys if key in self._at])
        n = len(self._keys)
        if n + len(keys) > len(self._rows):
            grown = np.zeros((max(2 * len(self._rows), n + len(keys)), self.width), np.float32)
            grown[:n] = self._rows[:n]
            self._rows = grown
        self._rows[n : n + len(keys)] = vectors
        for i, key in enumerate(keys):
            self._at[key] = n + i
            self._keys.append(key)
            if payloads is not None:
                self._payloads[key] = payloads[i]
        if self._graph is not None:
            self._graph.add(vectors)

    def remove(self, keys: Iterable[str]) -> None:
        """Forget these keys. An unknown key is an error, and then nothing is forgotten."""
        gone = set(named(keys))
        if unknown := sorted(gone - self._at.keys()):
            raise KeyError(f"the index holds no key {unknown[0]!r}")
        if not gone:
            return
        stay = [i for i, key in enumerate(self._keys) if key not in gone]
        self._rows = self._rows[stay]
        self._keys = [self._keys[i] for i in stay]
        self._at = {key: i for i, key in enumerate(self._keys)}
        self._payloads = {key: value for key, value in self._payloads.items() if key not in gone}
        self._graph = None

    def search(self, queries: Any, k: int = 10) -> list[list[Hit]]:
        """The k nearest of each query [q E], best first; fewer if the index holds fewer. Ties keep the order of adding."""
        queries = checked(queries, self.width)
        if k < 1:
            raise SearchError(f"search needs k >= 1, got {k}")
        k = min(k, len(self))
        if k == 0:
            return [[] for _ in queries]
        scores, rows = self._approximate(queries, k) if self.kind == "hnsw" else self._exact(queries, k)
        return [
            [Hit(self._keys[i], float(s), self._payloads.get(self._keys[i])) for s, i in zip(q_scores, q_rows) if i >= 0]
            for q_scores, q_rows in zip(scores, rows)
        ]

    def save(self, path: str | Path) -> None:
        """Write one safetensors file; readers see the old file or the whole new one."""
        from safetensors.numpy import save

        ordered = [self._payloads.get(key) for key in self._keys]
        facts = {"kind": self.kind, "model": self.model, "width": self.width, "keys": self._keys, "payloads": ordered}
        listed = np.frombuffer(json.dumps(facts).encode(), np.uint8)
        data = save({"vectors": self._rows[: len(self)].copy(), "facts": listed}, metadata={"format": "weft.index.1"})
        publish(path, data)

    @classmethod
    def load(cls, path: str | Path) -> Index:
        """Read what `save` wrote. Raises `IndexFileError` for anything else."""
        from safetensors.numpy import load

        try:
            tensors = load(Path(path).read_bytes())
            facts = json.loads(tensors["facts"].tobytes())
            vectors, keys = tensors["vectors"], [str(key) for key in facts["keys"]]
            if vectors.shape != (len(keys), facts["width"]) or vectors.dtype != np.float32 or len(set(keys)) != len(keys):
                raise ValueError("keys and vectors do not belong together")
            index = cls(int(facts["width"]), str(facts["kind"]), str(facts["model"]))
            index.add(keys, vectors)
            index._payloads = {k: p for k, p in zip(keys, facts["payloads"], strict=True) if p is not None}
        except FileNotFoundError:
            raise IndexFileError(f"no index at {path}; make one with Index.save or `weft embed --index`") from None
        except ModuleNotFoundError:
            raise
        except Exception as error:
            raise IndexFileError(f"{path} is not a whole weft index ({error}); build it again from the media") from error
        return index

    def _exact(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Scores and rows [q k] by blocks of rows, so that memory stays bounded."""
        rows = self._rows[: len(self)]
        best_scores = np.zeros((len(queries), 0), np.float32)
        best_rows = np.zeros((len(queries), 0), np.int64)
        for first in range(0, len(rows), _BLOCK):
            scores = queries @ rows[first : first + _BLOCK].T
            top = _top(scores, min(k, scores.shape[1]))
            best_scores = np.concatenate([best_scores, np.take_along_axis(scores, top, 1)], 1)
            best_rows = np.concatenate([best_rows, top + first], 1)
            order = np.argsort(-best_scores, axis=1, kind="stable")[:, :k]
            best_scores, best_rows = np.take_along_axis(best_scores, order, 1), np.take_along_axis(best_rows, order, 1)
        return best_scores, best_rows

    def _approximate(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        faiss = _faiss(required=True)
        if self._graph is None:
            # 32 neighbours and efSearch 128: recall@10 above 0.98 on random 64-wide vectors (tests/inference/test_index.py).
            self._graph = faiss.IndexHNSWFlat(self.width, 32, faiss.METRIC_INNER_PRODUCT)
            self._graph.hnsw.efConstruction = 200
            self._graph.add(self._rows[: len(self)])
        self._graph.hnsw.efSearch = max(128, 2 * k)
        return self._graph.search(queries, k)


def checked(vectors: Any, width: int) -> np.ndarray:
    """float32 [n width] from one vector or many. Raises ValueError for another width or numbers that are not finite."""
    array = np.ascontiguousarray(np.asarray(vectors, np.float32))
    array = array[None] if array.ndim == 1 else array
    if array.ndim != 2 or array.shape[1] != width:
        raise SearchError(f"this index holds vectors of width {width}, got shape {array.shape}")
    if not np.isfinite(array).all():
        raise SearchError("a vector holds NaN or infinity; embed the item again")
    return array


def named(keys: Iterable[str]) -> list[str]:
    """The keys as strings. A single string is refused: its letters are keys that nobody meant."""
    if isinstance(keys, str):
        raise SearchError(f"keys={keys!r} is one string; give a list of keys, for example [{keys!r}]")
    return [str(key) for key in keys]


def paired(keys: Sequence[str], vectors: np.ndarray, payloads: Sequence[Any] | None) -> list[str]:
    """The keys as strings, if there is one vector and perhaps one payload for each and all differ; else SearchError."""
    names = named(keys)
    if len(names) != len(vectors) or (payloads is not None and len(payloads) != len(names)):
        raise SearchError(f"{len(names)} keys need as many vectors and payloads, got {len(vectors)} vectors")
    try:
        json.dumps(payloads)
    except (TypeError, ValueError) as error:
        raise SearchError(
            f"a payload is nothing that JSON holds ({error}); give strings, numbers, lists or mappings"
        ) from error
    if len(set(names)) != len(names):
        raise SearchError("keys must differ from each other within one add")
    return names


def _top(scores: np.ndarray, k: int) -> np.ndarray:
    """Columns [q k] of the k largest, descending, ties by column."""
    if k < scores.shape[1]:
        # Everything at least as large as the k-th score is a candidate, so that ties resolve by column and not by chance.
        bound = -np.partition(-scores, k - 1, axis=1)[:, k - 1 : k]
        return np.stack([_ranked(row, np.flatnonzero(row >= edge))[:k] for row, edge in zip(scores, bound[:, 0])])
    return np.argsort(-scores, axis=1, kind="stable")


def _ranked(row: np.ndarray, columns: np.ndarray) -> np.ndarray:
    return columns[np.argsort(-row[columns], kind="stable")]


def _faiss(required: bool) -> Any:
    try:
        import faiss
    except ModuleNotFoundError:
        if required:
            raise ModuleNotFoundError("kind='hnsw' needs faiss; pip install 'weft[search]', or use kind='flat'") from None
        return None
    return faiss
