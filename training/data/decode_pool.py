"""Workers that can be killed: media are decoded in child processes, each task against a wall clock.

In: a task name, a JSON header and blobs. Out: a future with the worker's answer, or `WorkerFailure` naming what happened
(error, timeout, crash). A decoder that hangs while it holds the interpreter lock cannot be stopped from inside its
process, so the child gets SIGKILL and a new one takes its place: one bad clip costs its time limit and a start.

`workers=0` runs the tasks in this process: no clock, no protection, no start-up cost.
"""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Literal

from weft.training.data import wire

log = logging.getLogger(__name__)
START_S = 180.0
"""Seconds a child may take to import what it needs, on a busy machine."""


class WorkerFailure(RuntimeError):
    """A task did not end well; `kind` says how."""

    def __init__(self, kind: Literal["error", "timeout", "crash"], detail: str) -> None:
        super().__init__(detail)
        self.kind = kind


class WorkerStartError(ValueError):
    """No worker can be started, so nothing can be said about the media."""


class _Child:
    """One worker process and the pipe to it; used by one thread at a time."""

    def __init__(self, command: Sequence[str], memory_bytes: int) -> None:
        env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "WEFT_WORKER_BYTES": str(memory_bytes)}
        env["PYTHONPATH"] = os.pathsep.join(p for p in sys.path if p)
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=env)
        self.deadline: float | None = None
        self.late = False

    def ask(self, header: dict[str, Any], blobs: Sequence[bytes], limit_s: float) -> wire.Message | None:
        """One request and its answer; None where the child died (or was killed, then `late`)."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.deadline = time.monotonic() + limit_s
        try:
            if header:
                wire.send(self.process.stdin, header, blobs)  # type: ignore[arg-type]
            return wire.receive(self.process.stdout)  # type: ignore[arg-type]
        except (OSError, EOFError, ValueError):
            return None
        finally:
            self.deadline = None

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            try:
                if pipe:
                    pipe.close()
            except OSError:  # what was still buffered for a dead child
                pass


class DecodePool:
    """`workers` child processes that answer tasks of `weft.training.data.worker`."""

    def __init__(
        self,
        workers: int = 0,
        *,
        timeout_s: float = 20.0,
        memory_bytes: int = 16 * 2**30,
        tokenizer: str | None = None,
        command: Sequence[str] | None = None,
    ) -> None:
        if workers < 0 or not timeout_s > 0:
            raise ValueError(f"decode workers {workers} and timeout_s {timeout_s} must be at least 0 and above 0")
        self.workers, self.timeout_s = workers, timeout_s
        self.killed = 0
        self._memory = memory_bytes
        self._tokenizer = tokenizer
        self._command = list(command or [sys.executable, "-m", "weft.training.data.worker"])
        if tokenizer:
            self._command += ["--tokenizer", tokenizer]
        self._threads = ThreadPoolExecutor(workers, "decode") if workers else None
        self._own = threading.local()
        self._children: list[_Child] = []
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._inline: Any = None
        if workers:
            threading.Thread(target=self._watch, name="decode watchdog", daemon=True).start()

    def submit(self, task: str, header: dict[str, Any], blobs: Sequence[bytes] = ()) -> Future[wire.Message]:
        """Answer of `task`, or `WorkerFailure`, in a future; `WorkerStartError` where no process can be started."""
        if self._threads is not None:
            return self._threads.submit(self._run, {"task": task, **header}, blobs)
        done: Future[wire.Message] = Future()
        try:
            done.set_result(self._here(task, header, list(blobs)))
        except Exception as error:
            done.set_exception(WorkerFailure("error", f"{type(error).__name__}: {error}"))
        return done

    def close(self) -> None:
        """End the children; pending tasks fail."""
        self._closed.set()
        if self._threads is not None:
            self._threads.shutdown(wait=False, cancel_futures=True)
            with self._lock:
                for child in self._children:
                    child.process.kill()
            self._threads.shutdown(wait=True)
            for child in self._children:
                child.kill()

    def __enter__(self) -> DecodePool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _here(self, task: str, header: dict[str, Any], blobs: list[bytes]) -> wire.Message:
        from weft.training.data.worker import Worker

        self._inline = self._inline or Worker(self._tokenizer)
        return self._inline.answer(task, header, blobs)

    def _run(self, header: dict[str, Any], blobs: Sequence[bytes]) -> wire.Message:
        child = self._mine()
        answer = child.ask(header, blobs, self.timeout_s)
        if answer is None:
            self._bury(child)
            if child.late:
                raise WorkerFailure("timeout", f"it took longer than {self.timeout_s:g} s and its worker was killed")
            raise WorkerFailure("crash", f"its worker died with exit status {child.process.returncode}")
        if "error" in answer[0]:
            raise WorkerFailure("error", answer[0]["error"])
        return answer

    def _mine(self) -> _Child:
        """This thread's child, started and ready."""
        child = getattr(self._own, "child", None)
        if child is None:
            if self._closed.is_set():
                raise WorkerFailure("crash", "the pool is closed")
            child = self._own.child = _Child(self._command, self._memory)
            with self._lock:
                self._children.append(child)
            if child.ask({}, (), START_S) is None:
                self._bury(child)
                raise WorkerStartError(
                    f"a decoding process did not start (exit status {child.process.returncode}); run it by hand to see why: "
                    f"{' '.join(self._command)}"
                )
        return child

    def _bury(self, child: _Child) -> None:
        self.killed += 1
        self._own.child = None
        with self._lock:
            self._children.remove(child)
        child.kill()

    def _watch(self) -> None:
        """Kill children past their deadline."""
        while not self._closed.wait(0.05):
            now = time.monotonic()
            with self._lock:
                for child in self._children:
                    deadline = child.deadline
                    if deadline is not None and now > deadline:
                        child.late = True
                        child.process.kill()
