"""Every wrong call is refused before the model runs, by a typed error of one sentence that says how to repair it."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from tests.inference.conftest import PUSH, make_model, make_tokenizer, picture, readings, sound
from weft.inference.errors import (
    CheckpointError,
    IndexFileError,
    ProduceError,
    PromptError,
    SamplingError,
    SearchError,
    SessionError,
    SpaceError,
)
from weft.inference.generalist import Generalist
from weft.inference.generate import Request
from weft.inference.load import find, load, save
from weft.inference.request import Produce
from weft.inference.rollout import EpisodeSpec
from weft.inference.sampling import Sampling
from weft.inference.session import Sessions, SessionSpec
from weft.tokenizers.audio import AudioConfig, AudioTokenizer
from weft.tokenizers.bundle import StreamTokenizer
from weft.tokenizers.image import ImageConfig, ImageTokenizer
from weft.tokenizers.segment import ActionSpace, Sensor, Text

WRONG = {
    "empty list": (PromptError, "empty", lambda g: g.generate([])),
    "bare array": (PromptError, "wrap media", lambda g: g.generate(np.zeros((4, 4)))),
    "array in a list": (PromptError, "holds a ndarray; wrap", lambda g: g.generate(["a", np.zeros((4, 4))])),
    "unknown modality": (ProduceError, "cannot produce 'smell'", lambda g: g.generate("a", "smell")),
    "unknown option": (SamplingError, "no option 'temprature'", lambda g: g.generate("a", temprature=1.0)),
    "negative temperature": (SamplingError, "temperature=-1", lambda g: g.generate("a", temperature=-1.0)),
    "n of zero": (SamplingError, "n=0", lambda g: g.generate("a", n=0)),
    "empty stop": (SamplingError, "stop=", lambda g: g.generate("a", stop="")),
    "option without use": (ProduceError, "grid= says nothing about text", lambda g: g.generate("a", grid=(2, 2))),
    "wrong grid": (ProduceError, "grid=", lambda g: g.generate("a", "image", grid=(2,))),
    "grid too large": (ProduceError, "127 patches a side", lambda g: g.generate("a", "image", grid=(200, 2))),
    "grid beyond the limit": (ProduceError, "max_tokens=3", lambda g: g.generate("a", "image", grid=(2, 2), max_tokens=3)),
    "sensor without kind": (ProduceError, "rate_hz=", lambda g: g.generate("a", "sensor")),
    "unknown kind": (ProduceError, "kind=", lambda g: g.generate("a", "sensor", kind="nose", rate_hz=1.0)),
    "video without rate": (ProduceError, "rate_hz=", lambda g: g.generate("a", "video", grid=(1, 2, 2))),
    "action without space": (ProduceError, "space=", lambda g: g.generate("a", "action")),
    "too many choices": (ProduceError, "9 choices", lambda g: g.generate("a", "action", space=9)),
    "no space": (SpaceError, "action space must be", lambda g: g.predict("a", action="left")),
    "keep without medium": (ProduceError, "keep=", lambda g: g.generate("a", "image", keep=0.5, grid=(2, 2))),
    "medium without keep": (ProduceError, "keep=", lambda g: g.generate("a", picture())),
    "keep too much": (ProduceError, "keep=7", lambda g: g.generate("a", picture(), keep=7)),
    "mask of another shape": (ProduceError, "mask", lambda g: g.generate("a", picture(), keep=np.ones((1, 1), bool))),
    "edit of text": (ProduceError, "cannot be kept", lambda g: g.generate("a", Text("b"), keep=0.5)),
    "empty produce": (ProduceError, "names nothing", lambda g: g.generate("a", [])),
    "stream of a batch": (PromptError, "stream=True", lambda g: g.generate([["a"], ["b"]], stream=True)),
    "mixed batch": (PromptError, "Request", lambda g: g.generate([Request("a"), "b"])),
    "two questions": (ProduceError, "exactly one", lambda g: g.predict("a", choices=["b"], horizon=3)),
    "no question": (ProduceError, "exactly one", lambda g: g.predict("a")),
    "no choices": (PromptError, "choices is empty", lambda g: g.predict("a", choices=[])),
    "choices as one string": (ProduceError, "must be a list", lambda g: g.predict("a", choices="yes")),
    "horizon of zero": (ProduceError, "horizon=0", lambda g: g.predict([readings()], horizon=0)),
    "quantile of two": (ProduceError, "quantiles", lambda g: g.predict([readings()], horizon=1, quantiles=(2.0,))),
    "nothing to embed": (PromptError, "nothing to embed", lambda g: g.embed([])),
    "scores that do not pair": (PromptError, "as many continuations", lambda g: g.score([["a"], ["b"]], ["c"])),
    "threshold": (ProduceError, "threshold", lambda g: g.search_or_create(g.index({"a": "a"}), "a", threshold=2.0)),
    "no index": (IndexFileError, "no index at", lambda g: g.load_index("/nowhere/x.index")),
    "time backwards": (SessionError, "in order of time", lambda g: backwards(g)),
    "action without session space": (ProduceError, "needs a space", lambda g: g.session().act()),
    "session of nothing": (PromptError, "empty", lambda g: g.session().push([])),
    "memory of zero": (SessionError, "full_tokens=0", lambda g: SessionSpec(full_tokens=0)),
    "max_tokens in words": (ProduceError, "max_tokens='x'", lambda g: g.generate("a", max_tokens="x")),
    "max_tokens of any in words": (ProduceError, "max_tokens='x'", lambda g: g.generate("a", "any", max_tokens="x")),
    "any with a grid": (ProduceError, "grid= says nothing about 'any'", lambda g: g.generate("a", "any", grid=(2, 2))),
    "top_p in words": (SamplingError, "top_p='x'", lambda g: g.generate("a", top_p="x")),
    "min_p in words": (SamplingError, "min_p='x'", lambda g: g.generate("a", min_p="x")),
    "guidance in words": (SamplingError, "guidance='x'", lambda g: g.generate("a", guidance="x")),
    "penalty in words": (SamplingError, "repetition_penalty='x'", lambda g: g.generate("a", repetition_penalty="x")),
    "temperature as truth": (SamplingError, "temperature=True", lambda g: g.generate("a", temperature=True)),
    "stop of numbers": (SamplingError, "stop=3", lambda g: g.generate("a", stop=3)),
    "grid of one number": (ProduceError, "grid=4", lambda g: g.generate("a", "image", grid=4)),
    "sound of years": (ProduceError, "seconds=1000000000.0 needs", lambda g: g.generate("a", "audio", seconds=1e9)),
    "readings without end": (ProduceError, "readings=1000000000", lambda g: g.generate(readings(), "sensor", readings=10**9)),
    "long forecast": (ProduceError, "readings=200000 needs", lambda g: g.predict(readings(), horizon=200_000)),
    "no choice at all": (SpaceError, "n >= 1", lambda g: g.predict("a", action=0)),
    "too many dimensions": (
        ProduceError,
        "128 dimensions",
        lambda g: g.predict("a", action=ActionSpace(low=(0,) * 128, high=(1,) * 128)),
    ),
    "one quantile": (ProduceError, "quantiles=0.5", lambda g: g.predict(readings(), horizon=1, quantiles=0.5)),
    "no samples": (ProduceError, "samples=0", lambda g: g.predict(readings(), horizon=1, samples=0)),
    "n for samples": (ProduceError, "samples=", lambda g: g.predict(readings(), horizon=1, n=3)),
    "index of a list": (PromptError, "mapping", lambda g: g.index(["a"])),
    "index of another kind": (SearchError, "'flat' or 'hnsw'", lambda g: g.index({"a": "a"}, kind="tree")),
    "no hits wanted": (SearchError, "k >= 1", lambda g: g.search(g.index({"a": "a"}), "a", k=0)),
    "payload that is no JSON": (SearchError, "JSON", lambda g: g.index().add(["a"], g.embed("a"), [{1}])),
    "no threshold": (ProduceError, "threshold=None", lambda g: g.search_or_create(g.index({"a": "a"}), "a", threshold=None)),
    "session option": (SessionError, "no option 'windw'", lambda g: g.session(windw=3)),
    "guided session": (SessionError, "guidance", lambda g: g.session(sampling=Sampling(guidance=2.0))),
    "session draw": (SessionError, "'max_tokns'", lambda g: g.session().say(max_tokns=3)),
    "session guidance": (SessionError, "'guidance'", lambda g: g.session().produce("image", guidance=2.0)),
    "session forecast of nothing": (ProduceError, "samples=0", lambda g: g.session(prompt=[readings()]).forecast(3, samples=0)),
    "restore of a file": (SessionError, "load_session", lambda g: g.session().restore("a.session")),
    "too few things to produce": (SessionError, "1 sessions need", lambda g: Sessions([g.session()]).produce([])),
    "rollout without spec": (SessionError, "EpisodeSpec", lambda g: g.rollout(lambda: None, None, 1)),
    "half an episode": (SessionError, "episodes=1.5", lambda g: g.rollout(lambda: None, EpisodeSpec("imu", 50.0), 1.5)),
    "environment object": (SessionError, "environment", lambda g: g.rollout(object(), None, 1)),
}


def backwards(g: Generalist) -> None:
    session = g.session()
    session.push(readings(1, 2), 1.0)
    session.push(readings(1, 2), 0.5)


@pytest.mark.parametrize("name", WRONG)
def test_wrong_call_is_refused_in_one_sentence(tiny: Generalist, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kind, words, call = WRONG[name]
    with pytest.raises(kind, match=re.escape(words)) as caught:
        call(tiny)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 400


def test_an_unreadable_file_names_itself(tiny: Generalist, tmp_path: Path) -> None:
    from weft.tokenizers.segment import Audio, Image

    (tmp_path / "broken.png").write_bytes(b"not a picture")
    for segment in (Image(tmp_path / "broken.png"), Image(tmp_path / "none.png"), Audio(tmp_path / "none.wav")):
        with pytest.raises((ValueError, OSError), match=r"broken\.png|none\.(png|wav)"):
            tiny.generate([segment])


def test_a_modality_without_codec_is_read_and_not_produced(tiny: Generalist) -> None:
    parts = dict(tiny.tokenizer.tokenizers)
    parts["image"] = ImageTokenizer(ImageConfig(patch=4, channels=1))
    parts["audio"] = AudioTokenizer(AudioConfig(sample_rate_hz=4000, n_mels=8, hop=40, win=100, frames_per_token=2))
    del parts["video"], parts["action"]
    tokenizer = StreamTokenizer.build(parts)
    model = Generalist(make_model(tokenizer), tokenizer)
    assert model.modalities == ("text", "image", "audio", "sensor") and model.produces == ("text", "sensor")
    assert isinstance(model.generate(["see", picture(), sound()], max_tokens=3).text, str)
    for produce in ("image", "audio"):
        with pytest.raises(ProduceError, match="no codec is fitted"):
            model.generate("a", produce)
    with pytest.raises(ProduceError, match="has no action tokenizer"):
        model.generate("a", "action", space=2)
    with pytest.raises(PromptError, match="no codes"):
        model.predict("a", choices=[picture()])
    from tests.inference.conftest import clip

    with pytest.raises(PromptError, match="holds video"):
        model.generate([clip()])


def test_a_folder_that_is_no_checkpoint_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        load(tmp_path / "a" / "b" / "c")
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        load(tmp_path)
    with pytest.raises(CheckpointError, match="NoneType"):
        load(None)
    (tmp_path / "runs" / "one" / "run" / "checkpoints").mkdir(parents=True)
    with pytest.raises(CheckpointError, match=r"perhaps you mean .*one/run"):
        load(tmp_path / "runs" / "one")
    shutil.rmtree(tmp_path / "runs")
    for option in ({"device": "cuda:77"}, {"dtype": "int3"}, {"quantize": "int3"}):
        with pytest.raises(CheckpointError):
            load(folder, **{"device": "cpu", **option})
    for victim in ("model.safetensors", "config.json", "tokenizer/text/text.model", "tokenizer/image/tokenizer.safetensors"):
        copy = tmp_path / "copy"
        shutil.copytree(folder, copy)
        data = bytearray((copy / victim).read_bytes())
        data[len(data) // 2] ^= 1
        (copy / victim).write_bytes(bytes(data))
        with pytest.raises(CheckpointError, match="SHA-256"):
            load(copy, device="cpu")
        (copy / victim).unlink()
        with pytest.raises(CheckpointError, match=r"lacks|has no"):
            load(copy, device="cpu")
        shutil.rmtree(copy)


def test_a_mistyped_folder_is_not_asked_for_on_a_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr("weft.inference.load.fetch", lambda name: asked.append(name) or tmp_path)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    with pytest.raises(CheckpointError, match=r"runs/quickstrat does not exist \(no hub was asked"):
        find("runs/quickstrat")
    assert not asked and find("owner/name") == tmp_path and asked == ["owner/name"]


def test_weights_of_one_model_with_the_tokenizer_of_another_are_refused(folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    (copy / "manifest.json").unlink()
    load(copy, device="cpu")
    other = make_tokenizer()
    parts = dict(other.tokenizers)
    from weft.tokenizers.sensor import SensorConfig, SensorTokenizer

    parts["sensor"] = SensorTokenizer(SensorConfig(bins=33)).fit("imu", [np.random.default_rng(0).normal(size=(9, 3))])
    shutil.rmtree(copy / "tokenizer")
    StreamTokenizer.build(parts).save(copy / "tokenizer")
    with pytest.raises(CheckpointError, match="not saved together"):
        load(copy, device="cpu")
    with pytest.raises(CheckpointError, match="not saved together"):
        save(make_model(other), StreamTokenizer.build(parts), tmp_path / "x")


def test_a_tokenizer_that_was_changed_after_saving_is_refused(folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    (copy / "manifest.json").unlink()
    stream = json.loads((copy / "tokenizer" / "stream.json").read_text())
    stream["tick_s"] = 0.05
    (copy / "tokenizer" / "stream.json").write_text(json.dumps(stream))
    with pytest.raises(CheckpointError, match="digest"):
        load(copy, device="cpu")


def test_a_query_of_another_model_is_refused(tiny: Generalist, tmp_path: Path) -> None:
    index = tiny.index({"a": "the fox", "b": picture()})
    index.save(tmp_path / "x.index")
    assert tiny.search(tiny.load_index(tmp_path / "x.index"), "the fox", 1)[0].key == "a"
    other = Generalist(tiny.model, tiny.tokenizer, digest="another")
    with pytest.raises(IndexFileError, match="another model"):
        other.load_index(tmp_path / "x.index")
    with pytest.raises(IndexFileError, match="another model"):
        other.search(index, "the fox")


def test_actions_are_always_legal(tiny: Generalist) -> None:
    for seed in range(6):
        action = tiny.predict([readings(seed)], action=PUSH, temperature=2.0, seed=seed)
        assert (np.array(PUSH.low) <= action).all() and (action <= np.array(PUSH.high)).all()
        assert 0 <= int(tiny.predict([readings(seed)], action=3, temperature=2.0, seed=seed)) < 3


def test_a_produce_says_the_same_as_options(tiny: Generalist) -> None:
    by_name = tiny.generate("a", "image", grid=(2, 2), seed=1)
    by_object = tiny.generate("a", Produce("image", grid=(2, 2)), seed=1)
    assert np.array_equal(by_name.tokens, by_object.tokens)


def test_numbers_of_numpy_are_numbers(tiny: Generalist) -> None:
    said = {"max_tokens": 5, "top_k": 3, "seed": 2, "n": 2}
    plain = tiny.generate("a", temperature=0.5, **said)
    of_numpy = tiny.generate("a", temperature=np.float32(0.5), **{name: np.int64(value) for name, value in said.items()})
    assert [r.tokens.tolist() for r in plain] == [r.tokens.tolist() for r in of_numpy]
    assert tiny.predict(readings(), horizon=np.int64(2), samples=2).median.shape == (2, 3)
    assert int(tiny.predict(readings(), action=np.int64(2))) in (0, 1)


def test_what_a_produce_states_is_not_replaced_by_an_option(tiny: Generalist) -> None:
    reply = tiny.generate([readings()], [Produce("sensor", readings=1), "sensor"], readings=4)
    assert [len(segment.values) for segment in reply.segments] == [1, 4]


def test_a_prompt_beyond_the_limit_is_refused(tiny: Generalist, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("weft.inference.prompts.LIMIT", 20)
    with pytest.raises(PromptError, match="at most 20"):
        tiny.generate([Sensor(np.zeros((20, 3)), rate_hz=1.0, kind="imu")])
