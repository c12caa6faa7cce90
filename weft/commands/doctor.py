"""`weft doctor`: what this machine has, which extras and kernels are usable, and why not."""

from __future__ import annotations

import os
import platform
import shutil
import sys
from importlib import metadata
from importlib.util import find_spec

EXTRAS: dict[str, tuple[str, ...]] = {
    "deepspeed": ("deepspeed",),
    "xformers": ("xformers",),
    "eval": ("lm_eval", "jiwer", "sacrebleu", "rouge_score", "skimage"),
    "control": ("gymnasium",),
    "world": ("sklearn", "espeakng_loader", "gymnasium"),
    "search": ("faiss",),
    "hub": ("huggingface_hub",),
    "track": ("tensorboard",),
    "data": ("webdataset", "pyarrow"),
    "video": ("torchcodec",),
    "test": ("pytest", "hypothesis"),
    "dev": ("ruff", "mypy"),
}
CORE = ("torch", "torchvision", "torchaudio", "einops", "sentencepiece", "safetensors", "numpy", "av", "soundfile", "pillow")


def version(name: str) -> str | None:
    """Installed version of a distribution, None if it is not installed."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def extras() -> dict[str, str]:
    """Extra -> "usable" or the one command that repairs it."""
    report = {}
    for extra, modules in EXTRAS.items():
        missing = [m for m in modules if find_spec(m) is None]
        report[extra] = "usable" if not missing else f"missing {', '.join(missing)}: pip install 'weft[{extra}]'"
    return report


def devices() -> list[str]:
    """CPU and every CUDA device, in words."""
    import torch

    found = [f"cpu: {os.cpu_count()} cores, torch uses {torch.get_num_threads()} threads"]
    if not torch.cuda.is_available():
        found.append("cuda: not available (no NVIDIA driver or no device)")
    for i in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(i)
        found.append(f"cuda:{i}: {about.name}, {about.total_memory / 2**30:.0f} GiB, sm_{about.major}{about.minor}")
    return found


def doctor() -> None:
    """Print versions, devices, extras and attention backends."""
    from rich.console import Console
    from rich.table import Table

    from weft import __version__

    console = Console()
    console.print(f"[bold]weft {__version__}[/] on Python {sys.version.split()[0]}, {platform.platform()}")
    table = Table("package", "version", title="core", title_justify="left")
    for name in CORE:
        table.add_row(name, version(name) or "[red]missing[/]: pip install -c constraints.txt weft")
    console.print(table)
    table = Table("extra", "state", title="extras", title_justify="left")
    for name, state in extras().items():
        table.add_row(name, f"[green]{state}[/]" if state == "usable" else state.replace("[", r"\["))
    console.print(table)
    for line in devices():
        console.print(line)
    console.print(
        f"C++ compiler: {shutil.which('g++') or shutil.which('c++') or 'none'}; nvcc: {shutil.which('nvcc') or 'none'}"
    )
    from weft.commands.kernels import backends_table

    console.print(backends_table())
