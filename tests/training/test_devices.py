"""Which device a rank takes, and over what it talks: decided without one, from what torch says is there."""

from __future__ import annotations

import pytest
import torch

from weft.training import distributed
from weft.training.engine import pick_device


@pytest.fixture
def four_gpus(monkeypatch: pytest.MonkeyPatch) -> list[torch.device]:
    """A machine with four GPUs; the list holds what was made current."""
    taken: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    monkeypatch.setenv("LOCAL_RANK", "2")
    return taken


@pytest.mark.parametrize(("name", "expected"), [("auto", "cuda:2"), ("cuda", "cuda:2"), ("cuda:1", "cuda:1"), ("cpu", "cpu")])
def test_a_rank_takes_its_own_gpu(four_gpus: list[torch.device], name: str, expected: str) -> None:
    assert pick_device(name) == torch.device(expected)
    assert four_gpus == [torch.device(expected)] * (expected != "cpu")


def test_more_ranks_than_gpus_are_refused(four_gpus: list[torch.device], monkeypatch: pytest.MonkeyPatch) -> None:
    """Two ranks on one GPU would hang or fail deep in NCCL."""
    monkeypatch.setenv("LOCAL_RANK", "4")
    with pytest.raises(ValueError, match="sees 4 GPUs; start one rank per GPU"):
        pick_device("cuda")
    assert not four_gpus


def test_a_rank_that_may_see_one_gpu_only_takes_that(four_gpus: list[torch.device], monkeypatch: pytest.MonkeyPatch) -> None:
    """Slurm's --gpus-per-task=1 hides the others."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert pick_device("auto") == torch.device("cuda:0")


def test_a_gpu_that_is_not_there_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert pick_device("auto") == torch.device("cpu")
    with pytest.raises(ValueError, match="torch sees no GPU; use device: cpu"):
        pick_device("cuda")


@pytest.mark.parametrize(("device", "expected"), [("cpu", "gloo"), ("auto", "nccl"), ("cuda", "nccl")])
def test_ranks_that_compute_on_cpus_talk_over_gloo_also_beside_gpus(
    four_gpus: list[torch.device], monkeypatch: pytest.MonkeyPatch, device: str, expected: str
) -> None:
    asked = []
    monkeypatch.setattr(distributed.dist, "init_process_group", lambda backend, **_: asked.append(backend))
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    distributed.start(device=device)
    assert asked == [expected]
