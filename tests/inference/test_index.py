"""Search: exact against brute force, one file, no surprises after remove."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from weft.inference.errors import IndexFileError
from weft.inference.index import Index


def unit(n: int, width: int, seed: int = 0) -> np.ndarray:
    rows = np.random.default_rng(seed).standard_normal((n, width)).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def brute(rows: np.ndarray, queries: np.ndarray, k: int) -> np.ndarray:
    return np.argsort(-(queries.astype(np.float64) @ rows.astype(np.float64).T), axis=1, kind="stable")[:, :k]


def test_flat_recall_is_exact_on_ten_thousand_vectors() -> None:
    rows, queries = unit(10_000, 32), unit(50, 32, 1)
    index = Index(32)
    index.add([str(i) for i in range(len(rows))], rows)
    found = [[int(hit.key) for hit in hits] for hits in index.search(queries, 10)]
    assert found == brute(rows, queries, 10).tolist()


def test_flat_is_exact_across_block_borders(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("weft.inference.index._BLOCK", 7)
    rows, queries = unit(53, 5), unit(11, 5, 1)
    index = Index(5)
    index.add([str(i) for i in range(53)], rows)
    assert [[int(h.key) for h in hits] for hits in index.search(queries, 9)] == brute(rows, queries, 9).tolist()


def test_hnsw_recall_is_above_098_and_removal_holds() -> None:
    pytest.importorskip("faiss")
    rows, queries = unit(3_000, 64), unit(50, 64, 1)
    index = Index(64, "hnsw")
    index.add([str(i) for i in range(len(rows))], rows)
    truth = brute(rows, queries, 10)
    hit = np.mean([len({int(h.key) for h in hits} & set(t)) / 10 for hits, t in zip(index.search(queries, 10), truth)])
    assert hit >= 0.98
    best = [hits[0].key for hits in index.search(queries, 1)]
    index.remove(set(best))
    assert not {h.key for hits in index.search(queries, 10) for h in hits} & set(best)


@settings(deadline=None, max_examples=40)
@given(st.lists(st.tuples(st.sampled_from("ar"), st.integers(0, 12)), max_size=30), st.integers(1, 6))
def test_any_history_of_adds_and_removes_equals_a_dictionary(history: list[tuple[str, int]], k: int) -> None:
    rows = unit(31, 3)
    index, truth = Index(3), dict[str, np.ndarray]()
    for step, (verb, number) in enumerate(history):
        key = str(number)
        if verb == "a":
            truth.pop(key, None)
            truth[key] = rows[step]
            index.add([key], rows[step], [step])
        elif key in truth:
            del truth[key]
            index.remove([key])
    assert index.keys == tuple(truth)
    hits = index.search(rows[-1], k)[0]
    ranked = sorted(truth, key=lambda key: -float(truth[key] @ rows[-1]))[:k]
    assert [hit.key for hit in hits] == ranked


@pytest.mark.parametrize("kind", ["flat", "hnsw"])
def test_saved_index_loads_equal(tmp_path, kind: str) -> None:
    if kind == "hnsw":
        pytest.importorskip("faiss")
    index = Index(5, kind, model="abc")
    index.add(["a", "b", "c"], unit(3, 5), [{"path": "a.png"}, None, 3])
    index.save(tmp_path / "x.index")
    again = Index.load(tmp_path / "x.index")
    query = unit(1, 5, 4)
    assert again.search(query, 3) == index.search(query, 3)
    assert (again.model, again.kind, list(tmp_path.iterdir())) == ("abc", kind, [tmp_path / "x.index"])


def test_wrong_calls_and_torn_files_are_refused(tmp_path) -> None:
    index = Index(5)
    index.add(["a"], unit(1, 5))
    with pytest.raises(ValueError, match="width 5, got shape"):
        index.search(unit(1, 4))
    with pytest.raises(ValueError, match="NaN"):
        index.add(["b"], np.full((1, 5), np.nan))
    with pytest.raises(KeyError, match="no key 'z'"):
        index.remove(["z"])
    with pytest.raises(ValueError, match="differ"):
        index.add(["q", "q"], unit(2, 5))
    for call in (lambda: index.remove("a"), lambda: index.add("b", unit(1, 5))):
        with pytest.raises(ValueError, match="is one string; give a list"):
            call()
    with pytest.raises(ValueError, match="'flat' or 'hnsw'"):
        Index(5, "ivf")
    with pytest.raises(IndexFileError, match="no index at"):
        Index.load(tmp_path / "none")
    index.save(tmp_path / "x")
    data = (tmp_path / "x").read_bytes()
    for cut in range(0, len(data), 7):
        (tmp_path / "torn").write_bytes(data[:cut])
        with pytest.raises(IndexFileError):
            Index.load(tmp_path / "torn")
    assert Index(5).search(unit(2, 5)) == [[], []]
