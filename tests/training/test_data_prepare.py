"""Prepare: the same shards whatever the workers or the kills, every refusal counted and named."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import soundfile

from tests.training.data_world import documents, episode, write_manifest, write_media
from weft.training.data.prepare import PrepareError, prepare
from weft.training.data.records import restore
from weft.training.data.shards import ShardDataset


def contents(folder: Path) -> dict[str, bytes]:
    """Every file, for comparison."""
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}


def test_documents_come_back_as_they_were(tmp_path: Path) -> None:
    docs = documents(40)
    manifest = write_manifest(tmp_path / "raw", docs)
    report = prepare(manifest, tmp_path / "out", shard_bytes=2**15)
    assert report.samples == {"train": 36, "val": 4} and report.refused == {} and report.shards > 3
    found = {}
    for split in ("train", "val"):
        dataset = ShardDataset(tmp_path / "out", split)
        for i in range(len(dataset)):
            sample = dataset.read(i)
            document = restore(sample.members, sample.where)
            found[document.id] = (split, document)
    for doc in docs:
        split, document = found[doc["id"]]
        assert split == doc["split"] and document.source == doc["source"] and len(document.segments) == len(doc["segments"])
        for segment, spec in zip(document.segments, doc["segments"]):
            if "text" in spec:
                assert segment.text == spec["text"]
            for key, field in (("image", "pixels"), ("audio", "samples")):
                if key in spec:
                    assert getattr(segment, field) == (tmp_path / "raw" / spec[key]).read_bytes()
            for key in ("sensor", "action"):
                if key in spec:
                    assert np.array_equal(segment.values, spec[key])
            assert segment.role == spec.get("role", "either")


def test_counts_say_what_a_sample_holds(tmp_path: Path) -> None:
    prepare(write_manifest(tmp_path / "raw", documents(4)), tmp_path / "out")
    caption, note, _, control = ShardDataset(tmp_path / "out").entries()
    picture = (tmp_path / "raw" / "picture0.png").stat().st_size
    assert caption.counts["image"] == {"segments": 1, "bytes": picture, "seconds": 0.0, "cells": 16 * 24}
    assert note.counts["audio"]["seconds"] == pytest.approx(0.2, abs=1e-3)
    assert control.counts["sensor"]["cells"] == 24 and control.counts["action"]["seconds"] == pytest.approx(1.2)
    assert control.task == "task1" and caption.source == "captions"


def test_workers_change_no_byte(tmp_path: Path) -> None:
    manifest = write_manifest(tmp_path / "raw", documents(30))
    seen = []
    prepare(manifest, tmp_path / "none", shard_bytes=2**15)
    prepare(manifest, tmp_path / "two", shard_bytes=2**15, workers=2, progress=seen.append)
    assert contents(tmp_path / "none") == contents(tmp_path / "two")
    assert [p.records for p in seen] == list(range(1, 31)) and seen[-1].samples == 30


KILLED = """
import sys
from weft.training.data import prepare as p
from weft.training.data.shards import ShardWriter
stop, manifest, out = int(sys.argv[1]), sys.argv[2], sys.argv[3]
add = ShardWriter.add
def slow(self, *a, **k):
    global stop
    stop -= 1
    if stop < 0:
        print("now", flush=True)
        import time; time.sleep(60)
    return add(self, *a, **k)
ShardWriter.add = slow
p.prepare(manifest, out, shard_bytes=2**15)
"""


def test_killed_and_resumed_equals_uninterrupted(tmp_path: Path) -> None:
    docs = documents(40)
    docs[7]["segments"] = [{"image": "nowhere.png"}]
    docs[31]["segments"] = []
    manifest = write_manifest(tmp_path / "raw", docs)
    report = prepare(manifest, tmp_path / "whole", shard_bytes=2**15)
    for stop in (0, 17, 11):  # samples written by each start before SIGKILL
        child = subprocess.Popen(
            [sys.executable, "-c", KILLED, str(stop), str(manifest), str(tmp_path / "out")], stdout=subprocess.PIPE
        )
        assert child.stdout is not None and child.stdout.readline() == b"now\n"
        child.send_signal(signal.SIGKILL)
        child.communicate()
        for tar in (tmp_path / "out").glob("*.tar"):
            assert tar.read_bytes() == (tmp_path / "whole" / tar.name).read_bytes()
    again = prepare(manifest, tmp_path / "out", shard_bytes=2**15)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert again.resumed_shards > 0 and again.refused == report.refused == {"missing file": 1, "bad manifest": 1}
    assert prepare(manifest, tmp_path / "out", shard_bytes=2**15).resumed_shards == again.shards
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_folder_of_another_manifest_is_left_alone(tmp_path: Path) -> None:
    manifest = write_manifest(tmp_path / "raw", documents(4))
    prepare(manifest, tmp_path / "out")
    before = contents(tmp_path / "out")
    other = write_manifest(tmp_path / "raw", documents(5), "other.jsonl")
    with pytest.raises(PrepareError, match="another manifest"):
        prepare(other, tmp_path / "out")
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "x.tar").write_bytes(b"")
    with pytest.raises(PrepareError, match="did not write"):
        prepare(manifest, tmp_path / "foreign")
    assert contents(tmp_path / "out") == before


BAD: list[tuple[str, dict, str]] = [
    ("missing file", {"segments": [{"image": "nowhere.png"}]}, "nowhere.png does not exist"),
    ("unreadable media", {"segments": [{"text": "a"}, {"image": "cut.png"}]}, "segment 1: .*cannot be read"),
    ("unreadable media", {"segments": [{"audio": "cut.flac"}]}, "cannot be read"),
    ("file type", {"segments": [{"image": "manifest.jsonl"}]}, "png, jpg, jpeg, webp are read"),
    ("bad manifest", {"segments": [{"image": "../raw/../../etc/passwd"}]}, "leaves the manifest's folder"),
    ("bad manifest", {"segments": [{"image": "/etc/passwd"}]}, "leaves the manifest's folder"),
    ("bad manifest", {"segments": [{"txt": "a"}]}, "needs exactly one of"),
    ("bad manifest", {"segments": [{"text": "a", "image": "picture0.png"}]}, "needs exactly one of"),
    ("bad manifest", {"segments": [{"text": "a", "colour": 1}]}, "colour"),
    ("bad manifest", {"segments": [{"text": 5}]}, "text"),
    ("bad manifest", {"segments": "a"}, "segments must be a list"),
    ("bad manifest", {"segments": [{"text": "a"}], "split": "trian"}, "split 'trian' must be one of train, val, test"),
    ("bad manifest", {"segments": [{"text": "a"}], "metadata": 3}, "metadata must be a JSON object"),
    ("bad manifest", {"segments": [{"text": "a"}], "spilt": "val"}, "spilt"),
    ("bad values", {"segments": [{"sensor": [[1, 2], [3]], "rate_hz": 1}]}, "no regular array"),
    ("bad values", {"segments": [{"sensor": ["a", "b"], "rate_hz": 1}]}, "sensor|array"),
    ("bad values", {"segments": [{"action": [0, 5], "space": {"n": 3}, "rate_hz": 1}]}, "0 to 2"),
    ("bad values", {"segments": [{"action": [[0.5]], "space": {"low": [1], "high": [2]}}]}, "leave their space"),
    ("bad times", {"segments": [{"sensor": [1, 2, 3], "times_s": [0, 2, 1]}]}, "before"),
    ("bad times", {"segments": [{"sensor": [1, 2, 3], "times_s": [0, 2]}]}, "2 times for 3"),
]


@pytest.mark.parametrize("workers", [0, 1])
def test_each_refusal_has_its_line_reason_and_repair(tmp_path: Path, workers: int) -> None:
    good = documents(2)
    manifest = write_manifest(tmp_path / "raw", [good[0], *(doc for _, doc, _ in BAD), good[1]])
    (tmp_path / "raw" / "cut.png").write_bytes((tmp_path / "raw" / "picture0.png").read_bytes()[:300])
    (tmp_path / "raw" / "cut.flac").write_bytes((tmp_path / "raw" / "tone0.flac").read_bytes()[:30])
    with open(manifest, "a") as file:
        file.write("{not json}\n[1, 2]\n\n" + "[" * 20_000 + "\n")
    report = prepare(manifest, tmp_path / "out", workers=workers)
    assert report.samples == {"train": 2}
    assert report.refused == Counter([reason for reason, _, _ in BAD] + ["bad manifest"] * 3)
    lines = [json.loads(line) for line in (tmp_path / "out" / "refused.jsonl").read_text().splitlines()]
    assert [item["line"] for item in lines] == [*range(2, len(BAD) + 2), len(BAD) + 3, len(BAD) + 4, len(BAD) + 6]
    for item, (reason, _, text) in zip(lines, BAD):
        assert item["reason"] == reason, item
        assert re.search(text, item["detail"]), item
        assert f"manifest.jsonl line {item['line']}" in item["detail"]


def test_nothing_usable_is_an_error_with_the_first_reason(tmp_path: Path) -> None:
    manifest = write_manifest(tmp_path / "raw", [{"segments": [{"image": "nowhere.png"}]}])
    with pytest.raises(PrepareError, match=r"no document of 1 could be used: .*nowhere.png does not exist"):
        prepare(manifest, tmp_path / "out")
    with pytest.raises(PrepareError, match="cannot be read"):
        prepare(tmp_path / "none.jsonl", tmp_path / "out2")


def test_arrays_and_folders_of_frames_may_stand_in_the_manifest(tmp_path: Path) -> None:
    raw = tmp_path / "raw"
    write_media(raw)
    (raw / "clip").mkdir()
    for i in (2, 10, 1):
        (raw / "clip" / f"frame{i}.png").write_bytes((raw / f"picture{i % 5}.png").read_bytes())
    np.save(raw / "sound.npy", np.linspace(-1, 1, 900, dtype=np.float32))
    np.save(raw / "imu.npy", np.arange(60, dtype=np.float32).reshape(20, 3))
    docs = [
        {
            "segments": [
                {"video": "clip", "rate_hz": 5},
                {"audio": "sound.npy", "rate_hz": 8000},
                {"sensor": "imu.npy", "rate_hz": 50, "channels": ["x", "y", "z"]},
                {"sensor": [[0.5, None], [1, 2]], "rate_hz": 10},
                {"sensor": [[0.5, None]] * 20, "rate_hz": 10},
            ]
        }
    ]
    assert prepare(write_manifest(raw, docs), tmp_path / "out").refused == {}
    sample = ShardDataset(tmp_path / "out").read(0)
    video, audio, imu, small, large = restore(sample.members, sample.where).segments
    assert [frame == (raw / f"picture{i % 5}.png").read_bytes() for frame, i in zip(video.frames, (1, 2, 10))] == [True] * 3
    (tmp_path / "s.wav").write_bytes(audio.samples)
    assert np.array_equal(soundfile.read(tmp_path / "s.wav", dtype="float32")[0], np.load(raw / "sound.npy"))
    assert np.array_equal(imu.values, np.load(raw / "imu.npy")) and imu.channels == ("x", "y", "z")
    assert np.array_equal(small.values, [[0.5, np.nan], [1, 2]], equal_nan=True)
    assert large.values.shape == (20, 2) and np.isnan(large.values[:, 1]).all()


def test_throughput_is_not_absurd(tmp_path: Path) -> None:
    """A guard against quadratic work, not a benchmark."""
    docs = [episode(i) for i in range(400)]
    manifest = write_manifest(tmp_path / "raw", docs)
    began = time.process_time()
    prepare(manifest, tmp_path / "out")
    assert time.process_time() - began < 5
    assert os.path.exists(tmp_path / "out" / "dataset.json")
