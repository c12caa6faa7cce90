"""Other people's layouts become the same documents: tables, WebDataset tars, folders of media. Minari: `test_data_minari`."""

import io
import json
import tarfile
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.training.data_world import write_media
from weft.tokenizers.segment import Document
from weft.training.data.prepare import PrepareError
from weft.training.data.records import restore
from weft.training.data.shards import ShardDataset
from weft.training.data.source import sniff, split_of
from weft.training.data.source_tar import expand
from weft.training.data.sources import prepare_from


def read(folder: Path, split: str = "train") -> list[Document]:
    dataset = ShardDataset(folder, split)
    samples = [dataset.read(i) for i in range(len(dataset))]
    return [restore(s.members, s.where) for s in samples]


def kinds(document: Document) -> list[str]:
    return [s.modality for s in document.segments]


def test_a_hugging_face_parquet_folder(tmp_path: Path) -> None:
    write_media(tmp_path / "raw")
    pictures = [(tmp_path / "raw" / f"picture{i}.png").read_bytes() for i in range(3)]
    features = {"label": {"names": ["cat", "dog"], "_type": "ClassLabel"}, "image": {"_type": "Image"}}
    (tmp_path / "hf" / "data").mkdir(parents=True)
    for split in ("train", "validation"):
        table = pa.table(
            {
                "image": pa.array([{"bytes": p, "path": f"{i}.png"} for i, p in enumerate(pictures)]),
                "caption": ["one", "two", None],
                "label": pa.array([1, 0, 1]),
                "score": [0.5, 0.25, 0.125],
            }
        ).replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
        pq.write_table(table, tmp_path / "hf" / "data" / f"{split}-00000-of-00001.parquet")
    report = prepare_from(tmp_path / "hf", tmp_path / "out")
    assert report.samples == {"train": 3, "val": 3} and report.refused == {}
    docs = read(tmp_path / "out")
    assert [kinds(d) for d in docs] == [["image", "text", "text"], ["image", "text", "text"], ["image", "text"]]
    assert docs[1].segments[0].pixels == pictures[1]
    assert [s.text for s in docs[1].segments[1:]] == ["two", "cat"] and docs[0].source == "hf"


def test_parquet_columns_may_be_chosen(tmp_path: Path) -> None:
    (tmp_path / "p").mkdir()
    pq.write_table(pa.table({"x": [[1.0, 2.0], [3.0, 4.0]], "note": ["a", "b"]}), tmp_path / "p" / "part.parquet")
    prepare_from(tmp_path / "p", tmp_path / "out", columns={"note": "text"})
    assert [kinds(d) for d in read(tmp_path / "out")] == [["text"], ["text"]]
    with pytest.raises(PrepareError, match="has no column 'y'; it has x, note"):
        prepare_from(tmp_path / "p", tmp_path / "o2", columns={"y": "text"})
    with pytest.raises(PrepareError, match="modalities are text"):
        prepare_from(tmp_path / "p", tmp_path / "o3", columns={"x": "smell"})
    (tmp_path / "p" / "part.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(PrepareError, match="no readable Parquet"):
        prepare_from(tmp_path / "p", tmp_path / "o4")


def write_tar(path: Path, files: list[tuple[str, bytes]]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, data in files:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def test_webdataset_tars_here_and_behind_a_url(tmp_path: Path) -> None:
    raw = tmp_path / "raw"
    write_media(raw)
    picture, tone = (raw / "picture1.png").read_bytes(), (raw / "tone1.flac").read_bytes()
    (tmp_path / "tars").mkdir()
    write_tar(
        tmp_path / "tars" / "s-000.tar",
        [("d/a.png", picture), ("d/a.txt", b"first"), ("d/b.flac", tone), ("d/b.json", b'{"caption": "hm", "n": 4}')],
    )
    write_tar(
        tmp_path / "tars" / "s-001.tar",
        [("c.png", picture), ("c.json", json.dumps({"segments": [{"text": "hi"}, {"image": "c.png"}]}).encode())],
    )
    where = str(tmp_path / "tars" / "s-{000..001}.tar")
    assert prepare_from(where, tmp_path / "out").samples == {"train": 3}
    a, b, c = read(tmp_path / "out")
    assert (kinds(a), kinds(b), kinds(c)) == (["image", "text"], ["audio", "text"], ["text", "image"])
    assert a.segments[0].pixels == picture and b.segments[1].text == "hm" and b.metadata["n"] == 4
    memory = fsspec.filesystem("memory")
    memory.put(str(tmp_path / "tars") + "/", "/tars-test/", recursive=True)
    try:
        prepare_from("memory://tars-test/s-{000..001}.tar", tmp_path / "out2", name="tars")
        assert [kinds(d) for d in read(tmp_path / "out2")] == [kinds(d) for d in (a, b, c)]
    finally:
        memory.rm("/tars-test", recursive=True)
    assert expand("x{1..3}{a,b}://{09..10}") == [f"x{i}{c}://{n}" for i in "123" for c in "ab" for n in ("09", "10")]


def test_our_own_shards_are_a_webdataset_source_too(tmp_path: Path) -> None:
    write_media(tmp_path / "raw")
    (tmp_path / "raw" / "picture0.txt").write_text("a picture")
    prepare_from(tmp_path / "raw", tmp_path / "one")
    prepare_from(str(tmp_path / "one" / "train-000000.tar"), tmp_path / "two")
    assert [d.segments for d in read(tmp_path / "one")] == [d.segments for d in read(tmp_path / "two")]


def test_cut_and_hostile_tars_are_refused(tmp_path: Path) -> None:
    files = [(f"{i}.txt", b"word" * 200) for i in range(5)]
    write_tar(tmp_path / "a.tar", files)
    data = (tmp_path / "a.tar").read_bytes()
    end = 5 * (512 + 1024)
    for size in range(0, end + 1, 512):
        (tmp_path / "cut.tar").write_bytes(data[:size])
        with pytest.raises(PrepareError):
            prepare_from(tmp_path / "cut.tar", tmp_path / f"out{size}")
    with tarfile.open(tmp_path / "link.tar", "w") as tar:
        info = tarfile.TarInfo("a.png")
        info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(info)
    with pytest.raises(PrepareError, match="no regular file"):
        prepare_from(tmp_path / "link.tar", tmp_path / "out-link")
    write_tar(tmp_path / "twice.tar", [("a.txt", b"x"), ("a.TXT", b"y")])
    with pytest.raises(PrepareError, match="has TXT twice"):
        prepare_from(tmp_path / "twice.tar", tmp_path / "out-twice")
    with pytest.raises(PrepareError, match="does not exist"):
        prepare_from(str(tmp_path / "x-{0..1}.tar"), tmp_path / "out-none")


def test_a_folder_of_media_with_text_beside_it(tmp_path: Path) -> None:
    for split in ("train", "val"):
        write_media(tmp_path / "raw" / split, images=2, sounds=1)
    (tmp_path / "raw" / "train" / "picture0.txt").write_text("red disc", encoding="utf-8-sig")  # as Windows saves it
    (tmp_path / "raw" / "train" / "tone0.json").write_text('{"text": "a tone", "speaker": "x"}')
    (tmp_path / "raw" / "train" / "alone.txt").write_text("no medium of this name")
    (tmp_path / "raw" / "train" / "picture1.json").write_text("{broken")
    report = prepare_from(tmp_path / "raw", tmp_path / "out", name="folder")
    assert report.samples == {"train": 2, "val": 3} and report.refused == {"bad manifest": 1}
    assert "picture1.json" in report.first["bad manifest"] and "save it as JSON in UTF-8" in report.first["bad manifest"]
    picture, tone = read(tmp_path / "out")
    assert kinds(picture) == ["image", "text"] and picture.segments[1].text == "red disc"
    assert kinds(tone) == ["audio", "text"] and tone.metadata["speaker"] == "x" and tone.source == "folder"
    (tmp_path / "empty").mkdir()
    with pytest.raises(PrepareError, match="holds no media"):
        prepare_from(tmp_path / "empty", tmp_path / "o")
    with pytest.raises(PrepareError, match="check the path"):
        prepare_from(tmp_path / "nowhere", tmp_path / "o")


def test_names_tell_splits_and_bytes_tell_types(tmp_path: Path) -> None:
    write_media(tmp_path)
    assert [sniff((tmp_path / f).read_bytes()) for f in ("picture0.png", "tone0.flac")] == ["png", "flac"] and sniff(
        b"no"
    ) is None
    names = {
        "data/validation-00000-of-00001.parquet": "val",
        "test/x.png": "test",
        "a/b-train.tar": None,
        "train_1.tar": "train",
    }
    assert {n: split_of(n) for n in names} == names


def test_a_hugging_face_dataset_saved_to_disk(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets", reason="pip install datasets")
    write_media(tmp_path / "raw")
    pictures = [str(tmp_path / "raw" / f"picture{i}.png") for i in range(3)]
    columns = {"image": pictures, "caption": ["one", "two", "three"], "label": [1, 0, 1], "score": [0.5, 0.2, 0.1]}
    kinds_ = {"image": datasets.Image(), "caption": datasets.Value("string"), "score": datasets.Value("float32")}
    features = datasets.Features({**kinds_, "label": datasets.ClassLabel(names=["cat", "dog"])})
    whole = datasets.Dataset.from_dict(columns, features=features)
    whole.save_to_disk(tmp_path / "disk" / "train")
    datasets.DatasetDict({"train": whole, "test": whole.select([1])}).save_to_disk(tmp_path / "both")
    (tmp_path / "parquet").mkdir()
    datasets.load_from_disk(tmp_path / "disk" / "train").to_parquet(tmp_path / "parquet" / "train-00000-of-00001.parquet")
    for folder, counts in (("disk", {"train": 3}), ("both", {"train": 3, "test": 1}), ("parquet", {"train": 3})):
        report = prepare_from(tmp_path / folder, tmp_path / f"{folder}-out")
        assert report.samples == counts and report.refused == {}, folder
        docs = read(tmp_path / f"{folder}-out")
        found = {(*kinds(d), *(s.text for s in d.segments if s.modality == "text")) for d in docs}
        assert found == {("image", "text", "text", t, label) for t, label in (("one", "dog"), ("two", "cat"), ("three", "dog"))}
        assert {d.segments[0].pixels for d in docs} == {Path(p).read_bytes() for p in pictures}
    (tmp_path / "paths").mkdir()
    whole.to_parquet(tmp_path / "paths" / "train.parquet")  # names files that lie elsewhere
    with pytest.raises(
        PrepareError, match=r"train\.parquet row 1: path .*picture0\.png' leaves the .* folder .*; move the file there"
    ):
        prepare_from(tmp_path / "paths", tmp_path / "paths-out")
    (tmp_path / "disk" / "train" / "data-00000-of-00001.arrow").write_bytes(b"ARROW1 no")
    with pytest.raises(PrepareError, match="no readable Arrow"):
        prepare_from(tmp_path / "disk", tmp_path / "o2")
