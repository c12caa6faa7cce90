"""A model that reads media through resamplers: the laws of streaming hold, and prompts of media work."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.inference.conftest import clip, make_model, make_tokenizer, picture, readings, sound
from weft.inference.errors import CheckpointError
from weft.inference.feed import extend, part_of
from weft.inference.generalist import Generalist
from weft.inference.load import load, save
from weft.model.embedding import FeatureError
from weft.tokenizers.bundle import StreamTokenizer
from weft.tokenizers.pack import collate
from weft.tokenizers.segment import Segment, Text
from weft.tokenizers.stream import Resample, Stream, StreamConfig, join

SHAPES = {"image": Resample(4, 2), "video": Resample(6, 2), "audio": Resample(6, 2)}


@pytest.fixture(scope="module")
def short() -> StreamTokenizer:
    return make_tokenizer(StreamConfig(resample=SHAPES))


@pytest.fixture(scope="module")
def reader(short: StreamTokenizer, tmp_path_factory: pytest.TempPathFactory) -> Generalist:
    model = make_model(short, resample=short.resample())
    return load(save(model, short, tmp_path_factory.mktemp("reader")), device="cpu")


def parts_of(tok: StreamTokenizer, segments: list[Segment]) -> list[Stream]:
    """`<doc>` and every segment by itself."""
    builder = tok.builder()
    return [builder.open(), *(part for s in segments if (part := builder.add(tok.prepare([s]))) is not None)]


MEDIA: list[list[Segment]] = [
    [Text("the fox"), picture(1), sound(2), Text("jumps")],
    [clip(3), picture(4, 4, 8), readings(5)],
    [sound(6, 0.3), Text("over")],
    [Text("the lazy dog")],
]


@torch.no_grad()
def test_packed_equals_alone(short: StreamTokenizer, reader: Generalist) -> None:
    streams = [short.encode(segments) for segments in MEDIA]
    packed = reader.model(collate([streams], sizes=short.feature_sizes())).hidden
    alone = [reader.model(collate([s], sizes=short.feature_sizes())).hidden for s in streams]
    torch.testing.assert_close(packed, torch.cat(alone), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_extended_in_parts_equals_full_forward_and_its_own_bits_in_company(short: StreamTokenizer, reader: Generalist) -> None:
    documents = [parts_of(short, segments) for segments in MEDIA]
    alone = []
    for parts in documents:
        full = reader.model(collate([join(parts)], sizes=short.feature_sizes())).hidden
        cache = reader.model.new_cache()
        alone.append(torch.cat([extend(reader.model, [cache], [part_of(part)])[0] for part in parts]))
        torch.testing.assert_close(alone[-1], full, atol=1e-5, rtol=1e-5)
    caches = [reader.model.new_cache() for _ in documents]
    whole = [extend(reader.model, [reader.model.new_cache()], [part_of(join(parts))])[0] for parts in documents]
    together = extend(reader.model, caches, [part_of(join(parts)) for parts in documents])
    assert all(torch.equal(a, b) for a, b in zip(whole, together))


@torch.no_grad()
@pytest.mark.parametrize("group", [0, 1, 2])
def test_a_row_changes_nothing_before_its_group(short: StreamTokenizer, reader: Generalist, group: int) -> None:
    stream = short.encode([Text("a"), sound(2, 0.4), Text("end")])
    at, shape = stream.feature_at["audio"], SHAPES["audio"]
    assert len(at) > 3 * shape.latents
    rows = stream.features["audio"].copy()
    rows[(group + 1) * shape.latents - 1, -1] += 3  # the last value of the group's last row
    hidden = [
        reader.model(collate([s], sizes=short.feature_sizes())).hidden
        for s in (stream, replace(stream, features={**stream.features, "audio": rows}))
    ]
    first = int(at[group * shape.latents])
    assert torch.equal(hidden[0][:first], hidden[1][:first])
    assert (hidden[0][first:] != hidden[1][first:]).any(-1).float().mean() > 0.9, "the whole group and what follows"


def test_a_batch_of_text_gives_every_parameter_a_gradient(short: StreamTokenizer) -> None:
    model = make_model(short, resample=short.resample()).train()
    model(collate([short.encode(Text("the fox"))], sizes=short.feature_sizes())).hidden.sum().backward()
    of_media = [(name, p) for name, p in model.named_parameters() if ".resampler." in name]
    assert len(of_media) > 3 * 10 and all(p.grad is not None for _, p in of_media)


def test_replies_to_media_are_the_same_in_any_company(reader: Generalist) -> None:
    together = reader.generate(MEDIA, max_tokens=5, seed=3)
    alone = [reader.generate(prompt, max_tokens=5, seed=3) for prompt in MEDIA]
    assert [r.tokens.tolist() for r in together] == [r.tokens.tolist() for r in alone]
    assert [r.logprobs.tolist() for r in together] == [r.logprobs.tolist() for r in alone]


def test_a_produced_picture_has_the_patches_of_the_one_in_the_prompt(reader: Generalist) -> None:
    reply = reader.generate([picture(1, 8, 12), "again"], produce="image", seed=0)
    assert reply.image.pixels.shape == (8, 12, 1)
    film = reader.generate([replace(clip(1, 3), start=0.0), "on"], produce="video", seed=0)
    assert film.segments[0].frames.shape == (3, 8, 8, 1) and film.segments[0].start == 600_000_000
    told = reader.explain([picture(1), "what"], "a fox")
    assert told.parts[0].tokens == 3 + 4 + 1


def test_a_session_with_media_goes_on_after_it_was_saved(reader: Generalist, tmp_path: Path) -> None:
    session = reader.session()
    session.push(picture(1))
    session.push(sound(2))
    session.save(tmp_path / "session")
    again = reader.load_session(tmp_path / "session")
    assert again.writer.builder.info[0].medium.grid == (2, 3)
    assert np.array_equal(session.say(max_tokens=4, seed=1).tokens, again.say(max_tokens=4, seed=1).tokens)


def test_model_and_tokenizer_have_to_agree(short: StreamTokenizer, tmp_path: Path) -> None:
    sizes = short.feature_sizes()
    for resample in ({}, {**short.resample(), "image": {"tokens": 8, "latents": 4}}):
        model = make_model(short, resample=resample)
        assert model.config.feature_sizes == dict(sorted(sizes.items()))
        with pytest.raises(CheckpointError, match="the model has resamplers"):
            save(model, short, tmp_path / "never")


def test_a_torn_group_is_refused(short: StreamTokenizer, reader: Generalist) -> None:
    stream = short.encode([sound(1), Text("a"), sound(2)])
    at = stream.feature_at["audio"]
    keep = lambda gone: stream.take(np.setdiff1d(np.arange(len(stream)), gone))  # noqa: E731
    for gone, message in ((at[:1], "groups of 2 positions"), (at[[0, -1]], "torn apart")):
        with pytest.raises(FeatureError, match=message):
            reader.model(collate([keep(gone)], sizes=short.feature_sizes()))
