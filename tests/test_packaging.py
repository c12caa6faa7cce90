"""The wheel holds the modules of the checkout, and nothing of it shadows another distribution."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROOMS = ("tokenizers", "model", "kernels", "training", "inference", "benchmarks")
pytestmark = pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="builds a wheel from a checkout")


@pytest.fixture(scope="module")
def names(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """Files in a wheel built from the checkout."""
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(out), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    (wheel,) = out.glob("*.whl")
    return set(zipfile.ZipFile(wheel).namelist())


def test_the_wheel_holds_every_module_and_data_file_of_the_checkout(names: set[str]) -> None:
    wanted = {f"weft/{p.relative_to(ROOT)}" for room in ROOMS for p in (ROOT / room).rglob("*.py")}
    wanted |= {str(p.relative_to(ROOT)) for p in (ROOT / "weft").glob("*.py")}
    wanted |= {str(p.relative_to(ROOT)) for p in (ROOT / "weft" / "commands").glob("*.py")}
    wanted |= {f"weft/{p.relative_to(ROOT)}" for room in ROOMS for p in (ROOT / room).rglob("*.html")}
    wanted |= {f"weft/{p.relative_to(ROOT)}" for p in (ROOT / "benchmarks" / "harness").rglob("*.yaml")}
    assert not wanted - names, sorted(wanted - names)[:10]


def test_the_wheel_owns_no_name_but_weft(names: set[str]) -> None:
    assert {name.split("/")[0].split("-")[0] for name in names} == {"weft"}
