"""Shards: readable by any WebDataset tool, and no cut or flipped byte goes unnoticed."""

import gc
import io
import json
import os
import tarfile
import warnings
from pathlib import Path

import fsspec
import numpy as np
import pytest
import webdataset

from weft.training.data.crc import crc32c
from weft.training.data.index import DatasetInfo, ShardError, ShardIndex, publish
from weft.training.data.shards import ShardDataset, ShardWriter, allowed, index_name
from weft.training.data.storage import LocalStorage, RemoteStorage, checked_name

SAMPLES = [
    (f"{i:09d}", [("json", b'{"i":%d}' % i), ("0.png", bytes(range(256)) * (i % 3)), ("1.npy", b"x" * i)]) for i in range(7)
]


def write(folder: Path) -> list[ShardIndex]:
    """Two shards of train, one of val."""
    folder.mkdir(parents=True, exist_ok=True)
    indexes = []
    for name, split, samples in (
        ("train-000000.tar", "train", SAMPLES[:3]),
        ("train-000001.tar", "train", SAMPLES[3:5]),
        ("val-000000.tar", "val", SAMPLES[5:]),
    ):
        writer = ShardWriter(folder, name, split)
        for key, members in samples:
            writer.add(key, members, source="s", counts={"text": {"segments": 1, "bytes": 3, "seconds": 0.0, "cells": 3}})
        indexes.append(writer.close(1, 9))
    info = DatasetInfo.of([(i, (folder / index_name(i.shard)).read_bytes()) for i in indexes], {}, "test")
    publish(folder / "dataset.json", info.to_bytes())
    return indexes


def test_crc_is_castagnoli_and_continues() -> None:
    assert crc32c(b"123456789") == 0xE3069283  # RFC 3720, B.4 polynomial, the standard check value
    assert crc32c(b"6789", crc32c(b"12345")) == 0xE3069283


def test_what_is_written_is_read_and_by_webdataset_too(tmp_path: Path) -> None:
    write(tmp_path)
    dataset = ShardDataset(tmp_path)
    assert [dataset.read(i).members for i in range(len(dataset))] == [dict(m) for _, m in SAMPLES[:5]]
    assert dataset.verify() == [] and ShardDataset(tmp_path, "val").read(1).members == dict(SAMPLES[6][1])
    urls = [str(tmp_path / f"train-00000{i}.tar") for i in range(2)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # webdataset 1.0.2 leaves its files to the garbage collector
        theirs = list(webdataset.WebDataset(urls, shardshuffle=False))
        gc.collect()
    assert [s["__key__"] for s in theirs] == [key for key, _ in SAMPLES[:5]]
    assert [{k: v for k, v in s.items() if not k.startswith("__")} for s in theirs] == [dict(m) for _, m in SAMPLES[:5]]


def test_a_shard_is_a_plain_ustar_without_machine_or_clock(tmp_path: Path) -> None:
    write(tmp_path / "a")
    write(tmp_path / "b")
    for name in os.listdir(tmp_path / "a"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    with tarfile.open(tmp_path / "a" / "train-000000.tar") as tar:
        for info in tar:
            assert info.isreg() and (info.mtime, info.uid, info.gid, info.uname, info.pax_headers) == (0, 0, 0, "", {})


def _outcome(folder: Path) -> list[dict[str, bytes]] | None:
    """What the dataset gives, or None where it notices."""
    try:
        dataset = ShardDataset(folder)
        return [dataset.read(i).members for i in range(len(dataset))]
    except ShardError:
        return None


def test_every_truncation_is_detected(tmp_path: Path) -> None:
    write(tmp_path)
    path = tmp_path / "train-000000.tar"
    data = path.read_bytes()
    for size in range(0, len(data), 64):
        path.write_bytes(data[:size])
        assert _outcome(tmp_path) is None, size
    path.unlink()
    assert _outcome(tmp_path) is None


@pytest.mark.parametrize("name", ["train-000000.tar", "train-000000.index.json", "dataset.json"])
def test_flips_are_detected_or_change_nothing(tmp_path: Path, name: str) -> None:
    write(tmp_path)
    truth = _outcome(tmp_path)
    path = tmp_path / name
    data = path.read_bytes()
    rng = np.random.default_rng(0)
    noticed = 0
    for at, bit in zip(rng.integers(0, len(data), 200), rng.integers(0, 8, 200)):
        flipped = bytearray(data)
        flipped[at] ^= 1 << bit
        path.write_bytes(flipped)
        found = _outcome(tmp_path)
        assert found is None or found == truth, (at, bit)
        noticed += found is None
    end = (
        ShardIndex.from_bytes((tmp_path / "train-000000.index.json").read_bytes(), "x").entries[-1]
        if name.endswith("tar")
        else None
    )
    if end is None:
        assert noticed >= 190  # white space in dataset.json may change without harm
    else:
        assert noticed == sum(int(a) < end.offset + end.size for a in np.random.default_rng(0).integers(0, len(data), 200))


def test_a_flip_names_shard_key_and_offset(tmp_path: Path) -> None:
    index = write(tmp_path)[0]
    entry = index.entries[1]
    data = bytearray((tmp_path / index.shard).read_bytes())
    data[entry.offset + 700] ^= 4
    (tmp_path / index.shard).write_bytes(data)
    dataset = ShardDataset(tmp_path)
    with pytest.raises(ShardError, match=f"train-000000.tar:000000001 at offset {entry.offset} is corrupted"):
        dataset.read(1)
    assert dataset.read(0).members == dict(SAMPLES[0][1])
    assert dataset.verify() == [f"{tmp_path}/train-000000.tar: SHA-256 differs from its index"]


def test_a_cut_shard_within_the_budget_is_opened_and_named(tmp_path: Path) -> None:
    index = write(tmp_path)[1]
    with open(tmp_path / index.shard, "r+b") as file:
        file.truncate(index.entries[1].offset + 10)
    with pytest.raises(ShardError, match=r"1 of 5 samples are lost: .*train-000001.tar has"):
        ShardDataset(tmp_path)
    dataset = ShardDataset(tmp_path, budget=0.2)
    assert "1 samples lost" in dataset.damaged[0] and dataset.read(3).members == dict(SAMPLES[3][1])
    with pytest.raises(ShardError, match="truncated"):
        dataset.read(4)


def test_an_index_that_lies_is_refused(tmp_path: Path) -> None:
    index = write(tmp_path)[0]
    good = json.loads((tmp_path / index_name(index.shard)).read_bytes())
    twice = {
        **good,
        "entries": [good["entries"][0], {**good["entries"][1], "key": good["entries"][0]["key"]}, good["entries"][2]],
    }
    swapped = {**good, "entries": [good["entries"][1], good["entries"][0], good["entries"][2]]}
    for value in (
        {**good, "samples": 2},
        twice,
        swapped,
        {**good, "entries": 3},
        [],
        {**good, "format": 9},
        {**good, "bytes": 100},
    ):
        with pytest.raises(ShardError):
            ShardIndex.from_bytes(json.dumps(value).encode(), "index")
    with pytest.raises(ShardError, match=r"no dataset.json; finish weft prepare"):
        ShardDataset(tmp_path / "nowhere")
    with pytest.raises(ShardError, match=r"no shard of split 'test'; splits with shards: train \(2\), val \(1\)"):
        ShardDataset(tmp_path, "test")


def test_names_stay_in_their_folder() -> None:
    for name in ("../x.tar", "/etc/passwd", "a/b.tar", "", "x", "..", "a..tar", "x.tar\n"):
        with pytest.raises(ShardError):
            checked_name(name)


def test_a_writer_refuses_what_a_reader_could_not_name(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, "train-000000.tar", "train")
    writer.add("a", [("json", b"{}")])
    for key, members in (
        ("a", [("json", b"{}")]),
        ("b.c", [("json", b"{}")]),
        ("../b", [("json", b"")]),
        ("b", [("pkl", b"")]),
        ("b", []),
    ):
        with pytest.raises(ValueError):
            writer.add(key, members)
    writer.abandon()
    assert list(tmp_path.iterdir()) == []


def test_a_url_reads_the_same_through_a_bounded_cache(tmp_path: Path) -> None:
    write(tmp_path / "here")
    memory = fsspec.filesystem("memory")
    memory.put(str(tmp_path / "here") + "/", "/shards-test/", recursive=True)
    try:
        local = ShardDataset(tmp_path / "here")
        remote = ShardDataset("memory://shards-test", cache_dir=tmp_path / "cache")
        store = RemoteStorage("memory://shards-test", cache_dir=tmp_path / "small", cache_bytes=3000, block_bytes=1000)
        remote.storage = store
        for i in (4, 0, 2, 1, 3, 0, 4):
            assert remote.read(i).members == local.read(i).members
            assert sum(f.stat().st_size for f in store.folder.iterdir()) <= 3000
        for block in store.folder.iterdir():  # a bad cache is not a bad shard: it is fetched again
            block.write_bytes(bytes(len(block.read_bytes())))
        assert [remote.read(i).members for i in range(5)] == [local.read(i).members for i in range(5)]
    finally:
        memory.rm("/shards-test", recursive=True)


def test_local_storage_keeps_few_files_open(tmp_path: Path) -> None:
    for i in range(9):
        (tmp_path / f"f{i}.tar").write_bytes(bytes([i]) * 10)
    storage = LocalStorage(str(tmp_path), max_open=2)
    before = len(os.listdir("/proc/self/fd"))
    assert [storage.read(f"f{i}.tar", 3, 2) for i in range(9)] == [bytes([i]) * 2 for i in range(9)]
    assert len(os.listdir("/proc/self/fd")) - before <= 2
    with pytest.raises(ShardError, match="truncated"):
        storage.read("f1.tar", 5, 6)


def test_the_budget_counts_whole_samples() -> None:
    assert [allowed(0.001, n) for n in (0, 1, 1000, 1001)] == [0, 1, 1, 2] and allowed(0.0, 50) == 0
    with pytest.raises(ValueError, match="share from 0 to 1"):
        allowed(5, 10)


def test_the_tar_ends_as_tar_demands(tmp_path: Path) -> None:
    write(tmp_path)
    data = (tmp_path / "train-000000.tar").read_bytes()
    assert len(data) % tarfile.RECORDSIZE == 0 and data[-1024:] == bytes(1024)
    with tarfile.open(fileobj=io.BytesIO(data), mode="r|") as tar:
        assert len(list(tar)) == 9
