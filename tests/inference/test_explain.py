"""Explanations: numbers that add up, a page that a browser renders, a model that is left as it was."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.inference.conftest import clip, moves, picture, readings, sound
from weft.inference.errors import PromptError
from weft.inference.explain import Explanation
from weft.inference.files import save_segment
from weft.inference.generalist import Generalist
from weft.tokenizers.segment import Audio, Image, Video


@pytest.fixture(scope="module")
def explained(tiny: Generalist) -> tuple[list, object, Explanation]:
    prompt = ["what is <this> & that", picture(1), sound(1), readings(2), clip(1), moves(1)]
    reply = tiny.generate(prompt, ["text", "image"], max_tokens=6, grid=(2, 2))
    return prompt, reply, tiny.explain(prompt, reply)


def test_leave_one_out_is_the_loss_of_removing_a_segment(tiny: Generalist, explained) -> None:
    prompt, reply, e = explained
    again = tiny.score(prompt, reply)
    assert abs(e.logprob - again.total) < 1e-6
    sentence = "the fox"
    plain = tiny.explain(prompt, sentence)
    for i in range(len(prompt)):
        without = tiny.score([s for j, s in enumerate(prompt) if j != i], sentence)
        assert abs(plain.parts[i].leave_one_out - (plain.logprob - without.total)) < 1e-4


def test_shares_add_up_and_nothing_looks_ahead(explained) -> None:
    _, _, e = explained
    asked = [p for p in e.parts if p.role == "prompt"]
    assert abs(sum(p.gradient for p in asked) - 1.0) < 1e-5 and all(p.gradient > 0 for p in asked)
    flow = np.array(e.attention)
    assert np.allclose(flow.sum(1), 1.0, atol=1e-4)
    assert (np.triu(flow[:-1, :-1], 1) == 0).all()
    assert [p.modality for p in e.parts] == ["text", "image", "audio", "sensor", "video", "action", "text", "image"]
    for layers in e.experts.values():
        assert np.allclose(np.array(layers).sum(1), 1.0, atol=1e-4)


def test_explaining_leaves_other_threads_alone(tiny: Generalist, explained) -> None:
    prompt, reply, _ = explained
    before = tiny.generate(prompt, max_tokens=8).tokens
    results: list[bool] = []

    def call() -> None:
        results.extend(np.array_equal(tiny.generate(prompt, max_tokens=8).tokens, before) for _ in range(4))

    thread = threading.Thread(target=call)
    thread.start()
    tiny.explain(prompt, reply)
    thread.join()
    assert results == [True] * 4
    assert not tiny.model.embedding._forward_hooks and all(p.grad is None for p in tiny.model.parameters())


def test_page_is_self_contained_and_escaped(explained, tmp_path: Path) -> None:
    _, _, e = explained
    page, numbers = e.save(tmp_path / "why")
    text = page.read_text()
    assert "&lt;this&gt; &amp; that" in text and "<this>" not in text
    assert not re.search(r'(src|href)="(?!data:)', text) and "<script" not in text
    assert json.loads(numbers.read_text())["logprob"] == e.logprob


def test_media_from_files_are_on_the_page(tiny: Generalist, tmp_path: Path) -> None:
    """A sound has its wave and a player, a video frames from its beginning to its end."""
    paths = [save_segment(replace(sound(), rate_hz=8000), tmp_path / "tone"), save_segment(clip(0, 11), tmp_path / "film")]
    prompt = [Audio(paths[0]), Video(str(paths[1]), rate_hz=5.0), Image(save_segment(picture(), tmp_path / "photo"))]
    why = tiny.explain(prompt, "yes")
    assert [part.label for part in why.parts[:3]] == ["tone.wav", "film", "photo.png"]
    text = why.save(tmp_path / "why")[0].read_text()
    assert text.count("<audio") == 1 and text.count("<polyline") == 1 and text.count("<img") == 6 + 1
    paths[0].unlink()
    assert "<audio" not in why.save(tmp_path / "again")[0].read_text()


def test_page_renders_in_a_browser(explained, tmp_path: Path) -> None:
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("needs a chromium on the path")
    page, _ = explained[2].save(tmp_path / "why")
    shot = tmp_path / "why.png"
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", f"--screenshot={shot}", "--window-size=1060,1800"]
    subprocess.run([*command, page.as_uri()], check=True, capture_output=True, timeout=120)
    from PIL import Image

    pixels = np.asarray(Image.open(shot).convert("RGB"), np.int64)
    assert pixels.shape == (1800, 1060, 3)
    colours = {tuple(int(v) for v in c) for c in np.unique(pixels.reshape(-1, 3), axis=0)}
    # The tags of six modalities are on the page in their colours.
    assert {(76, 120, 168), (232, 131, 58), (58, 157, 143), (90, 158, 69), (212, 86, 63), (148, 103, 189)} <= colours


def test_a_document_beyond_the_limit_is_refused(tiny: Generalist, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("weft.inference.explain.LIMIT", 10)
    with pytest.raises(PromptError, match="explain takes 10"):
        tiny.explain(["a long prompt", picture()], "yes")
