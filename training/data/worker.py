"""What a decode worker does: `python -m weft.training.data.worker [--tokenizer DIR]`, spoken to over stdin and stdout.

Tasks: `check` (decode one segment of a manifest and count what is in it) and `encode` (segment to tokens).
The process dies with its parent, holds a limit on its address space, and keeps stdout for answers only.
"""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

from weft.training.data import wire


class Worker:
    """Answers tasks; holds the tokenizers once they are needed."""

    def __init__(self, tokenizer: str | None = None) -> None:
        self._folder = tokenizer
        self._bundle: Any = None

    def answer(self, task: str, header: dict[str, Any], blobs: list[bytes]) -> wire.Message:
        """One answer; any exception is the caller's to report."""
        if task == "check":
            return self.check(header, blobs)
        if task == "encode":
            return self.encode(header, blobs)
        raise ValueError(f"unknown task {task!r}")

    def check(self, header: dict[str, Any], blobs: list[bytes]) -> wire.Message:
        """{"members": names} and their bytes -> {"counts": ...} or {"refused": {...}}."""
        from weft.training.data.check import check_sample
        from weft.training.data.records import Refused

        try:
            return {"counts": check_sample(dict(zip(header["members"], blobs)), header["where"])}, []
        except Refused as error:
            return {"refused": {"reason": error.reason, "detail": str(error), "segment": error.segment}}, []

    def encode(self, header: dict[str, Any], blobs: list[bytes]) -> wire.Message:
        """Members of a sample and the number of a segment -> its tokens."""
        from weft.training.data.records import restore_segment

        segment = restore_segment(dict(zip(header["members"], blobs)), header["segment"])
        tokens = self.bundle().tokenizers[segment.modality].encode(segment)
        arrays = {name: getattr(tokens, name) for name in ("codes", "time", "features", "place")}
        table, data = wire.from_arrays(arrays)
        return {"arrays": table, "grid": [int(n) for n in tokens.grid], "group": int(tokens.group)}, data

    def warm(self) -> None:
        """Import the decoders and load the tokenizers before the first task, so that no task's clock pays for it."""
        import importlib

        for name in ("PIL.Image", "soundfile", "torchaudio.functional", "weft.training.data.check"):
            importlib.import_module(name)
        for kind in ("image", "audio", "video"):
            importlib.import_module(f"weft.tokenizers.media.{kind}")
        if self._folder is not None:
            self.bundle()

    def bundle(self) -> Any:
        """The stream tokenizer, loaded on first use."""
        if self._bundle is None:
            from weft.tokenizers.bundle import StreamTokenizer

            if self._folder is None:
                raise ValueError("this worker was started without a tokenizer folder")
            self._bundle = StreamTokenizer.load(self._folder)
        return self._bundle


def serve(worker: Worker) -> None:
    """Answer until the parent closes the pipe."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # a library that prints must not talk into the answers
    wire.send(answers, {"ready": True})  # type: ignore[arg-type]
    while (message := wire.receive(sys.stdin.buffer)) is not None:  # type: ignore[arg-type]
        header, blobs = message
        try:
            reply, data = worker.answer(header.pop("task"), header, blobs)
        except Exception as error:
            reply, data = {"error": f"{type(error).__name__}: {error}"[:2000]}, []
        wire.send(answers, reply, data)  # type: ignore[arg-type]


def guard() -> None:
    """Limit memory and die with the parent (Linux; elsewhere the closed pipe ends the process)."""
    import faulthandler

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    faulthandler.enable()
    try:
        import ctypes
        import resource

        if limit := int(os.environ.get("WEFT_WORKER_BYTES", "0")):
            resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    except (ImportError, OSError, ValueError, AttributeError) as error:
        print(f"decode worker runs without limits: {error}", file=sys.stderr)


def main(argv: list[str]) -> None:
    guard()
    worker = Worker(argv[argv.index("--tokenizer") + 1] if "--tokenizer" in argv else None)
    worker.warm()
    serve(worker)


if __name__ == "__main__":
    main(sys.argv[1:])
