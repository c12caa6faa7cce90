"""Packaging: each top-level folder becomes `weft.<folder>` (see docs/decisions.md and the note on symlinks in weft/)."""

from setuptools import find_namespace_packages, setup

ROOMS = ("tokenizers", "model", "kernels", "training", "inference", "benchmarks")


def packages() -> dict[str, str]:
    """Package name -> folder, for the face, every room and every sub-package of a room."""
    found = {"weft": "weft"}
    for room in ROOMS:
        found[f"weft.{room}"] = room
        for sub in find_namespace_packages(where=room):
            if "__pycache__" not in sub:
                found[f"weft.{room}.{sub}"] = f"{room}/{sub.replace('.', '/')}"
    return found


MAP = packages()

setup(
    packages=list(MAP),
    package_dir=MAP,
    package_data={name: ["*.json", "*.yaml", "*.html", "*.css", "*.js", "*.cu", "*.cuh", "*.cpp", "*.h"] for name in MAP},
)
