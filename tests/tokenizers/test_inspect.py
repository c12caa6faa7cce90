"""The page holds every token, opens in a real browser, and loads nothing from elsewhere."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from weft.tokenizers.defaults import default_tokenizer, name_kinds
from weft.tokenizers.inspect import inspect_document, page, page_data, summary
from weft.tokenizers.preview import preview
from weft.tokenizers.segment import Action, ActionSpace, Audio, Document, Image, Sensor, Text, Video
from weft.tokenizers.stream import StreamConfig

sys.path.insert(0, str(Path(__file__).parent))
from mixtures import bundle

CHROMIUM = next((p for p in map(shutil.which, ("chromium", "chromium-browser", "google-chrome")) if p), None)
RNG = np.random.default_rng(0)
DOCUMENT = Document(
    id="</script><b>ride",
    segments=(
        Text(text="a <b>bold</b> claim & </script> \u4e16\u754c"),
        Image(pixels=RNG.random((33, 49, 3)).astype(np.float32), name="photo"),
        Video(frames=RNG.random((6, 32, 32, 3)).astype(np.float32), rate_hz=5.0, start=0),
        Audio(samples=np.sin(np.arange(8000) / 9).astype(np.float32), rate_hz=16000.0, start=0.25),
        Sensor(values=np.stack([np.sin(np.arange(50) / 5), np.full(50, np.nan)], 1), rate_hz=100.0, start=0, name="imu"),
        Sensor(values=[20.0, 21.0, np.nan], rate_hz=3.0, start=0),
        Action(values=[0, 2, 1], space=ActionSpace(n=3), rate_hz=4.0, start=0.1),
        Text(text="end", start=1.5),
    ),
)


@pytest.fixture(scope="module")
def made():  # type: ignore[no-untyped-def]
    document = name_kinds(DOCUMENT)
    tokenizer = default_tokenizer(document, StreamConfig(chunk_s=0.2), steps=3)
    return document, tokenizer, tokenizer.encode(document)


def test_the_default_tokenizer_encodes_and_decodes_every_segment(made) -> None:  # type: ignore[no-untyped-def]
    _, tokenizer, stream = made
    assert [s.modality for s in tokenizer.decode(stream)] == [info.modality for info in stream.info]


def test_the_page_holds_every_token_and_no_markup_of_the_document(made) -> None:  # type: ignore[no-untyped-def]
    document, tokenizer, stream = made
    html = page(document, stream, tokenizer)
    data = json.loads(re.search(r'id="data">(.*?)</script>', html, re.S).group(1))  # type: ignore[union-attr]
    assert data == json.loads(json.dumps(page_data(document, stream, tokenizer)))
    assert data["title"] == "</script><b>ride" and "<b>ride" not in html
    assert all(
        len(data["tokens"][key]) == len(stream) for key in ("id", "label", "modality", "position", "time", "slice", "colour")
    )
    assert sum(p["end"] - p["start"] for p in data["pieces"]) == len(stream) - 2
    assert not re.search(r"(?:src|href)=[\"']?(?:https?:)?//", html), "nothing is loaded from elsewhere"
    kinds = [segment["media"]["kind"] for segment in data["segments"]]
    assert sorted(set(kinds)) == ["audio", "curves", "image", "text", "video"]
    assert all(segment["decoded"]["kind"] == segment["media"]["kind"] for segment in data["segments"])


def test_the_summary_counts_what_is_there(made, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    document, tokenizer, stream = made
    text = inspect_document(document, tokenizer, tmp_path / "deep" / "page.html")
    assert text == summary(document, stream, tokenizer)
    assert f"{len(stream)} tokens, 8 segments" in text and "1.50 s on the clock" in text and "photo" in text
    assert (tmp_path / "deep" / "page.html").stat().st_size > 10_000


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium to open the page with")
def test_the_page_opens_in_a_browser_and_draws_every_token(made, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    document, tokenizer, stream = made
    path = tmp_path / "page.html"
    inspect_document(document, tokenizer, path)
    flags = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        f"--user-data-dir={tmp_path / 'profile'}",
    ]
    found = subprocess.run(
        [str(CHROMIUM), *flags, "--virtual-time-budget=4000", "--dump-dom", path.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
    )
    ready = re.search(r'data-ready="(\d+)"', found.stdout)
    assert ready, found.stderr[-2000:]
    assert int(ready.group(1)) == len(stream) - 2, "every token but <doc> and </doc> is a cell"
    assert found.stdout.count('class="pair"') == 8 and "<audio" in found.stdout and "data:image/webp" in found.stdout
    assert "Uncaught" not in found.stderr


def test_what_cannot_be_shown_or_decoded_says_why() -> None:
    assert preview(Image(pixels="/no/such/file.png"))["kind"] == "note"
    tokenizer = default_tokenizer(Document(segments=(DOCUMENT.segments[1],)), steps=0)
    document = Document(segments=(DOCUMENT.segments[1],))
    data = page_data(document, tokenizer.encode(document), tokenizer)
    assert data["segments"][0]["decoded"]["kind"] == "note" and "no codes" in data["segments"][0]["decoded"]["text"]


def test_an_empty_document_has_a_page_and_a_huge_one_is_refused() -> None:
    tok = bundle()
    assert "2 tokens, 0 segments" in inspect_document(Document(segments=()), tok)
    page(Document(segments=()), tok.encode(Document(segments=())), tok)
    long = Sensor(values=np.zeros((30_000, 2)), kind="k2", rate_hz=100.0)
    document = Document(segments=(long, replace(long)))
    with pytest.raises(ValueError, match="inspect a part"):
        page(document, tok.encode(document), tok)
