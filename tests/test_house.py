"""The laws of the house: who may import whom, no circles, nothing shadowed, nothing heavy where it must not be."""

from __future__ import annotations

import ast
import functools
import subprocess
import sys
from pathlib import Path

import pytest

import weft

ROOT = Path(__file__).parent.parent
ROOMS = ("tokenizers", "model", "kernels", "training", "inference", "benchmarks")
MAY = {
    "kernels": {"kernels"},
    "tokenizers": {"tokenizers"},
    "model": {"model", "kernels"},
    "inference": {"inference", "model", "tokenizers"},
    "training": {"training", "model", "tokenizers", "kernels"},
    "benchmarks": {"benchmarks", "inference", "training", "kernels", "tokenizers", "model"},
}
ONE_FILE = {"deepspeed": ("training/deepspeed_engine.py",)}
checkout = pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="reads the source tree of a checkout")


def sources() -> list[Path]:
    return [p for room in ROOMS for p in sorted((ROOT / room).rglob("*.py"))]


@functools.cache
def imports(path: Path) -> frozenset[str]:
    """Absolute module names that a file imports, at any depth, type-only ones included."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: relative import"
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return frozenset(found)


def module(path: Path) -> str:
    return "weft." + ".".join(path.relative_to(ROOT).with_suffix("").parts)


@checkout
def test_rooms_import_only_whom_they_may() -> None:
    wrong = []
    for path in sources():
        room = path.relative_to(ROOT).parts[0]
        for name in imports(path):
            parts = name.split(".")
            if parts[0] == "weft" and (len(parts) < 2 or parts[1] not in MAY[room]):
                wrong.append(f"{path.relative_to(ROOT)} imports {name}")
    assert not wrong, wrong


@checkout
def test_no_circle_between_files() -> None:
    graph = {module(p): set() for p in sources()}
    for path in sources():
        graph[module(path)] = {name for name in imports(path) if name in graph and name != module(path)}
    done: set[str] = set()

    def visit(node: str, trail: tuple[str, ...]) -> None:
        assert node not in trail, f"circle: {' -> '.join((*trail, node))}"
        if node not in done:
            for other in graph[node]:
                visit(other, (*trail, node))
            done.add(node)

    for node in graph:
        visit(node, ())


@checkout
def test_deepspeed_and_process_groups_stay_in_training() -> None:
    for path in sources():
        where = str(path.relative_to(ROOT))
        for name in imports(path):
            assert name.split(".")[0] != "deepspeed" or where in ONE_FILE["deepspeed"], f"{where} imports deepspeed"
            assert not name.startswith("torch.distributed") or where.startswith("training/"), f"{where} imports {name}"


@checkout
def test_mapped_folders_have_no_init() -> None:
    assert not [room for room in ROOMS if (ROOT / room / "__init__.py").exists()]


@checkout
def test_hugging_face_tokenizers_import_from_the_root() -> None:
    code = "import tokenizers; print(tokenizers.Tokenizer.__module__)"
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert "No module named 'tokenizers.Tokenizer'" not in out.stderr
    assert out.returncode == 0, out.stderr


def test_nothing_unpickles() -> None:
    banned = ("pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal")
    for path in sources():
        for name in imports(path):
            assert name.split(".")[0] not in banned, f"{path} imports {name}"
        text = path.read_text()
        if path.name != "deepspeed_engine.py":
            assert "torch.load(" not in text, f"{path} uses torch.load"
        assert "yaml.load(" not in text and "trust_remote_code=True" not in text, path


def test_every_public_name_resolves() -> None:
    for name in weft.__all__:
        assert getattr(weft, name) is not None
