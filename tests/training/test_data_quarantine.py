"""What is known to be bad stays known, and one budget holds for a source however many ranks read it."""

from __future__ import annotations

from pathlib import Path

import pytest

from weft.training.data.quarantine import Quarantine, TooManyBadSamples, quarantined


def test_half_a_line_of_a_killed_process_costs_only_itself(tmp_path: Path) -> None:
    first = Quarantine({"clips": 9}, 0.5, tmp_path)
    first.add("clips", "a", 3, "slow")
    path = tmp_path / "quarantine-0.jsonl"
    path.write_text(path.read_text() + '{"draw": 4, "sam')
    Quarantine({"clips": 9}, 0.5, tmp_path).add("clips", "c", 8, "slow")
    again = Quarantine({"clips": 9}, 0.5, tmp_path)
    assert quarantined(tmp_path) == {"a": "slow", "c": "slow"}
    assert (again.holds("a", 3), again.holds("a", 2), again.holds("c", 8)) == (True, False, True)


def test_ranks_share_the_budget_of_a_source_but_not_what_they_found(tmp_path: Path) -> None:
    ranks = [Quarantine({"clips": 1000, "notes": 1000}, 0.002, tmp_path, rank) for rank in range(3)]
    ranks[0].add("clips", "a", 3, "slow")
    ranks[1].add("clips", "b", 4, "slow")
    ranks[1].add("notes", "x", 4, "slow")
    ranks[2].add("clips", "b", 5, "slow")
    assert not ranks[2].holds("a", 9), "a draw of this rank would then depend on when the other wrote"
    with pytest.raises(TooManyBadSamples, match=r"3 samples of source 'clips' .* allows 2 of 1000.*raise data.bad_budget"):
        ranks[2].add("clips", "c", 6, "slow")
