"""Gradient norms by part of the model, and the one norm that clipping needs, wherever the pieces of a gradient lie.

In: (parameter, piece of its gradient) pairs as this rank holds them. Out: one float64 per part, the sum of squares. Summed
over ranks that hold different pieces and rooted, they are the parts' norms; their sum gives the norm over all parameters, each
expert counted once. So nothing here needs to know what divides a gradient: ZeRO, expert parallelism, or both.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

PARTS = ("embedding", "encoders", "attention", "ffn", "router", "experts", "output", "embed_head")
"""Token, modality and channel tables; feature encoders; attention and its norm; dense and shared feed-forward and its norm; the
router's matrix; routed experts; output matrix and last norm; the head that embeds documents."""
_BY_WORD = (
    ("embedding.features.", "encoders"),
    ("embedding.", "embedding"),
    (".attention", "attention"),
    (".mlp.gate.", "router"),
    (".mlp.experts.", "experts"),
    (".ffn", "ffn"),
    ("embed_head.", "embed_head"),
)


def part_of(name: str) -> str:
    """Which of `PARTS` a parameter belongs to, by its name in `Transformer.named_parameters()`."""
    return next((part for word, part in _BY_WORD if word in name or name.startswith(word)), "output")


class PartNorms:
    """Sums of squares by part over the parameters of one model."""

    def __init__(self, model: nn.Module) -> None:
        self.index = {id(p): PARTS.index(part_of(name)) for name, p in model.named_parameters()}

    def squares(self, pieces: Iterable[tuple[nn.Parameter, Tensor]]) -> Tensor:
        """float64 [PARTS] on the CPU; a not finite piece makes its part not finite."""
        pairs = [(self.index[id(p)], piece) for p, piece in pieces if piece.numel()]
        out = torch.zeros(len(PARTS), dtype=torch.float64)
        if not pairs:
            return out
        norms = torch.stack(torch._foreach_norm([piece for _, piece in pairs])).double().cpu()
        return out.index_add_(0, torch.tensor([part for part, _ in pairs]), norms.square())


def named(squares: Tensor) -> dict[str, float]:
    """Part -> norm, from sums of squares over all ranks; parts without gradient are left out."""
    return {part: value for part, value in zip(PARTS, squares.sqrt().tolist()) if value != 0}
