"""The example of docs/adding-a-modality.md works as it stands."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from weft.tokenizers.bundle import StreamTokenizer, TokenizerMismatch
from weft.tokenizers.grammar import Want, parse
from weft.tokenizers.pack import pack, unpack
from weft.tokenizers.plan import LossPlan
from weft.tokenizers.segment import Sensor, Text

sys.path.insert(0, str(Path(__file__).parent))
from mixtures import tokenizers

PAGE = Path(__file__).parents[2] / "docs" / "adding-a-modality.md"


@pytest.fixture(scope="module")
def example():  # type: ignore[no-untyped-def]
    if not PAGE.exists():
        pytest.skip("the documentation is not beside the tests")
    module = ModuleType("thermal_example")
    sys.modules[module.__name__] = module
    for block in re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.S):
        exec(compile(block, str(PAGE), "exec"), module.__dict__)
    yield module
    del sys.modules[module.__name__]


def test_a_seventh_modality_goes_the_whole_way(example, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    others = {name: tokenizers()[name] for name in ("text", "sensor", "action")}
    tok = example.use(others, tmp_path)
    assert tok.modalities[-1] == "thermal" and tok.feature_sizes()["thermal"] == 1
    heat = np.linspace(-20, 120, 35).reshape(5, 7)
    parts = [
        Text(text="a red ball"),
        example.Thermal(celsius=heat, start=0.5),
        Sensor(values=[[0.5]] * 4, kind="k1", rate_hz=2.0, start=0),
        example.Thermal(celsius=heat[:2], role="target", name="next"),
    ]
    stream = tok.encode(parts, LossPlan(target={"thermal": 1.0}))
    pieces = parse(stream.ids, tok.vocabulary, tok.registry)
    assert [p.modality for p in pieces] == ["text", "sensor", "thermal", "thermal"]
    back = tok.decode(stream)
    assert np.abs(back[2].celsius - heat).max() <= 140 / 64 / 2 + 1e-9 and back[3].name == "next"
    assert (stream.two_way >= 0).sum() == 35 and stream.weight.sum() == 3 + 14 and len(stream.feature_at["thermal"]) == 35
    found = unpack(pack([stream], 128)[0])[0]
    assert np.array_equal(found.ids, stream.ids)
    grammar = tok.grammar(sequence=[Want("thermal", shape=(1, 2))], holes=False, inside=True)
    widths = []
    while not grammar.done:
        widths.append(int(grammar.mask().sum()))
        grammar.push(grammar.legal()[0][0])
    assert widths == [1, 1, 1, 64, 64, 1]


def test_a_folder_with_an_unknown_modality_names_no_class_of_its_own(example, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    example.use({"text": tokenizers()["text"]}, tmp_path)
    with pytest.raises(TokenizerMismatch, match="thermal tokenizer; hand in a registry"):
        StreamTokenizer.load(tmp_path)
