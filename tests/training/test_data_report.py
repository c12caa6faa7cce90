"""The report counts what is there, and its page stands alone and trusts nothing."""

import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from tests.training.data_world import documents, tokenizer, write_manifest
from weft.training.data.index import ShardError
from weft.training.data.prepare import prepare
from weft.training.data.report import data_report

EVIL = "<script>alert(1)</script>"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    where = tmp_path_factory.mktemp("report")
    docs = documents(40)
    docs[2]["segments"][0]["text"] = EVIL
    docs[2]["id"] = f"a{EVIL}"
    docs[6]["segments"] = []
    prepare(write_manifest(where / "raw", docs), where / "out")
    return where / "out"


def test_counts_are_exact(folder: Path) -> None:
    report = data_report(folder)
    assert report.samples == {
        "train": {"captions": 10, "control": 8, "notes": 8, "text": 9},
        "val": {"control": 2, "notes": 2},
    }
    assert report.modalities()["image"] == {
        "segments": 10,
        "bytes": report.content["captions"]["image"]["bytes"],
        "seconds": 0,
        "cells": 10 * 16 * 24,
    }
    assert report.content["notes"]["audio"]["seconds"] == pytest.approx(2.0, abs=0.01)
    assert report.content["control"]["sensor"]["cells"] == 10 * 12 * 2
    assert report.refused == {"bad manifest": 1} and report.damaged == [] and report.tokens is None


def test_tokens_are_those_of_the_tokenizer(folder: Path) -> None:
    tokens = data_report(folder, tokenizer=tokenizer(), length=64).tokens
    assert tokens is not None and tokens.documents == len(tokens.lengths) == 35 and tokens.unusable == 0
    assert sum(tokens.share.values()) == pytest.approx(1) and set(tokens.share) == {
        "text",
        "image",
        "audio",
        "sensor",
        "action",
    }
    mean = sum(n * tokens.mean_by_source[s] for s, n in data_report(folder).samples["train"].items()) / 35
    assert np.mean(tokens.lengths) == pytest.approx(mean)
    assert 0 <= tokens.row_waste < 0.3 and tokens.cut == sum(n > 64 for n in tokens.lengths)


def test_the_page_is_well_formed_complete_and_escaped(folder: Path, tmp_path: Path) -> None:
    data_report(folder, tmp_path / "r.html", tokenizer=tokenizer(), examples=40)
    text = (tmp_path / "r.html").read_text()
    assert "<script" not in text and "&lt;script&gt;" in text
    assert not re.search(r'(src|href)="(?!data:)', text) and "http" not in text
    stack: list[str] = []

    class Check(HTMLParser):
        def handle_starttag(self, tag: str, attrs: list) -> None:
            if tag not in ("meta", "img", "rect", "polyline"):
                stack.append(tag)

        def handle_endtag(self, tag: str) -> None:
            if tag not in ("rect", "polyline"):
                assert stack.pop() == tag

    Check().feed(text)
    assert stack == []
    assert text.count("<img") == 10 and text.count("<audio") == 8 and "data:audio/flac;base64," in text and "captions" in text


def test_damage_is_shown_not_raised(folder: Path, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(folder, tmp_path / "d")
    with open(tmp_path / "d" / "train-000000.tar", "r+b") as file:
        file.truncate(9000)
    report = data_report(tmp_path / "d", tmp_path / "r.html", tokenizer=tokenizer())
    assert "samples lost" in report.damaged[0] and report.tokens is not None and report.tokens.unusable > 0
    assert "samples lost" in (tmp_path / "r.html").read_text()
    with pytest.raises(ShardError, match="run weft prepare"):
        data_report(tmp_path / "nothing")
