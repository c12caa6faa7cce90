"""The examples of docs/inference.md run as they stand, in order, on the tiny model."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import weft
from tests.inference.conftest import picture
from weft.inference.files import picture as to_picture
from weft.inference.generalist import Generalist

PAGE = Path(__file__).parents[2] / "docs" / "inference.md"


def test_examples_of_the_page_run(tiny: Generalist, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not PAGE.is_file():
        pytest.skip("the documents are not part of an installed package")
    monkeypatch.chdir(tmp_path)
    to_picture(picture().pixels).save("photo.png")
    monkeypatch.setattr(weft, "load", lambda path: tiny, raising=False)
    names: dict[str, object] = {}
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.S)
    assert len(blocks) >= 7
    for block in blocks:
        exec(compile(block, str(PAGE), "exec"), names)
    assert Path("why.html").is_file() and Path("my.index").is_file()
