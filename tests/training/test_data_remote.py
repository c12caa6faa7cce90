"""Data behind a URL is the data: read from a real HTTP server, with and without byte ranges, through a bounded cache."""

from __future__ import annotations

import functools
import http.server
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.training.data_world import documents, tokenizer, write_manifest
from weft.training.data import storage
from weft.training.data.config import LoaderConfig, SourceConfig
from weft.training.data.index import ShardError
from weft.training.data.loader import Loader
from weft.training.data.prepare import PrepareError, prepare
from weft.training.data.shards import ShardDataset
from weft.training.data.sources import prepare_from
from weft.training.data.storage import RemoteStorage

pytest.importorskip("aiohttp", reason="fsspec reads http:// with aiohttp: pip install 'fsspec[http]'")
pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::DeprecationWarning")


class Files(http.server.SimpleHTTPRequestHandler):
    """Serves a folder; answers ranges if `ranges`; fails every `fail_every`-th request if that is set."""

    ranges = True
    fail_every = 0
    count = 0
    bytes_sent = 0

    def log_message(self, *_: Any) -> None:
        """Nothing."""

    def do_GET(self) -> None:
        kind = type(self)
        kind.count += 1
        if kind.fail_every and kind.count % kind.fail_every == 0:
            self.send_error(503)
            return
        path = Path(self.translate_path(self.path))
        if not path.is_file():
            self.send_error(404)
            return
        data, asked = path.read_bytes(), re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        part = data[int(asked[1]) : int(asked[2]) + 1] if asked and kind.ranges else data
        self.send_response(206 if asked and kind.ranges else 200)
        if asked and kind.ranges:
            self.send_header("Content-Range", f"bytes {asked[1]}-{int(asked[1]) + len(part) - 1}/{len(data)}")
        if kind.ranges:
            self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(part)))
        self.end_headers()
        kind.bytes_sent += len(part)
        self.wfile.write(part)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[tuple[str, type[Files]]]:
    """(address of a server of `tmp_path`, its handler)."""
    handler = type("Handler", (Files,), {})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(handler, directory=str(tmp_path))) as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield f"http://127.0.0.1:{running.server_port}", handler
        running.shutdown()
        thread.join()


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    prepare(write_manifest(tmp_path / "raw", documents(20)), tmp_path / "shards", shard_bytes=2**15)
    return tmp_path / "shards"


@pytest.mark.parametrize("ranges", [True, False])
def test_shards_behind_http_are_the_shards(shards: Path, server: Any, tmp_path: Path, ranges: bool) -> None:
    address, handler = server
    handler.ranges = ranges
    here, there = ShardDataset(shards), ShardDataset(f"{address}/shards", cache_dir=tmp_path / "cache")
    there.storage = RemoteStorage(f"{address}/shards", cache_dir=tmp_path / "small", cache_bytes=9000, block_bytes=3000)
    for number in (5, 0, 17, 3, 5):
        assert there.read(number).members == here.read(number).members
        assert sum(f.stat().st_size for f in there.storage.folder.iterdir()) <= 9000  # type: ignore[attr-defined]
    assert there.verify() == []


def test_only_what_is_read_travels_and_only_once(shards: Path, server: Any, tmp_path: Path) -> None:
    address, handler = server
    there = ShardDataset(f"{address}/shards", cache_dir=tmp_path / "cache")
    there.storage = RemoteStorage(f"{address}/shards", cache_dir=tmp_path / "few", block_bytes=4096)
    before = handler.bytes_sent
    size = there.locate(0)[1].size
    there.read(0)
    once = handler.bytes_sent - before
    assert size <= once <= size + 2 * 4096
    there.read(0)
    RemoteStorage(f"{address}/shards", cache_dir=tmp_path / "few", block_bytes=4096).read("train-000000.tar", 0, 100)
    assert handler.bytes_sent - before == once  # the cache outlives the process


def test_a_run_reads_the_same_steps_from_http_though_requests_fail(
    shards: Path, server: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    address, handler = server
    monkeypatch.setattr(storage, "PAUSES_S", (0.0, 0.0))
    handler.fail_every = 3
    config = LoaderConfig(batch_tokens=500, length=192, prefetch=0, shard_cache_folder=str(tmp_path / "cache"))
    found = []
    for path in (str(shards), f"{address}/shards"):
        with Loader([SourceConfig(path, name="x")], tokenizer(), config, seed=3) as loader:
            found.append([b.ids.tolist() for s in range(4) for b in loader.step(s).batches])
    assert found[0] == found[1]


def test_what_is_not_there_is_said(server: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    address, handler = server
    monkeypatch.setattr(storage, "PAUSES_S", ())
    with pytest.raises(ShardError, match=r"holds no dataset\.json; finish weft prepare or check the path"):
        ShardDataset(f"{address}/nowhere", cache_dir=tmp_path / "cache")
    handler.fail_every = 1
    with pytest.raises(ShardError, match=r"check the address and the access|check the path"):
        ShardDataset(f"{address}/shards", cache_dir=tmp_path / "cache")
    with pytest.raises(ShardError, match="use a scheme that fsspec knows"):
        ShardDataset("ftp9://a/b", cache_dir=tmp_path / "cache")
    with pytest.raises(PrepareError, match="check the address"):
        prepare_from(f"{address}/no.tar", tmp_path / "out")


@pytest.mark.parametrize("ranges", [True, False])
def test_webdataset_tars_from_http_and_file_urls(shards: Path, server: Any, tmp_path: Path, ranges: bool) -> None:
    address, handler = server
    handler.ranges = ranges
    count = len(list(shards.glob("train-*.tar")))
    assert count > 1
    name = f"train-{{000000..{count - 1:06d}}}.tar"
    plain = prepare_from(str(shards / name), tmp_path / "plain", name="x")
    for i, where in enumerate((f"{address}/shards/{name}", f"file://{shards}/{name}")):
        report = prepare_from(where, tmp_path / f"out{i}", name="x")
        assert report.samples == plain.samples == {"train": 18} and report.refused == {}
        for tar in (tmp_path / "plain").glob("*.tar"):
            assert (tmp_path / f"out{i}" / tar.name).read_bytes() == tar.read_bytes()
