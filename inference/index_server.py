"""The interface of `Index` over a server: PostgreSQL with the pgvector extension, for vectors that many processes share.

In: keys, vectors [n E] and JSON payloads, as for `Index`. Out: the same `Hit`s in the same order. One table per index, and one
row in `weft_indexes` that says its width, its kind and which model made it. "flat" scans and is exact; "hnsw" builds pgvector's
graph. Every call is one transaction: other processes see all of it or nothing. Needs the extra `server` (psycopg 3).
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from weft.inference.errors import IndexServerError, SearchError
from weft.inference.index import Hit, Index, checked, named, paired

NAME = re.compile(r"[a-z][a-z0-9_]{0,39}")
BATCH = 1000
"""Rows that are written by one statement."""
MOST_EF = 1000
"""pgvector's largest hnsw.ef_search."""


class ServerIndex:
    """Vectors of one model under unique keys, in a table of a PostgreSQL database.

    `url` is a libpq address (`postgresql://user@host/database`), `name` the index: lower case letters, digits and `_`. It is
    made where it does not exist. Calls from several threads wait for each other; give each process its own object.
    Raises `IndexServerError` where the server, the extension or the stored index does not fit.
    """

    def __init__(self, url: str, name: str, width: int, kind: str = "flat", model: str = "", make: bool = True) -> None:
        """`make=False`: an index that does not exist is an error."""
        if kind not in ("flat", "hnsw"):
            raise SearchError(f"an index is 'flat' or 'hnsw', got {kind!r}")
        if not NAME.fullmatch(name):
            raise SearchError(f"index name {name!r} must be lower case letters, digits and _, at most 40, a letter first")
        if width < 1:
            raise SearchError(f"an index needs a vector width of at least 1, got {width}")
        self.name, self.width, self.kind, self.model = name, width, kind, model
        self._sql, self._connection = _connect(url)
        self._lock = threading.Lock()
        self._table = self._sql.Identifier(f"weft_{name}")
        try:
            with self._work() as cursor:
                self._open(cursor, make)
        except BaseException:
            self._connection.close()
            raise

    def _open(self, cursor: Any, make: bool) -> None:
        """Make the index, or compare what is stored with what is wanted."""
        cursor.execute("SELECT pg_advisory_xact_lock(hashtext('weft_indexes'))")  # two processes may open it at once
        cursor.execute("CREATE EXTENSION IF NOT EXISTS vector")
        cursor.execute(
            "CREATE TABLE IF NOT EXISTS weft_indexes "
            "(name text PRIMARY KEY, width int NOT NULL, kind text NOT NULL, model text NOT NULL)"
        )
        cursor.execute("SELECT width, kind, model FROM weft_indexes WHERE name = %s", (self.name,))
        found, wanted = cursor.fetchone(), (self.width, self.kind, self.model)
        if found is None and not make:
            raise IndexServerError(f"the server has no index {self.name!r}; make one with server_index or `weft embed --index`")
        if found is None:
            cursor.execute("INSERT INTO weft_indexes VALUES (%s, %s, %s, %s)", (self.name, *wanted))
            self._make(cursor)
            return
        for what, is_, should in zip(("width", "kind", "model"), found, wanted):
            if is_ != should:
                raise IndexServerError(
                    f"the server's index {self.name!r} has {what} {str(is_)[:16]!r}, not {str(should)[:16]!r}; "
                    "embed the items again under another name"
                )

    def _make(self, cursor: Any) -> None:
        columns = "(place bigserial UNIQUE, key text PRIMARY KEY, vector vector({}) NOT NULL, payload jsonb)"
        cursor.execute(self._query("CREATE TABLE {} " + columns, self._sql.Literal(self.width)))
        if self.kind == "hnsw":
            cursor.execute(self._query("CREATE INDEX ON {} USING hnsw (vector vector_ip_ops)"))

    # -- the interface of `Index`

    def __len__(self) -> int:
        with self._work() as cursor:
            return int(cursor.execute(self._query("SELECT count(*) FROM {}")).fetchone()[0])

    def __contains__(self, key: str) -> bool:
        with self._work() as cursor:
            return cursor.execute(self._query("SELECT 1 FROM {} WHERE key = %s"), (str(key),)).fetchone() is not None

    @property
    def keys(self) -> tuple[str, ...]:
        """All keys, in the order of adding."""
        with self._work() as cursor:
            return tuple(row[0] for row in cursor.execute(self._query("SELECT key FROM {} ORDER BY place")))

    def add(self, keys: Sequence[str], vectors: Any, payloads: Sequence[Any] | None = None) -> None:
        """Add `vectors` [n E] under `keys`; a key that exists is replaced. Payloads are anything that JSON holds."""
        rows = checked(vectors, self.width)
        names = paired(keys, rows, payloads)
        told = [None if payload is None else json.dumps(payload) for payload in payloads or [None] * len(names)]
        with self._work() as cursor:
            cursor.execute(self._query("DELETE FROM {} WHERE key = ANY(%s)"), (names,))
            for first in range(0, len(names), BATCH):
                some = zip(names[first : first + BATCH], map(_text, rows[first : first + BATCH]), told[first : first + BATCH])
                cursor.executemany(self._query("INSERT INTO {} (key, vector, payload) VALUES (%s, %s, %s)"), list(some))

    def remove(self, keys: Iterable[str]) -> None:
        """Forget these keys. An unknown key is an error, and then nothing is forgotten."""
        gone = sorted(set(named(keys)))
        with self._work() as cursor:
            done = cursor.execute(self._query("DELETE FROM {} WHERE key = ANY(%s) RETURNING key"), (gone,)).fetchall()
            if unknown := sorted(set(gone) - {row[0] for row in done}):
                raise KeyError(f"the index holds no key {unknown[0]!r}")

    def search(self, queries: Any, k: int = 10) -> list[list[Hit]]:
        """The k nearest of each query [q E], best first; fewer if the index holds fewer. Ties keep the order of adding."""
        queries = checked(queries, self.width)
        if k < 1:
            raise SearchError(f"search needs k >= 1, got {k}")
        order = "distance, place" if self.kind == "flat" else "distance"
        nearest = "SELECT key, vector <#> %s AS distance, payload, place FROM {} ORDER BY " + order + " LIMIT %s"
        query = self._query(f"SELECT key, -distance, payload FROM ({nearest}) AS nearest ORDER BY distance, place")
        with self._work() as cursor:
            if self.kind == "hnsw":
                cursor.execute(f"SET LOCAL hnsw.ef_search = {min(max(128, 2 * k), MOST_EF)}")
            found = [cursor.execute(query, (_text(row), k)).fetchall() for row in queries]
        return [[Hit(key, float(score), payload) for key, score, payload in hits] for hits in found]

    def save(self, path: str | Path) -> None:
        """Copy everything into one file that `Index.load` reads. The server needs no saving."""
        with self._work() as cursor:
            rows = cursor.execute(self._query("SELECT key, vector::text, payload FROM {} ORDER BY place")).fetchall()
        index = Index(self.width, self.kind, self.model)
        if rows:
            vectors = np.array([json.loads(row[1]) for row in rows], np.float32)
            index.add([row[0] for row in rows], vectors, [row[2] for row in rows])
        index.save(path)

    def drop(self) -> None:
        """Delete the index from the server, and close."""
        with self._work() as cursor:
            cursor.execute(self._query("DROP TABLE {}"))
            cursor.execute("DELETE FROM weft_indexes WHERE name = %s", (self.name,))
        self.close()

    def close(self) -> None:
        """Give the connection back; the index stays on the server."""
        self._connection.close()

    def __enter__(self) -> ServerIndex:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    # -- inside

    def _query(self, text: str, *values: Any) -> Any:
        return self._sql.SQL(text).format(self._table, *values)

    @contextmanager
    def _work(self) -> Iterator[Any]:
        """A cursor inside one transaction; errors of the server in one sentence."""
        import psycopg

        with self._lock:
            try:
                with self._connection.transaction(), self._connection.cursor() as cursor:
                    yield cursor
            except psycopg.Error as error:
                reason = str(error).splitlines()[0] if str(error) else type(error).__name__
                raise IndexServerError(
                    f"the search server refused index {self.name!r} ({reason}); check the address, its rights and pgvector"
                ) from error


def _connect(url: str) -> tuple[Any, Any]:
    """psycopg's SQL composition and an open connection."""
    try:
        import psycopg
        from psycopg import sql
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            "an index on a server needs psycopg; pip install 'weft[server]', or use the index in a file"
        ) from None
    try:
        return sql, psycopg.connect(url, autocommit=True, connect_timeout=10)
    except psycopg.Error as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise IndexServerError(f"no PostgreSQL server answers ({reason}); check the address and that it runs") from None


def _text(row: np.ndarray) -> str:
    """A vector as pgvector reads it; nine digits give every float32 back exactly."""
    return "[" + ",".join(f"{value:.9g}" for value in row.tolist()) + "]"
