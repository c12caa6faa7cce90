"""A saved session goes on bit for bit, in this process and in another; anything but its own file is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.inference.conftest import PUSH, make_model, picture, readings
from weft.inference.compiled import CompiledModel
from weft.inference.errors import CheckpointError, SessionFileError
from weft.inference.generalist import Generalist
from weft.inference.sampling import Sampling
from weft.inference.session import Session

STEP_S = 0.04
GO_ON = """
import sys, json, torch
from tests.inference.conftest import readings
from weft.inference.load import load
torch.set_num_threads(1)
session = load(sys.argv[1], device="cpu").load_session(sys.argv[2])
actions = []
for k in range(20, 24):
    session.push(readings(k, 2), 0.04 * k)
    actions.append(session.act().tolist())
print(json.dumps([actions, session.state().tolist(), session.say(max_tokens=5).tokens.tolist()]))
"""


def lived(model: Generalist, steps: int = 15, **spec: object) -> Session:
    """A session with a past: a prompt, a picture, readings and its own actions, and things that were not read yet."""
    session = model.session(
        space=PUSH, rate_hz=50.0, prompt=["hold it", picture()], sampling=Sampling(temperature=1.0, seed=3), **spec
    )
    for k in range(steps):
        session.push(readings(k, 2), STEP_S * k)
        session.act()
    session.push(readings(99, 2), STEP_S * steps)
    session.push("a note")
    return session


def go_on(session: Session, steps: int = 6) -> list[list[float]]:
    actions = []
    for k in range(20, 20 + steps):
        session.push(readings(k, 2), STEP_S * k)
        actions.append(session.act().tolist())
    return actions


@pytest.mark.parametrize("spec", [{}, {"full_tokens": 48, "landmarks": 5}], ids=["all of it", "bounded"])
def test_a_loaded_session_goes_on_bit_for_bit(tiny: Generalist, tmp_path: Path, spec: dict) -> None:
    session = lived(tiny, **spec)
    session.save(tmp_path / "a.session")
    again = tiny.load_session(tmp_path / "a.session")
    assert len(again) == len(session) and again.spec.space == PUSH and again.spec.sampling == session.spec.sampling
    assert go_on(again) == go_on(session)
    assert torch.equal(again.state(), session.state())
    assert np.array_equal(again.forecast(2, samples=2).values, session.forecast(2, samples=2).values)
    assert again.nbytes() <= session.nbytes()
    assert [p.name for p in tmp_path.iterdir()] == ["a.session"]


def test_saving_changes_nothing(tiny: Generalist, tmp_path: Path) -> None:
    one, other = lived(tiny), lived(tiny)
    one.save(tmp_path / "a.session")
    assert go_on(one) == go_on(other) and torch.equal(one.state(), other.state())


def test_a_session_that_hides_passed_media_goes_on_as_it_was(tiny: Generalist, tmp_path: Path) -> None:
    model = make_model(tiny.tokenizer, last_medium=(1, 4))
    hiding = Generalist(model, tiny.tokenizer, digest="hiding")
    session = lived(hiding)
    assert session.cache.media.has_passed
    session.save(tmp_path / "a.session")
    assert go_on(hiding.load_session(tmp_path / "a.session")) == go_on(session)
    with pytest.raises(CheckpointError, match="last_medium"):
        CompiledModel(model)


def test_another_process_goes_on_bit_for_bit(tiny: Generalist, folder: Path, tmp_path: Path) -> None:
    session = lived(tiny)
    session.save(tmp_path / "a.session")
    command = [sys.executable, "-c", GO_ON, str(folder), str(tmp_path / "a.session")]
    out = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2]).stdout
    actions, state, said = json.loads(out)
    assert go_on(session, 4) == actions
    assert session.state().tolist() == state and session.say(max_tokens=5).tokens.tolist() == said


def test_a_session_of_another_model_or_a_torn_file_is_refused(tiny: Generalist, tmp_path: Path) -> None:
    path = tmp_path / "a.session"
    session = lived(tiny, steps=2)
    session.save(path)
    other = Generalist(make_model(tiny.tokenizer, width=36, heads=3, kv_heads=1), tiny.tokenizer, digest="other")
    with pytest.raises(SessionFileError, match="another model"):
        other.load_session(path)
    with pytest.raises(SessionFileError, match="keys are"):
        Generalist(other.model, tiny.tokenizer, tiny.digest).load_session(path)
    with pytest.raises(SessionFileError, match="no session at"):
        tiny.load_session(tmp_path / "none")
    data = path.read_bytes()
    for cut in range(0, len(data), max(len(data) // 40, 1)):
        (tmp_path / "torn").write_bytes(data[:cut])
        with pytest.raises(SessionFileError, match="not a whole weft session"):
            tiny.load_session(tmp_path / "torn")
