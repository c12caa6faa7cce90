"""Shapes stated in signatures are checked while tests run."""

from __future__ import annotations

import pytest
import torch
from jaxtyping import TypeCheckError

from weft.model.heads import EmbedHead


def test_a_wrong_shape_is_refused_by_the_signature() -> None:
    head = EmbedHead(8, 3)
    assert head(torch.randn(5, 8)).shape == (5, 3)
    with pytest.raises(TypeCheckError):
        head(torch.randn(5, 2, 8))
