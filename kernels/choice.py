"""Which of several implementations of one function runs: an argument, a `with` block, an environment variable, or "auto".

    CHOICE = Choice("WEFT_QK_NORM", ("torch", "cuda"), auto="torch")
    with CHOICE.use("cuda"): ...

An implementation that was asked for by name and cannot run is an error of the one who calls it, never replaced in silence.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence


class ChoiceError(ValueError):
    """An implementation was asked for that does not exist, or that cannot serve the call."""


class Choice:
    """One function's implementations, and who is asked for the choice, first to last: the call, `use`, the variable, `auto`."""

    def __init__(self, variable: str, names: Sequence[str], auto: str) -> None:
        self.variable, self.names, self.auto = variable, tuple(names), auto
        self.forced: str | None = None

    def pick(self, asked: str | None = None) -> str:
        """The implementation to run. Raises ChoiceError for an unknown name."""
        name = asked or self.forced or os.environ.get(self.variable) or "auto"
        if name == "auto":
            return self.auto
        if name not in self.names:
            raise ChoiceError(f"{self.variable}: {name!r} is unknown; choose one of auto, {', '.join(self.names)}")
        return name

    @contextlib.contextmanager
    def use(self, name: str) -> Iterator[None]:
        """Run the named implementation in this block, in every thread ("auto": choose)."""
        before, self.forced = self.forced, name
        try:
            self.pick()
            yield
        finally:
            self.forced = before
