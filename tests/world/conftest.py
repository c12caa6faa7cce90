"""One small world for all tests of this folder."""

from pathlib import Path

import pytest

from weft.benchmarks.world.build import build_world

SCALE = 0.02


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A world of two percent, built once."""
    return build_world(tmp_path_factory.mktemp("world"), scale=SCALE)
