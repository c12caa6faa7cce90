"""The decode pool survives what decoders do: hang with the interpreter lock held, crash, print, eat memory."""

import io
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import Future
from pathlib import Path

import numpy as np
import pytest

from tests.training.data_world import documents, tokenizer, write_manifest
from weft.training.data import wire
from weft.training.data.decode_pool import DecodePool, WorkerFailure, WorkerStartError
from weft.training.data.documents import Documents
from weft.training.data.prepare import prepare
from weft.training.data.shards import ShardDataset
from weft.training.data.token_cache import TokenCache

HOSTILE = """
import ctypes, os, sys, time
from weft.training.data.worker import Worker, guard, serve
class Hostile(Worker):
    def answer(self, task, header, blobs):
        if task == "hang":
            ctypes.PyDLL(None).sleep(60)  # holds the interpreter lock: no Python signal handler can run
        if task == "crash":
            ctypes.string_at(0)
        if task == "exit":
            os._exit(17)
        if task == "memory":
            return {"n": len(bytearray(4 << 30))}, []
        if task == "print":
            print("noise"); os.system("echo more noise")
        if task == "raise":
            raise KeyError("why")
        return {"pid": os.getpid(), **header}, blobs
guard()
serve(Hostile())
"""


@pytest.fixture
def hostile(tmp_path: Path) -> list[str]:
    (tmp_path / "hostile.py").write_text(HOSTILE)
    return [sys.executable, str(tmp_path / "hostile.py")]


def outcome(future: Future) -> str:
    try:
        return str(future.result()[0].get("x"))
    except WorkerFailure as error:
        return error.kind


def test_bad_tasks_cost_seconds_and_the_rest_is_answered(hostile: list[str]) -> None:
    with DecodePool(2, timeout_s=1.5, memory_bytes=2 << 30, command=hostile) as pool:
        began = time.monotonic()
        tasks = ["ok", "crash", "ok", "hang", "print", "raise", "exit", "memory", "ok"]
        found = [outcome(f) for f in [pool.submit(task, {"x": i}) for i, task in enumerate(tasks)]]
        assert found == ["0", "crash", "2", "timeout", "4", "error", "crash", "error", "8"]
        assert pool.killed == 3 and time.monotonic() - began < 30


def test_a_worker_that_cannot_start_is_no_bad_sample(tmp_path: Path) -> None:
    """Else a missing library would put every clip in quarantine, and a small data set would be trained on what is left."""
    command = [sys.executable, "-S", "-c", "raise SystemExit(3)"]
    with (
        DecodePool(1, command=command) as pool,
        pytest.raises(WorkerStartError, match=r"\(exit status 3\); run it by hand"),
    ):
        pool.submit("check", {}).result()
    prepare(write_manifest(tmp_path / "raw", documents(4)), tmp_path / "shards")
    pool = DecodePool(1, command=command)
    found = Documents([ShardDataset(tmp_path / "shards")], tokenizer(), pool, TokenCache())
    with pool, pytest.raises(WorkerStartError):
        found.get(0, 0)


def test_a_hung_worker_is_gone_and_so_are_all_after_close(hostile: list[str]) -> None:
    pool = DecodePool(1, timeout_s=0.5, command=hostile)
    first = pool.submit("ok", {}).result()[0]["pid"]
    assert outcome(pool.submit("hang", {})) == "timeout"
    second = pool.submit("ok", {}).result()[0]["pid"]
    pool.close()
    for pid in (first, second):
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
    pool.close()


ORPHAN = """
import sys
from weft.training.data.decode_pool import DecodePool
pool = DecodePool(1, timeout_s=60, command=sys.argv[1:])
print(pool.submit("ok", {}).result()[0]["pid"], flush=True)
pool.submit("hang", {}).result()
"""


def test_workers_die_with_a_killed_parent(hostile: list[str]) -> None:
    parent = subprocess.Popen([sys.executable, "-c", ORPHAN, *hostile], stdout=subprocess.PIPE)
    assert parent.stdout is not None
    worker = int(parent.stdout.readline())
    parent.send_signal(signal.SIGKILL)
    parent.communicate()
    end = time.monotonic() + 10
    while time.monotonic() < end and os.path.exists(f"/proc/{worker}/stat"):
        if Path(f"/proc/{worker}/stat").read_text().split()[2] == "Z":
            break
        time.sleep(0.02)
    assert time.monotonic() < end


def test_messages_round_trip_and_a_cut_one_is_noticed() -> None:
    arrays = {"a": np.arange(7, dtype=np.int32).reshape(7, 1), "b": None, "c": np.zeros((0, 3), np.float32)}
    table, blobs = wire.from_arrays(arrays)
    out = io.BytesIO()
    wire.send(out, {"t": table}, [*blobs, b"xyz"])  # type: ignore[arg-type]
    data = out.getvalue()
    message = wire.receive(io.BytesIO(data))  # type: ignore[arg-type]
    assert message is not None
    header, found = message
    back = wire.to_arrays(header["t"], found)
    assert found[2] == b"xyz" and set(back) == {"a", "c"} and back["a"].dtype == np.int32
    assert all(np.array_equal(back[k], arrays[k]) for k in back)
    assert wire.receive(io.BytesIO(b"")) is None  # type: ignore[arg-type]
    for size in range(5, len(data)):
        with pytest.raises((EOFError, ValueError)):
            wire.receive(io.BytesIO(data[:size]))  # type: ignore[arg-type]


def test_prepare_names_the_document_whose_clip_hung(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A decoder that hangs on one picture costs that document only."""
    docs = documents(9)
    manifest = write_manifest(tmp_path / "raw", docs)
    (tmp_path / "hang.py").write_text(
        "import ctypes, sys\n"
        "from weft.training.data.worker import Worker, guard, serve\n"
        "class Hanging(Worker):\n"
        "    def check(self, header, blobs):\n"
        "        if header['where'].endswith('line 5'):\n"
        "            ctypes.PyDLL(None).sleep(60)\n"
        "        return super().check(header, blobs)\n"
        "guard()\nworker = Hanging()\nworker.warm()\nserve(worker)\n"
    )
    start = DecodePool.__init__

    def with_hanging_workers(self: DecodePool, workers: int = 0, **settings: object) -> None:
        start(self, workers, **{**settings, "command": [sys.executable, str(tmp_path / "hang.py")]})  # type: ignore[arg-type]

    monkeypatch.setattr(DecodePool, "__init__", with_hanging_workers)
    report = prepare(manifest, tmp_path / "out", workers=2, timeout_s=8)
    assert report.refused == {"timeout": 1} and sum(report.samples.values()) == 8
    assert "line 5: it took longer than 8 s" in (tmp_path / "out" / "refused.jsonl").read_text()
