"""Manifests: what is read is what was written, and every mistake is named with its place."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from weft.tokenizers.manifest import ManifestError, document_to_json, load_document, read_manifest
from weft.tokenizers.segment import Action, ActionSpace, Audio, Document, Image, Sensor, Text, Video

sys.path.insert(0, str(Path(__file__).parent))
from media_samples import image_bytes


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "a.png").write_bytes(image_bytes("png"))
    (tmp_path / "frames").mkdir()
    (tmp_path / "a.wav").write_bytes(b"RIFF")
    np.save(tmp_path / "imu.npy", np.arange(6.0).reshape(3, 2))
    np.save(tmp_path / "objects.npy", np.array([{}], dtype=object), allow_pickle=True)
    return tmp_path


FULL = {
    "id": "d1",
    "split": "train",
    "source": "lab",
    "pair": "p",
    "metadata": {"weather": "dry"},
    "segments": [
        {"text": "a photo", "role": "observed", "name": "caption"},
        {"image": "a.png", "start_s": 1.5},
        {"video": "frames", "rate_hz": 10},
        {"audio": "a.wav", "start_ns": 7},
        {"sensor": "imu.npy", "rate_hz": 100, "channels": ["x", "y"], "units": ["g", "g"], "kind": "imu"},
        {"sensor": [1.0, None, 2.0], "times_s": [0.0, 0.5, 2.0]},
        {"action": [0, 3, 1], "space": {"n": 4}, "rate_hz": 5, "start": "1970-01-01T00:00:02+00:00"},
        {"action": [[0.5, 1.0]], "space": {"low": [0, 0], "high": [1, 2]}, "role": "target"},
    ],
}


def test_a_line_ends_only_where_json_lets_it(tmp_path: Path) -> None:
    texts = ["one\u2028two", "three\u0085four\u2029", "five\tsix"]
    lines = [json.dumps({"segments": [{"text": text}]}, ensure_ascii=False) for text in texts]
    for mark, end in (("", "\n"), ("\ufeff", "\r\n")):  # as editors on Windows save it
        (tmp_path / "m.jsonl").write_bytes((mark + end.join(lines) + end).encode())
        assert [doc.segments[0].text for doc in read_manifest(tmp_path / "m.jsonl")] == texts


def test_a_full_manifest_is_read(folder: Path) -> None:
    doc = load_document(FULL, folder)
    assert (doc.id, doc.source, doc.pair, doc.metadata) == ("d1", "lab", "p", {"weather": "dry", "split": "train"})
    text, image, video, audio, imu, inline, discrete, box = doc.segments
    assert isinstance(text, Text) and text.role == "observed" and text.name == "caption"
    assert isinstance(image, Image) and image.pixels == folder / "a.png" and image.start == 1_500_000_000
    assert isinstance(video, Video) and video.rate_hz == 10.0 and isinstance(audio, Audio) and audio.start == 7
    assert isinstance(imu, Sensor) and imu.kind == "imu" and imu.channels == ("x", "y") and imu.values.shape == (3, 2)
    assert isinstance(inline, Sensor) and np.isnan(inline.values[1]) and inline.times == (0.0, 0.5, 2.0)
    assert isinstance(discrete, Action) and discrete.start == 2 * 10**9 and discrete.values.dtype == np.int64
    assert isinstance(box, Action) and box.space == ActionSpace(low=(0.0, 0.0), high=(1.0, 2.0)) and box.role == "target"


def test_writing_and_reading_is_the_identity(folder: Path) -> None:
    doc = load_document(FULL, folder)
    value = json.loads(json.dumps(document_to_json(doc, folder)))
    again = document_to_json(load_document(value, folder), folder)
    assert again == value
    assert value["segments"][5]["sensor"] == [1.0, None, 2.0]


def segment(**fields: object) -> dict:
    return {"id": "d", "segments": [{"text": "ok"}, fields]}


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([], "JSON object, got list"),
        ({"segments": {}}, "'segments' must be a list"),
        ({"segmets": []}, "unknown key 'segmets'; known are id"),
        ({"segments": [], "pair": 3}, "'pair' must be a string"),
        ({"segments": [], "metadata": [1]}, "'metadata' must be an object"),
        ({"segments": ["hello"]}, r"segments\[0\] must be an object"),
        (segment(), r"document 'd', segments\[1\] needs exactly one of the keys text, image.*found none"),
        (segment(text="a", image="a.png"), "found text and image"),
        (segment(text=3), "'text' must be a string"),
        (segment(text="a", rate_hz=3), "unknown key 'rate_hz'"),
        (segment(text="a", role="goal"), "'role' must be one of observed"),
        (segment(text="a", name=3), "'name' must be a string"),
        (segment(text="a", start_s=1, start_ns=1), "start_s and start_ns both"),
        (segment(text="a", start_s="1"), "'start_s' must be a number"),
        (segment(text="a", start_ns=1.5), "'start_ns' must be an integer"),
        (segment(text="a", start="2024-01-01T00:00:00"), "no time zone"),
        (segment(text="a", start="noon"), "'start' = 'noon'"),
        (segment(text="a", start=3), "must be a date"),
        (segment(image="b.png"), "does not exist"),
        (segment(image="../a.png"), "leaves the folder"),
        (segment(image="/etc/passwd"), "leaves the folder"),
        (segment(image=3), "must name a file"),
        (segment(sensor="a.png"), r"must be a \.npy array"),
        (segment(sensor="objects.npy"), r"no readable \.npy"),
        (segment(sensor=[[1], [1, 2]]), "each reading with as many"),
        (segment(sensor=3), "must be a list of numbers"),
        (segment(sensor=[1], channels="x"), "'channels' must be a list of strings"),
        (segment(sensor=[1], kind=1), "'kind' must be a string"),
        (segment(sensor=[1], times_s=[True]), r"times_s\[0\]"),
        (segment(sensor=[1], times_ns=[0.5]), "'times_ns' must hold integers"),
        (segment(sensor=[1], times_ns=[0], times_s=[0]), "give one of"),
        (segment(action=[0]), "'space' must be"),
        (segment(action=[0], space={"n": 0}), "n >= 1"),
        (segment(action=[0], space={"low": [1], "high": [0]}), "low < high"),
        (segment(action=[0], space={"size": 3}), "unknown key 'size'"),
        (segment(action=[0], space={"low": 3, "high": [1]}), "'space'"),
    ],
)
def test_a_mistake_is_named_with_its_place(folder: Path, value: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_document(value, folder)  # type: ignore[arg-type]


def test_a_link_out_of_the_folder_is_refused_unless_allowed(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    outside = tmp_path_factory.mktemp("outside") / "secret.png"
    outside.write_bytes(b"x")
    (folder / "link.png").symlink_to(outside)
    with pytest.raises(ManifestError, match="leaves the folder"):
        load_document(segment(image="link.png"), folder)
    assert load_document(segment(image="link.png"), folder, allow_outside=True).segments[1].pixels.exists()  # type: ignore[attr-defined]


def test_files_hold_one_object_a_list_or_lines(folder: Path) -> None:
    one = {"segments": [{"text": "a"}]}
    (folder / "one.json").write_text(json.dumps(one))
    (folder / "list.json").write_text(json.dumps([one, one]))
    (folder / "lines.jsonl").write_text(json.dumps(one) + "\n\n" + json.dumps(one) + "\n")
    counts = [len(list(read_manifest(folder / name))) for name in ("one.json", "list.json", "lines.jsonl")]
    assert counts == [1, 2, 2]
    (folder / "lines.jsonl").write_text(json.dumps(one) + "\n{")
    with pytest.raises(ManifestError, match=r"lines\.jsonl line 2 is not JSON"):
        list(read_manifest(folder / "lines.jsonl"))
    (folder / "lines.jsonl").write_text("\n" + json.dumps({"segments": [{}]}))
    with pytest.raises(ManifestError, match=r"lines\.jsonl line 2: document, segments\[0\]"):
        list(read_manifest(folder / "lines.jsonl"))
    with pytest.raises(ManifestError, match="cannot be read"):
        list(read_manifest(folder / "none.json"))


def test_media_in_memory_cannot_be_written_in_place(folder: Path) -> None:
    with pytest.raises(ManifestError, match="held in memory"):
        document_to_json(Document(segments=(Image(pixels=np.zeros((1, 1))),)), folder)
    with pytest.raises(ManifestError, match="lies outside"):
        document_to_json(Document(segments=(Image(pixels="/etc/passwd"),)), folder)
    with pytest.raises(ManifestError, match="infinite"):
        document_to_json(Document(segments=(Sensor(values=[np.inf]),)), folder)
