"""Triton programs compiled for a GPU that is not here, and what their machine code holds."""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SIXTEENS = ("stride", "width", "columns")  # numbers that are multiples of 16 in use; Triton sees that at a launch
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024}  # bytes one block may use (CUDA programming guide, compute capabilities)


@dataclass(frozen=True)
class Code:
    """Counts of instructions in one kernel."""

    tensor: int  # matrix products on tensor cores
    local: int  # loads and stores of local memory: spilled registers
    shared: int  # bytes
    registers: int
    wide: int
    """Loads and stores of global memory of 16 bytes per thread."""


def machine_code(program: Any, types: dict[str, str], constants: dict[str, Any], arch: int, warps: int, stages: int,
                 folder: Path) -> Code:  # fmt: skip
    """Compile `program` with these argument types ("*bf16", "i32", ...) and read its SASS with the cuobjdump Triton brings."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in program.arg_names}
    aligned = [i for i, (name, kind) in enumerate(signature.items()) if kind[0] == "*" or name.startswith(SIXTEENS)]
    attributes = {(i,): [["tt.divisibility", 16]] for i in aligned}
    source = ASTSource(program, signature=signature, constexprs=constants, attrs=attributes)
    target = GPUTarget("cuda", arch, 32)
    code = triton.compile(source, target=target, options={"num_warps": warps, "num_stages": stages})
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(code.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    read = [
        subprocess.run([tool, f, cubin], capture_output=True, text=True, check=True).stdout for f in ("-sass", "-res-usage")
    ]
    registers = re.search(r"REG:(\d+)", read[1])
    assert registers, read[1]
    found = [len(re.findall(pattern, read[0])) for pattern in (r"\bHG?MMA\b", r"\b(?:LDL|STL)\b", r"\b(?:LDG|STG)\S*\.128\b")]
    return Code(found[0], found[1], code.metadata.shared, int(registers[1]), found[2])
