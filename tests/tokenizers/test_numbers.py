"""Tables of readings: every row and gap is kept, and what is no table is named by its line."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from weft.tokenizers.manifest import ManifestError, load_document
from weft.tokenizers.numbers import csv_table


@given(
    st.integers(1, 4).flatmap(
        lambda c: st.lists(st.lists(st.floats(allow_infinity=False), min_size=c, max_size=c), min_size=1, max_size=9)
    ),
    st.sampled_from(["\n", "\r\n"]),
    st.sampled_from(["", "\ufeff"]),
    st.booleans(),
)
def test_any_table_returns_with_its_gaps(rows: list[list[float]], end: str, mark: str, named: bool) -> None:
    rows[-1] = [0.5 for _ in rows[-1]]  # a gap of one channel at the very end is an empty line
    heads = [f"c{i} [m]" for i in range(len(rows[0]))]
    cells = [heads] * named + [["" if v != v else repr(v) for v in row] for row in rows]
    text = mark + end.join(",".join(line) for line in cells) + end
    values, channels, units = csv_table(text.encode())
    assert np.array_equal(values, np.array(rows), equal_nan=True)
    assert channels == (tuple(f"c{i}" for i in range(len(heads))) if named else None)
    assert units == (("m",) * len(heads) if named else None)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "no readings"),
        ("\n\n", "no readings"),
        ("x,y\n", "no readings"),
        ("x,y\n1,2\n3\n4,5\n", "line 3 has 1 cells, the last one 2"),
        ("1,2\n3,high\n", "line 2: could not convert string to float: 'high'"),
        ("a;b\n1;2\n", "line 2: could not convert"),
    ],
)
def test_what_is_no_table_is_named_by_its_line(text: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        csv_table(text.encode())


def test_a_manifest_may_name_a_table(tmp_path: Path) -> None:
    (tmp_path / "imu.csv").write_text('"x [g]","y [g]"\n1,\n,2\n')
    (tmp_path / "moves.csv").write_text("3\n0\n")
    (tmp_path / "bad.csv").write_text("1\nup\n")
    sensor = {"sensor": "imu.csv", "rate_hz": 2}
    imu, moves = load_document(
        {"segments": [sensor, {"action": "moves.csv", "space": {"n": 4}, "rate_hz": 2}]}, tmp_path
    ).segments
    assert (imu.channels, imu.units) == (("x", "y"), ("g", "g"))
    assert np.array_equal(imu.values, [[1, np.nan], [np.nan, 2]], equal_nan=True)
    assert moves.values.dtype == np.int64 and moves.values.tolist() == [[3], [0]]
    (own,) = load_document({"segments": [sensor | {"channels": ["a", "b"]}]}, tmp_path).segments
    assert own.channels == ("a", "b") and own.units == ("g", "g")
    with pytest.raises(ManifestError, match=r"bad\.csv is no table of numbers \(line 2"):
        load_document({"segments": [{"sensor": "bad.csv", "rate_hz": 1}]}, tmp_path)
