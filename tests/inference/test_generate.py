"""The laws of generation: scored = generated, cached = uncached, alone = in any batch, same seed = same reply."""

from __future__ import annotations

import gc
import hashlib
import subprocess
import sys
import threading
import time
import weakref
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from tests.inference.conftest import PUSH, clip, make_model, mixed_prompts, picture, readings, sound
from weft.inference import engine, feed, prompts
from weft.inference.generalist import Generalist
from weft.inference.generate import Request
from weft.inference.prompts import encode
from weft.inference.reply import Reply
from weft.inference.request import Produce
from weft.model.cache import StreamCache
from weft.model.transformer import Transformer
from weft.tokenizers.base import Tokens
from weft.tokenizers.plan import PRESETS
from weft.tokenizers.segment import Text
from weft.tokenizers.stream import ARRAYS, join

TASKS: tuple[tuple[object, dict], ...] = (
    ("text", {"max_tokens": 6}),
    ("text", {"max_tokens": 9, "temperature": 1.0, "top_p": 0.9, "n": 2}),
    ("image", {"grid": (2, 3)}),
    ("audio", {"max_tokens": 7}),
    ("audio", {"seconds": 0.1, "guidance": 2.0}),
    ("sensor", {"readings": 2, "kind": "imu", "rate_hz": 50.0}),
    ("action", {"space": PUSH}),
    ("action", {"space": 4, "temperature": 1.0}),
    ("video", {"grid": (2, 1, 2), "rate_hz": 5.0}),
    (["text", "image"], {"max_tokens": 5, "grid": (1, 2), "temperature": 1.0}),
    ("any", {"max_tokens": 12, "temperature": 1.0}),
)


def requests(count: int, seed: int) -> list[Request]:
    rng = np.random.default_rng(seed)
    made = []
    for i, prompt in enumerate(mixed_prompts(count, seed)):
        produce, options = TASKS[int(rng.integers(len(TASKS)))]
        made.append(Request(prompt, produce, {**options, "seed": i}))
    return made


def flat(replies: list) -> list[Reply]:
    return [reply for some in replies for reply in (some if isinstance(some, list) else [some])]


def same(a: Reply, b: Reply) -> bool:
    """Equal to the last bit."""
    return bool(
        np.array_equal(a.tokens, b.tokens) and np.array_equal(a.logprobs, b.logprobs) and np.array_equal(a.drawn, b.drawn)
    )


@pytest.mark.parametrize("seed", range(3))
def test_scoring_a_reply_gives_its_own_log_probabilities(tiny: Generalist, seed: int) -> None:
    made = requests(12, seed)
    for request, some in zip(made, tiny.generate(made)):
        for reply in flat([some]):
            score = tiny.score(request.prompt, reply)
            assert np.array_equal(score.tokens, reply.tokens)
            assert np.abs(score.logprobs - reply.logprobs)[reply.drawn].max(initial=0) < 2e-5


class Uncached:
    """The model without a cache: every call reads its documents from their beginning."""

    def __init__(self, model: Transformer) -> None:
        self.model = model

    def __getattr__(self, name: str) -> object:
        return getattr(self.model, name)

    def eval(self) -> Uncached:
        return self

    def new_cache(self) -> SimpleNamespace:
        return SimpleNamespace(parts=(), local=SimpleNamespace(), full=SimpleNamespace())


def extend_uncached(model: Uncached, caches: list, parts: list[feed.Part]) -> list[torch.Tensor]:
    """In place of `feed.extend`: a forward as in training over each whole document, alone."""
    out = []
    for cache, part in zip(caches, parts):
        cache.parts = (*cache.parts, part)
        whole = feed.batch_of([feed.joined(cache.parts)], torch.device("cpu"))
        out.append(model.model(whole).hidden[-len(part) :])
    return out


def check_uncached(tiny: Generalist, made: list[Request], monkeypatch: pytest.MonkeyPatch) -> None:
    """The same greedy tokens and, to rounding, the same log-probabilities with and without a cache."""
    greedy = [Request(r.prompt, r.produce, {**r.options, "temperature": 0.0, "n": 1}) for r in made]
    cached = tiny.generate(greedy)
    for module in (engine, prompts):
        monkeypatch.setattr(module, "extend", extend_uncached)
    uncached = Generalist(Uncached(tiny.model), tiny.tokenizer).generate(greedy)
    for one, other in zip(cached, uncached, strict=True):
        assert np.array_equal(one.tokens, other.tokens)
        assert np.abs(one.logprobs - other.logprobs).max(initial=0) < 1e-4


def test_cached_generation_equals_a_full_forward(tiny: Generalist, monkeypatch: pytest.MonkeyPatch) -> None:
    check_uncached(tiny, requests(15, 7), monkeypatch)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_cached_generation_equals_a_full_forward_on_200_prompts(tiny: Generalist, monkeypatch: pytest.MonkeyPatch) -> None:
    check_uncached(tiny, requests(200, 8), monkeypatch)


def check_any_batch(tiny: Generalist, pool: int, compositions: int, seed: int) -> None:
    made = requests(pool, seed)
    alone = [flat(tiny.generate([request])) for request in made]
    rng = np.random.default_rng(seed)
    for _ in range(compositions):
        chosen = rng.permutation(pool)[: int(rng.integers(2, min(pool, 12) + 1))]
        together = tiny.generate([made[i] for i in chosen])
        for i, some in zip(chosen, together):
            for one, other in zip(alone[i], flat([some]), strict=True):
                assert same(one, other), f"request {i} differs in a batch of {len(chosen)}"


def test_a_reply_is_bit_equal_alone_and_in_any_batch(tiny: Generalist) -> None:
    check_any_batch(tiny, pool=16, compositions=20, seed=3)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_reply_is_bit_equal_in_200_compositions(tiny: Generalist) -> None:
    check_any_batch(tiny, pool=60, compositions=200, seed=4)


def test_scores_are_bit_equal_alone_and_in_any_batch(tiny: Generalist) -> None:
    prompts = mixed_prompts(9, 5)
    choices = ["a", "the fox jumps", picture(1)]
    alone = [tiny.predict(p, choices=choices).logprobs for p in prompts]
    for order in (list(range(9)), [4, 1], [8, 0, 3, 2, 7]):
        together = tiny.predict([prompts[i] for i in order], choices=choices)
        for i, found in zip(order, together):
            assert np.array_equal(found.logprobs, alone[i])
    vectors = tiny.embed(prompts)
    for i in (0, 5, 8):
        assert np.array_equal(tiny.embed([prompts[i]])[0], vectors[i])


def test_samples_of_one_call_differ_and_do_not_depend_on_n(tiny: Generalist) -> None:
    three = tiny.generate("the", n=3, temperature=1.0, max_tokens=12, seed=5)
    assert len({r.tokens.tobytes() for r in three}) == 3
    assert same(tiny.generate("the", temperature=1.0, max_tokens=12, seed=5), three[0])
    assert not same(tiny.generate("the", temperature=1.0, max_tokens=12, seed=6), three[0])


def test_same_seed_gives_the_same_reply_in_another_process(tiny: Generalist, folder: Path) -> None:
    code = (
        "import sys, hashlib; from weft.inference.load import load; import torch; torch.set_num_threads(1)\n"
        "model = load(sys.argv[1], device='cpu')\n"
        "r = model.generate('the fox', ['text', 'image'], grid=(2, 2), max_tokens=9, temperature=1.0, seed=4)\n"
        "print(hashlib.sha256(r.tokens.tobytes() + r.logprobs.tobytes()).hexdigest())"
    )
    out = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True, check=True).stdout
    here = tiny.generate("the fox", ["text", "image"], grid=(2, 2), max_tokens=9, temperature=1.0, seed=4)
    assert out.strip() == hashlib.sha256(here.tokens.tobytes() + here.logprobs.tobytes()).hexdigest()


def test_sixteen_threads_get_what_each_gets_alone(tiny: Generalist) -> None:
    made = requests(16, 11)
    alone = [flat(tiny.generate([request])) for request in made]
    got: dict[int, list[Reply]] = {}

    def call(i: int) -> None:
        got[i] = flat(tiny.generate([made[i]]))
        with pytest.raises(ValueError):
            tiny.generate("x", "smell")

    threads = [threading.Thread(target=call, args=(i,)) for i in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(same(a, b) for i in range(16) for a, b in zip(alone[i], got[i], strict=True))


def test_stream_says_what_generate_gives(tiny: Generalist) -> None:
    options = {"max_tokens": 30, "temperature": 1.0, "seed": 2, "grid": (3, 2)}
    whole = tiny.generate("the fox", ["text", "image", "audio"], **options)
    pieces = list(tiny.generate("the fox", ["text", "image", "audio"], stream=True, **options))
    assert "".join(p.content for p in pieces if p.segment == 0) == whole.text
    rows = [p for p in pieces if p.segment == 1]
    assert [p.content.pixels.shape[0] for p in rows[:-1]] == [4, 8, 12][: len(rows) - 1]
    assert np.array_equal(rows[-1].content.pixels, whole.image.pixels)
    assert [p.final for p in rows] == [False] * (len(rows) - 1) + [True]
    assert np.array_equal([p for p in pieces if p.segment == 2][-1].content.samples, whole.audio.samples)


def test_a_cancelled_stream_or_an_error_leaks_nothing(tiny: Generalist, monkeypatch: pytest.MonkeyPatch) -> None:
    alive: list[weakref.ref[StreamCache]] = []
    new_cache = tiny.model.new_cache

    def counted() -> StreamCache:
        cache = new_cache()
        alive.append(weakref.ref(cache))
        return cache

    monkeypatch.setattr(tiny.model, "new_cache", counted)
    threads = threading.active_count()
    stream = tiny.generate("the", "text", stream=True, max_tokens=50)
    next(stream)
    stream.close()
    del stream
    calls = 0

    def breaks(*args: object, **keywords: object) -> object:
        nonlocal calls
        calls += 1
        if calls > 3:
            raise RuntimeError("out of luck")
        return extend(*args, **keywords)

    extend = tiny.model.extend
    monkeypatch.setattr(tiny.model, "extend", breaks)
    with pytest.raises(RuntimeError, match="out of luck"):
        tiny.generate("the", "text", max_tokens=50)
    gc.collect()
    assert len(alive) == 2 and all(cache() is None for cache in alive)
    assert threading.active_count() == threads


def test_kept_part_of_an_image_stays_and_the_rest_is_new(tiny: Generalist) -> None:
    image = picture(3, 12, 8)  # 3 x 2 patches
    codes = tiny.tokenizer.tokenizers["image"].encode(image).codes
    zero = tiny.tokenizer.vocabulary.spans["image"][0]
    reply = tiny.generate("finish it", image, keep=1, seed=3)
    assert (reply.tokens[3:5] - zero).tolist() == codes[:2].tolist()
    assert reply.drawn[3:9].tolist() == [False] * 2 + [True] * 4
    assert reply.image.pixels.shape == (12, 8, 1)
    mask = np.array([[True, False], [False, True], [False, False]])
    reply = tiny.generate("finish it", image, keep=mask)
    assert reply.drawn[3:9].tolist() == (~mask).reshape(-1).tolist()
    assert ((reply.tokens[3:9] - zero)[mask.reshape(-1)] == codes[mask.reshape(-1)]).all()
    tone = sound(1, 0.2)
    reply = tiny.generate("go on", tone, keep=0.5)
    half = len(tiny.tokenizer.tokenizers["audio"].encode(tone)) // 2
    assert reply.drawn[1 : 1 + half].tolist() == [False] * half and reply.drawn[1 + half]


def test_stop_ends_a_text_before_the_string(tiny: Generalist) -> None:
    plain = tiny.generate("the", max_tokens=40, temperature=1.0, seed=9).text
    stop = plain[5:7]
    reply = tiny.generate("the", max_tokens=40, temperature=1.0, seed=9, stop=stop)
    assert reply.text == plain[: plain.find(stop)] and reply.finish == "stop"
    streamed = tiny.generate("the", max_tokens=40, temperature=1.0, seed=9, stop=stop, stream=True)
    assert "".join(piece.content for piece in streamed) == reply.text


def test_replies_state_their_shapes_and_times(tiny: Generalist) -> None:
    sensor = tiny.generate([readings(1, 5, start=2.0)], "sensor", readings=4).sensor
    assert sensor.values.shape == (4, 3) and sensor.start == 2_100_000_000 and sensor.kind == "imu" and sensor.rate_hz == 50.0
    video = tiny.generate([clip()], "video", grid=(2, 1, 2)).video
    assert video.frames.shape == (2, 4, 8, 1) and video.rate_hz == 5.0
    audio = tiny.generate("say", "audio", seconds=0.1).audio
    assert len(audio.samples) == 400 and audio.rate_hz == 4000
    assert tiny.generate([picture(0, 8, 12)], "image").image.pixels.shape == (8, 12, 1)


def test_guidance_changes_media_and_leaves_log_probabilities_those_of_the_model(tiny: Generalist) -> None:
    prompt = ["the quick", picture(1)]
    free = tiny.generate(prompt, "image", grid=(3, 3), seed=1)
    guided = tiny.generate(prompt, "image", grid=(3, 3), seed=1, guidance=3.0)
    assert not np.array_equal(free.tokens, guided.tokens)
    score = tiny.score(prompt, guided)
    assert np.abs(score.logprobs - guided.logprobs)[guided.drawn].max() < 2e-5


def test_what_the_model_reads_is_what_the_tokenizer_writes(tiny: Generalist) -> None:
    """Positions, slices and marks of a reply are those of the same document encoded whole."""
    prompt = [Text("the fox"), readings(1, 3, start=1.0)]
    produce = [Produce("text", max_tokens=4), Produce("sensor", readings=2), Produce("audio", max_tokens=3)]
    reply = tiny.generate(prompt, produce, seed=1)
    start = encode(tiny.tokenizer, prompt)
    whole = join([start.stream, *reply.parts])
    builder = tiny.tokenizer.builder()
    parts = [builder.open(), builder.add(tiny.tokenizer.prepare([replace(s, role="observed") for s in prompt]))]
    for part in reply.parts:
        info, codes = tiny.tokenizer.segments(part)[0]
        item = tiny.tokenizer.prepare([replace(tiny.tokenizer.decode_segment(codes, info), role="target")])[0]
        text = Tokens(codes, (len(codes),), np.zeros(len(codes), np.int64))  # free bytes do not survive decoding
        tokens = text if info.modality == "text" else replace(item.tokens, codes=codes)
        parts.append(builder.add([replace(item, tokens=tokens)], PRESETS["instruct"]))
    again = join(parts)
    for name in ARRAYS:
        if name not in ("time", "segment"):
            assert np.array_equal(getattr(whole, name), getattr(again, name)), name


def test_windows_shorter_than_the_reply_change_nothing_in_the_law(tiny: Generalist) -> None:
    model = make_model(tiny.tokenizer, window=7, max_landmarks=2, full_every=0)
    small = Generalist(model, tiny.tokenizer)
    for request, some in zip(requests(8, 21), small.generate(requests(8, 21))):
        for reply in flat([some]):
            score = small.score(request.prompt, reply)
            assert np.abs(score.logprobs - reply.logprobs)[reply.drawn].max(initial=0) < 2e-5


def test_an_empty_prompt_scores_the_continuation_alone(tiny: Generalist) -> None:
    alone = tiny.score([[], []], [["the fox"], ["a seven"]])
    assert [s.total for s in alone] == [tiny.score("", "the fox").total, tiny.score([], "a seven").total]
    assert alone[0].bits_per_byte > 0 and alone[0].text_bytes == 7


def test_a_stream_shows_nothing_behind_a_stop_string(tiny: Generalist) -> None:
    """Also where `min_tokens` keeps the text open beyond it."""
    options = {"max_tokens": 40, "min_tokens": 30, "temperature": 1.0, "seed": 9}
    whole = tiny.generate("the", **options).text
    stop = whole[4:6]
    pieces = tiny.generate("the", stop=stop, stream=True, **options)
    assert "".join(piece.content for piece in pieces) == whole[: whole.index(stop)]


def test_the_first_token_waits_for_the_prompt(tiny: Generalist, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its time begins with the call, so it holds the time that reading the prompt takes."""
    extend = tiny.model.extend
    reads: list[float] = []

    def timed(*args: Any, **keywords: Any) -> Any:
        began = time.perf_counter()
        time.sleep(0.05)
        hidden = extend(*args, **keywords)
        reads.append(time.perf_counter() - began)
        return hidden

    monkeypatch.setattr(tiny.model, "extend", timed)
    reply = tiny.generate("the fox", max_tokens=2)
    assert reads[0] <= reply.timings.first_token_s <= reply.timings.total_s
