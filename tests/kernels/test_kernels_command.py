"""`weft kernels` as a user sees it: one choice per section, the one that a call really takes, and a reason for every other."""

from __future__ import annotations

import pytest
import torch

import weft.kernels.attention as dispatcher
from weft.commands import kernels as command
from weft.kernels.layout import StreamLayout

SHAPE = command.Shape(200, 4, 2, 16, 24, 50, "auto", True, False, 64, 4, 2, 32)


def test_every_section_has_one_choice_and_a_reason_in_every_row(capsys: pytest.CaptureFixture[str]) -> None:
    sections = [("attention", command.attention_rows(SHAPE, "cpu", torch.float32))]
    sections += command.other_rows(SHAPE, "cpu", torch.float32)
    for name, rows in sections:
        assert sum(state == "CHOSEN" for _, state, _ in rows) == 1, name
        assert all(reason for _, _, reason in rows), name
    command.show(length=200, window=24)
    said = capsys.readouterr().out
    for word in ("attention: T=200", "sliced loss", "routed experts", "QK-norm", "CHOSEN", "torch", "GPU", "sm_80"):
        assert word in said, word


def test_the_choice_it_names_is_the_one_a_call_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    named = next(name for name, state, _ in command.attention_rows(SHAPE, "cpu", torch.float32) if state == "CHOSEN")
    at = torch.arange(200)
    layout = StreamLayout.build(torch.zeros_like(at), at % 50 == 0, torch.full_like(at, -1), 24)
    q, k = torch.zeros(200, 4, 16, requires_grad=True), torch.zeros(200, 2, 16)
    assert dispatcher._select(q, k, k, layout, "auto", False)[0] == named
    monkeypatch.setenv("WEFT_MOE", "triton")
    routed = command.other_rows(SHAPE, "cpu", torch.float32)[1][1]
    assert routed[1][:2] == ("triton", "no") and "needs an NVIDIA GPU" in routed[1][2]


def test_what_is_asked_for_changes_the_answer() -> None:
    def reasons(shape: command.Shape, dtype: torch.dtype) -> dict[str, str]:
        return {name: reason for name, _, reason in command.attention_rows(shape, "cpu", dtype)}

    assert "float64" in reasons(SHAPE, torch.float64)["flex"]
    forward = command.Shape(**{**vars(SHAPE), "backward": False})
    assert "backward" in reasons(SHAPE, torch.float32)["flex"] and "backward" not in reasons(forward, torch.float32)["flex"]


def test_sizes_that_cannot_be_are_named() -> None:
    with pytest.raises(ValueError, match="multiple of kv_heads; found 5 and 2"):
        command.show(heads=5, kv_heads=2)
    with pytest.raises(ValueError, match="at least 1"):
        command.show(length=0)


def test_the_doctor_shows_the_same_table() -> None:
    made = command.backends_table()
    assert made.row_count == len(dispatcher.BACKENDS)
