"""The machine code of the Triton kernels for GPUs that are not here: tensor cores, no spills, little shared memory."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.kernels.sass import SHARED_LIMIT, machine_code
from weft.kernels.triton_attention import tile_sizes

pytest.importorskip("triton", reason="triton is not installed")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("Triton interprets its programs in this process", allow_module_level=True)

POINTERS = {
    **dict.fromkeys(("q", "k", "v", "out", "grad", "result", "k_result", "v_result", "hidden", "weight", "signal"), "*bf16"),
    **dict.fromkeys(("lse", "share", "log_z", "picked", "mean", "grad_log_z", "grad_picked", "grad_mean"), "*fp32"),
    **dict.fromkeys(("born", "dies", "at", "table", "first_query", "last_query"), "*i32"),
    **dict.fromkeys(("target", "order"), "*i64"),
    "scale": "fp32",
}
ATTENTION = ["forward", "query_grad", "key_grad", "landmark_grad"]


def attention_program(
    name: str, width: int, arch: int, dtype: torch.dtype = torch.bfloat16
) -> tuple[Any, dict[str, Any], int, int]:
    from weft.kernels import triton_backward, triton_forward

    sizes = tile_sizes(width, dtype, arch // 10)
    program, size = {
        "forward": (triton_forward.forward, sizes.forward),
        "query_grad": (triton_backward.query_grad, sizes.query_grad),
    }.get(name, (triton_backward.key_grad, sizes.key_grad))
    constants = {"WIDTH": width, "QUERIES": size.queries, "KEYS": size.keys, "UPCAST": False}
    if program is triton_backward.key_grad:
        constants["GATHER"] = name == "landmark_grad"
    return program, constants, size.warps, size.stages


@pytest.mark.parametrize(("name", "width"), [(n, w) for n in ATTENTION for w in (64, 128) if (n, w) != ("landmark_grad", 64)])
@pytest.mark.parametrize("arch", [80, 90])
def test_attention(name: str, width: int, arch: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    program, constants, warps, stages = attention_program(name, width, arch)
    code = machine_code(program, POINTERS, constants, arch, warps, stages, tmp_path)
    assert code.tensor > 0 and code.local == 0 and code.shared <= SHARED_LIMIT[arch], code


@pytest.mark.slow
@pytest.mark.parametrize("name", ATTENTION)
@pytest.mark.parametrize("arch", [80, 90])
def test_attention_in_full_precision(name: str, arch: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the widest head: without tensor cores, but what is multiplied fits the registers."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    program, constants, warps, stages = attention_program(name, 128, arch, torch.float32)
    types = {key: "*fp32" if kind == "*bf16" else kind for key, kind in POINTERS.items()}
    code = machine_code(program, types, constants, arch, warps, stages, tmp_path)
    few = 16 if arch == 80 else 0  # of some thousand instructions: ptxas gives the gradients 64 or 80 registers there
    assert code.local <= few and code.shared <= SHARED_LIMIT[arch], code


@pytest.mark.parametrize("name", ["loss_forward", "loss_signal"])
@pytest.mark.parametrize("arch", [80, 90])
def test_sliced_loss(name: str, arch: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from weft.kernels import triton_loss_programs as programs
    from weft.kernels import triton_sliced_loss as loss

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    constants = {"ROWS": loss.ROWS, "IDS": loss.IDS, "STEP": loss.STEP, "UPCAST": False}
    code = machine_code(getattr(programs, name), POINTERS, constants, arch, loss.WARPS, loss.STAGES, tmp_path)
    assert code.tensor > 0 and code.local == 0 and code.shared <= SHARED_LIMIT[arch], code


MOE = {
    "count": {"BLOCK": 128, "EXPERTS": 32},
    "arrange": {"BLOCK": 128},
    "spread": {"CHOICES": 8, "COLUMNS": 1024},
    "gather_sum": {"CHOICES": 8, "COLUMNS": 1024},
    "swiglu_forward": {"ROWS": 4, "COLUMNS": 256},
    "swiglu_backward": {"ROWS": 4, "COLUMNS": 256},
}


@pytest.mark.parametrize("name", MOE)
@pytest.mark.parametrize("arch", [80, 90])
def test_moe(name: str, arch: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No product in them: what counts is memory, moved 16 bytes at a time."""
    from weft.kernels import triton_moe as moe
    from weft.kernels import triton_moe_programs as programs

    assert MOE["arrange"]["BLOCK"] == moe.BLOCK and MOE["count"] == {"BLOCK": moe.BLOCK, "EXPERTS": moe.EXPERTS}
    assert MOE["spread"]["COLUMNS"] == moe.COLUMNS and MOE["swiglu_forward"] == moe.FORWARD == moe.BACKWARD
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    types = {
        **dict.fromkeys(("x", "out", "rows", "gate_up", "grad", "grad_gate_up", "again"), "*bf16"),
        **dict.fromkeys(("weight", "grad_weight"), "*fp32"),
        **dict.fromkeys(("table", "first", "order", "place"), "*i32"),
        "expert": "*i64",
    }
    code = machine_code(getattr(programs, name), types, MOE[name], arch, moe.WARPS, 2, tmp_path)
    assert code.local == 0 and code.shared <= SHARED_LIMIT[arch], code
    assert code.wide > 0 or name in ("count", "arrange"), code


def test_a_spilling_kernel_would_be_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The forward pass on too few warps does spill: the count above is not always zero."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    program, constants, _, _ = attention_program("forward", 128, 80)
    constants = {**constants, "QUERIES": 64, "KEYS": 64}
    assert machine_code(program, POINTERS, constants, 80, 4, 2, tmp_path).local > 0
