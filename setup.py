"""Packaging: each top-level folder becomes `weft.<folder>` (see docs/decisions.md and the note on symlinks in weft/).

The CUDA kernels are compiled along only where that can help and cannot hurt: WEFT_CUDA=1 asks for it (a failure is an error),
WEFT_CUDA=0 forbids it, and by default it happens for a normal (not editable) install where torch, a CUDA toolkit and an NVIDIA
GPU are all found; a failure is then a message. pip's build isolation hides torch, so it also takes --no-build-isolation.
"""

import importlib.util
import os
from pathlib import Path

from setuptools import Distribution, find_namespace_packages, setup
from setuptools.command.build_py import build_py

ROOMS = ("tokenizers", "model", "kernels", "training", "inference", "benchmarks")
HERE = Path(__file__).resolve().parent


def packages() -> dict[str, str]:
    """Package name -> folder, for the face, every room and every sub-package of a room."""
    found = {"weft": "weft", "weft.commands": "weft/commands"}
    for room in ROOMS:
        found[f"weft.{room}"] = room
        for sub in find_namespace_packages(where=room):
            if "__pycache__" not in sub:
                found[f"weft.{room}.{sub}"] = f"{room}/{sub.replace('.', '/')}"
    return found


def cuda_wanted() -> bool:
    """Whether the kernels should be compiled; cheap, and false unless something says otherwise."""
    asked = os.environ.get("WEFT_CUDA")
    if asked in ("0", "1"):
        return asked == "1"
    return Path("/dev/nvidia0").exists() and importlib.util.find_spec("torch") is not None


class BuildWithKernels(build_py):
    """build_py, and then the shared object of the CUDA kernels beside their sources."""

    def run(self) -> None:
        super().run()
        forced = os.environ.get("WEFT_CUDA") == "1"
        if not cuda_wanted() or (self.editable_mode and not forced):
            return
        try:
            spec = importlib.util.spec_from_file_location("weft_cuda_build", HERE / "kernels" / "cuda_library.py")
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            folder = HERE / "kernels" if self.editable_mode else Path(self.build_lib) / "weft" / "kernels"
            module.build(folder / "csrc" / module.LIBRARY)
        except (ImportError, OSError) as error:
            if forced:
                raise
            print(f"weft's CUDA kernels were not compiled ({error}); `weft kernels build` can do it later")


class MaybeBinary(Distribution):
    """A wheel that holds the shared object is no wheel for every machine."""

    def has_ext_modules(self) -> bool:
        return cuda_wanted()


MAP = packages()

setup(
    packages=list(MAP),
    package_dir=MAP,
    package_data={name: ["*.json", "*.yaml", "*.html", "*.css", "*.js", "*.cu", "*.cuh", "*.cpp", "*.h"] for name in MAP},
    cmdclass={"build_py": BuildWithKernels},
    distclass=MaybeBinary,
)
