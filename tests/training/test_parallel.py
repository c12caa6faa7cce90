"""Work spread over processes gives what one process gives, in the same order, and fails as loudly."""

from __future__ import annotations

import os

import pytest

from weft.training.parallel import each, kept_workers


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


def test_kept_workers_serve_several_calls() -> None:
    with kept_workers(2):
        first, second = (each(squared, [1, 2, 3, 4], processes=2) for _ in range(2))
        with pytest.raises(ValueError, match="-1 is negative"):
            each(squared, [-1, -1], processes=2)
        third = each(squared, [5, 6], processes=2)
    pids = {pid for made in (first, second, third) for _, pid in made}
    assert len(pids) <= 2 and [value for value, _ in third] == [25, 36]


def test_no_items_is_no_work() -> None:
    assert each(squared, []) == []
