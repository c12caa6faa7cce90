"""A bundle is saved whole, loads as it was, and refuses to meet what it does not fit."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from weft.tokenizers.action import ActionConfig, ActionTokenizer
from weft.tokenizers.bundle import StreamTokenizer, TokenizerMismatch
from weft.tokenizers.identity import media_key
from weft.tokenizers.image import ImageConfig, ImageTokenizer
from weft.tokenizers.registry import REGISTRY, Modality, by_name
from weft.tokenizers.segment import Image, Sensor, Text
from weft.tokenizers.sensor import SensorConfig, SensorTokenizer
from weft.tokenizers.stream import StreamConfig, StreamError
from weft.tokenizers.vocabulary import MODALITIES, SLICE_OF, SLICES, SPECIALS, TAILS, Vocabulary

sys.path.insert(0, str(Path(__file__).parent))
from mixtures import LevelImage, text_tokenizer


def small(bins: int = 31, chunk_s: float = 0.5) -> StreamTokenizer:
    sensor = SensorTokenizer(SensorConfig(bins=bins)).fit("default", [np.linspace(-1, 1, 50)])
    parts = [text_tokenizer(), ImageTokenizer(ImageConfig(patch=4)), sensor, ActionTokenizer(ActionConfig(discrete=3, bins=16))]
    return StreamTokenizer.build(parts, StreamConfig(chunk_s=chunk_s))


def test_a_saved_bundle_loads_as_it_was(tmp_path: Path) -> None:
    tok = small()
    tok.save(tmp_path)
    back = StreamTokenizer.load(tmp_path, expect=tok.digest())
    assert back.digest() == tok.digest() and back.vocabulary == tok.vocabulary and back.config == tok.config
    parts = [Text(text="the ball"), Image(pixels=np.zeros((5, 9, 3))), Sensor(values=[0.5, 0.25], rate_hz=3.0)]
    assert np.array_equal(tok.encode(parts).ids, back.encode(parts).ids)
    names = {p.suffix for p in tmp_path.rglob("*") if p.is_file()}
    assert names <= {".json", ".safetensors", ".model"}, "nothing is pickled"


def test_a_changed_vocabulary_is_an_error_that_names_both_digests(tmp_path: Path) -> None:
    tok = small()
    tok.save(tmp_path)
    path = tmp_path / "vocabulary.json"
    sizes = json.loads(path.read_text()) | {"sensor": 32}
    path.write_text(json.dumps(sizes))
    other = Vocabulary.from_dict(sizes)
    with pytest.raises(TokenizerMismatch, match=f"{tok.vocabulary.digest()}.*{other.digest()}"):
        StreamTokenizer.load(tmp_path)


def test_a_changed_tokenizer_is_an_error_that_names_both_digests(tmp_path: Path) -> None:
    tok = small()
    tok.save(tmp_path)
    refitted = SensorTokenizer(SensorConfig(bins=31)).fit("default", [np.linspace(-2, 2, 50)])
    refitted.save(tmp_path / "sensor")
    with pytest.raises(
        TokenizerMismatch, match=f"sensor was saved with digest {tok.tokenizers['sensor'].digest()}.*{refitted.digest()}"
    ):
        StreamTokenizer.load(tmp_path)


def test_a_changed_stream_config_changes_the_digest_and_is_an_error(tmp_path: Path) -> None:
    small().save(tmp_path)
    (tmp_path / "stream.json").write_text(json.dumps({"chunk_s": 1.0, "tick_s": 0.04, "timestamps": False}))
    with pytest.raises(TokenizerMismatch, match="stream was saved with digest"):
        StreamTokenizer.load(tmp_path)
    assert small(chunk_s=0.5).digest() != small(chunk_s=1.0).digest() != small(bins=33).digest()


def test_weights_of_another_tokenizer_are_refused_with_both_digests(tmp_path: Path) -> None:
    tok, other = small(), small(bins=33)
    tok.save(tmp_path)
    with pytest.raises(TokenizerMismatch, match=f"{other.digest()}.*{tok.digest()}"):
        StreamTokenizer.load(tmp_path, expect=other.digest())


def test_damaged_folders_say_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"digest\.json is missing.*tok\.save"):
        StreamTokenizer.load(tmp_path)
    small().save(tmp_path)
    (tmp_path / "digest.json").write_text("[]")
    with pytest.raises(TokenizerMismatch, match="a JSON object is needed"):
        StreamTokenizer.load(tmp_path)
    (tmp_path / "digest.json").write_text("{")
    with pytest.raises(TokenizerMismatch, match="not readable JSON"):
        StreamTokenizer.load(tmp_path)
    (tmp_path / "digest.json").write_text(json.dumps({"digest": "x", "parts": {"os": "y"}}))
    with pytest.raises(TokenizerMismatch, match="hand in a registry"):
        StreamTokenizer.load(tmp_path)


def test_a_vocabulary_that_does_not_fit_the_tokenizers_is_refused() -> None:
    tok = small()
    wrong = Vocabulary.from_dict(tok.vocabulary.to_dict() | {"sensor": 30})
    with pytest.raises(TokenizerMismatch, match=r"StreamTokenizer\.build"):
        StreamTokenizer(wrong, tok.tokenizers)


def test_modalities_that_share_a_span_must_share_its_codes() -> None:
    with pytest.raises(StreamError, match="shares its span"):
        StreamTokenizer.build({"image": LevelImage("image", size=17), "video": LevelImage("video", size=16)})


def test_the_vocabulary_lays_spans_side_by_side_and_names_every_id() -> None:
    v = Vocabulary(text=11, image=7, audio=5, sensor=13, discrete=3, bins=17, chunks=2, numbers=19, extra=(("lidar", 23),))
    assert v.slices[0][0] == 0 and all(a[1] == b[0] for a, b in zip(v.slices, v.slices[1:])) and v.slices[-1][1] == len(v)
    names = [v.describe(i) for i in range(len(v))]
    assert len(set(names)) == len(v)
    with pytest.raises(ValueError, match="outside the vocabulary"):
        v.describe(len(v))
    assert Vocabulary.from_dict(json.loads(json.dumps(v.to_dict()))) == v
    for bad in ({"text": -1}, {"text": 1.5}, {"text": 1, "numbers": 1}, {"text": 1, "extra": (("image", 1),)}):
        with pytest.raises(ValueError, match="vocabulary"):
            Vocabulary(**bad)
    with pytest.raises(ValueError, match="unknown keys"):
        Vocabulary.from_dict({"text": 1, "smell": 2})


def test_the_registry_and_the_vocabulary_agree() -> None:
    assert tuple(entry.name for entry in REGISTRY) == MODALITIES
    for entry in REGISTRY:
        assert SLICES[SLICE_OF[entry.name]] == entry.slice
        assert entry.opener is None or entry.opener in SPECIALS
        assert entry.name == "text" or {entry.closer, entry.hole} <= set(TAILS[entry.slice])
        assert entry.load_class("tokenizer").modality == entry.load_class("segment").modality == entry.name
        assert entry.content in entry.load_class("segment").__dataclass_fields__
    with pytest.raises(ValueError, match="twice"):
        by_name((*REGISTRY, REGISTRY[0]))
    with pytest.raises(ValueError, match="must state a shape"):
        Modality(name="x", slice="x", fixed=True)
    with pytest.raises(ValueError, match="does not have"):
        Modality(name="x", slice="x", shape=("h",), block=("w",))


def test_media_keys_tell_content_apart_and_ignore_time_role_and_name(tmp_path: Path) -> None:
    a = np.arange(6.0)
    base = media_key(Sensor(values=a, rate_hz=1.0))
    assert base == media_key(Sensor(values=a.copy(), rate_hz=1.0, start=5, role="target", name="x"))
    others = [Sensor(values=a + 1, rate_hz=1.0), Sensor(values=a, rate_hz=2.0), Sensor(values=a.reshape(2, 3), rate_hz=1.0)]
    others += [Sensor(values=a.astype(np.float32), rate_hz=1.0), Sensor(values=a, rate_hz=1.0, kind="imu")]
    assert len({base, *map(media_key, others)}) == 6
    path = tmp_path / "a.png"
    path.write_bytes(b"one")
    first = media_key(Image(pixels=path))
    assert first == media_key(Image(pixels=str(path)).__class__(pixels=path))
    path.write_bytes(b"three")
    assert media_key(Image(pixels=path)) != first
    assert media_key(Text(text=str(path))) != media_key(Image(pixels=str(path)))


def test_media_keys_tell_pictures_apart_that_differ_in_palette_or_orientation_only() -> None:
    shades = PIL.Image.frombytes("P", (2, 1), bytes([0, 1]))
    keys = set()
    for colours in ([0, 0, 0, 9, 9, 9], [255, 0, 0, 9, 9, 9]):
        shades.putpalette(colours)
        keys.add(media_key(Image(pixels=shades.copy())))
    turned = PIL.Image.new("L", (2, 2))
    keys.add(media_key(Image(pixels=turned.copy())))
    turned.getexif()[0x0112] = 6
    keys.add(media_key(Image(pixels=turned)))
    assert len(keys) == 4
