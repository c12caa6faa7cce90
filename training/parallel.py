"""The same work on many items, one process per core: stages whose parts do not depend on each other.

In: a function of a module (children import it by name) and items. Out: what it returned, in the order of the items. On one
core, or with one item, everything runs in this process.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager, nullcontext
from typing import TypeVar

Item = TypeVar("Item")
Made = TypeVar("Made")


def cores() -> int:
    """CPU cores that this process may use, at most 8."""
    have = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, min(8, have or 1))


_kept: list[ProcessPoolExecutor] = []


@contextmanager
def kept_workers(processes: int | None = None) -> Iterator[None]:
    """Calls of `each` in this block share one set of processes, which read their modules once, from now on."""
    count = processes or cores()
    with _pool(count) as pool:
        if count > 1:
            for _ in range(count):
                pool.submit(_one_thread)
        _kept.append(pool)
        try:
            yield
        finally:
            _kept.remove(pool)


def each(
    work: Callable[[Item], Made],
    items: Sequence[Item],
    *,
    done: Callable[[int, Item], None] = lambda count, item: None,
    processes: int | None = None,
) -> list[Made]:
    """work(item) for every item; `done(how many are finished, which one just was)` in this process.

    Items start in their order, so put the longest first. The first error is raised here, and what has not begun is dropped.
    """
    count = min(processes or cores(), len(items))
    if count <= 1:
        return [_told(work(item), done, i + 1, item) for i, item in enumerate(items)]
    with nullcontext(_kept[-1]) if _kept else _pool(count) as pool:
        futures = {pool.submit(work, item): i for i, item in enumerate(items)}
        try:
            for finished, future in enumerate(as_completed(futures), 1):
                future.result()
                done(finished, items[futures[future]])
        except BaseException:
            for future in futures:
                future.cancel()
            raise
        return [future.result() for future in futures]


def _pool(count: int) -> ProcessPoolExecutor:
    context = multiprocessing.get_context("spawn")  # a forked child of a process with threads may hang
    return ProcessPoolExecutor(count, context, initializer=_one_thread)


def _told(made: Made, done: Callable[[int, Item], None], count: int, item: Item) -> Made:
    done(count, item)
    return made


def _one_thread() -> None:
    """Every process has a core; a second thread would take another's."""
    import torch

    torch.set_num_threads(1)


__all__ = ["cores", "each", "kept_workers"]
