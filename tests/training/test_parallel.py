"""Work spread over processes gives what one process gives, in the same order, and fails as loudly."""

from __future__ import annotations

import os

import pytest

from weft.training.parallel import each


def squared(number: int) -> tuple[int, int]:
    if number < 0:
        raise ValueError(f"{number} is negative")
    return number * number, os.getpid()


def test_any_number_of_processes_gives_the_same_list() -> None:
    items = [3, 1, 2, 5]
    seen: list[tuple[int, int]] = []
    alone, spread = (each(squared, items, processes=n, done=lambda count, item: seen.append((count, item))) for n in (1, 2))
    assert [value for value, _ in alone] == [value for value, _ in spread] == [9, 1, 4, 25]
    assert {pid for _, pid in alone} == {os.getpid()} and os.getpid() not in {pid for _, pid in spread}
    assert [count for count, _ in seen] == [1, 2, 3, 4] * 2 and sorted(item for _, item in seen[4:]) == sorted(items)


@pytest.mark.parametrize("processes", [1, 2])
def test_an_error_in_a_part_is_the_callers(processes: int) -> None:
    with pytest.raises(ValueError, match="-1 is negative"):
        each(squared, [1, -1, 2], processes=processes)


def test_no_items_is_no_work() -> None:
    assert each(squared, []) == []
