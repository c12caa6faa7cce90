"""SIGTERM as a wish: the step in progress ends, a checkpoint is saved, and the process leaves with status 143."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator


class Terminated(SystemExit):
    """SIGTERM arrived: a checkpoint was saved, the exit status is 143."""

    def __init__(self) -> None:
        super().__init__(143)


@contextlib.contextmanager
def on_sigterm(event: threading.Event) -> Iterator[None]:
    """Set `event` when SIGTERM arrives. Only the main thread can listen; elsewhere nothing changes."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda *_: event.set())
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
