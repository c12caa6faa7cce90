"""Prompts from files and replies to files."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile

from tests.inference.conftest import clip, moves, picture, readings
from weft.inference.errors import PromptError
from weft.inference.files import read_prompt, save_reply
from weft.inference.generalist import Generalist
from weft.inference.reply import Reply, Timings
from weft.tokenizers.segment import Audio, Text


def reply_of(*segments) -> Reply:
    none = np.zeros(0)
    return Reply(segments, none.astype(np.int64), none.astype(np.float32), none.astype(bool), "done", Timings(0, 0, 0, 0))


def test_what_is_saved_reads_back(tiny: Generalist, tmp_path: Path) -> None:
    tone = Audio(np.random.default_rng(0).uniform(-0.5, 0.5, 800).astype(np.float32), rate_hz=8000)
    named = replace(readings(), channels=("x", "y", "z"), units=("m", "m", "s"))
    paths = save_reply(reply_of(Text("caf\u00e9"), picture(), tone, named, moves(), clip()), tmp_path)
    assert [p.name for p in paths] == [
        "reply-0-text.txt",
        "reply-1-image.png",
        "reply-2-audio.wav",
        "reply-3-sensor.csv",
        "reply-4-action.csv",
        "reply-5-video",
    ]
    text, image, audio, sensor = read_prompt([str(p) for p in paths[:4]], rate_hz=50.0, kind="imu")
    assert text.text == "caf\u00e9"
    tokens = tiny.tokenizer.tokenizers["image"].encode(image)
    assert np.abs(tokens.features - tiny.tokenizer.tokenizers["image"].encode(picture()).features).max() <= 4 * 0.5 / 255 + 1e-6
    assert np.abs(soundfile.read(paths[2])[0] - tone.samples).max() < 1e-3
    assert np.allclose(sensor.values, named.values)
    assert (sensor.channels, sensor.units) == (named.channels, named.units)
    assert np.allclose(read_prompt([str(paths[4])], rate_hz=1.0)[0].values, moves().values)
    (video,) = read_prompt([str(paths[5])], rate_hz=5.0)
    assert tiny.tokenizer.tokenizers["video"].encode(video).grid == (3, 2, 2)
    assert tiny.generate([text, audio, sensor, video], max_tokens=2).text is not None


def test_text_and_files_mix_and_typing_errors_do_not_become_text(tmp_path: Path) -> None:
    (tmp_path / "a.md").write_text("hello")
    assert [s.text for s in read_prompt(["what is this?", str(tmp_path / "a.md"), "3.5 apples"])] == [
        "what is this?",
        "hello",
        "3.5 apples",
    ]
    with pytest.raises(PromptError, match=r"no file .*photo\.png"):
        read_prompt([str(tmp_path / "photo.png")])
    with pytest.raises(PromptError, match="empty"):
        read_prompt([])
    (tmp_path / "song.mp3").write_bytes(b"ID3")
    with pytest.raises(PromptError, match=r"song\.mp3 is a file of a kind that is not read; convert it to one of .*\.flac"):
        read_prompt([str(tmp_path / "song.mp3")])
    (tmp_path / "bad.txt").write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(PromptError, match="UTF-8"):
        read_prompt([str(tmp_path / "bad.txt")])
    np.save(tmp_path / "x.npy", np.zeros((3, 2)))
    with pytest.raises(PromptError, match="rate"):
        read_prompt([str(tmp_path / "x.npy")])
    np.save(tmp_path / "o.npy", np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(PromptError, match="not a table"):
        read_prompt([str(tmp_path / "o.npy")], rate_hz=1.0)


def test_tables_keep_every_row_and_gap(tmp_path: Path) -> None:
    """With and without a header, as spreadsheets save them (a byte order mark, empty cells)."""
    rows = np.array([[1.0, np.nan], [np.nan, 2.0], [3.0, np.nan]])
    for head, names in (("", None), ("\ufeff", None), ("x [m],y [m]\n", ("x", "y")), ("\ufeffx,y\n", ("x", "y"))):
        (tmp_path / "t.csv").write_text(f"{head}1,nan\n,2.0\n3,\n", encoding="utf-8")
        (sensor,) = read_prompt([str(tmp_path / "t.csv")], rate_hz=1.0)
        assert np.array_equal(sensor.values, rows, equal_nan=True)
        assert sensor.channels == names and sensor.units == (("m", "m") if "[m]" in head else None)
    (tmp_path / "t.csv").write_text("x,y\n1,high\n")
    with pytest.raises(PromptError, match="high"):
        read_prompt([str(tmp_path / "t.csv")], rate_hz=1.0)


def test_a_manifest_is_a_prompt(tmp_path: Path) -> None:
    (tmp_path / "d.json").write_text(json.dumps({"id": "1", "segments": [{"text": "one"}, {"text": "two"}]}))
    assert [s.text for s in read_prompt([str(tmp_path / "d.json")])] == ["one", "two"]
    (tmp_path / "e.json").write_text('{"segments": ')
    with pytest.raises(PromptError, match="not a document manifest"):
        read_prompt([str(tmp_path / "e.json")])
