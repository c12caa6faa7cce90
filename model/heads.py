"""What leaves the trunk: logits of one output slice, and a document's embedding.

In: hidden states after the final norm [N D]. Out: logits [N slice], or unit vectors [P embed_width]. Both run on empty slices.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from weft.model.rows import stable_linear


class EmbedHead(nn.Module):
    """Projects closing tokens onto the unit sphere; the temperature is learned as CLIP's (arXiv 2103.00020, section 2.5)."""

    def __init__(self, width: int, embed_width: int) -> None:
        super().__init__()
        self.proj = nn.Linear(width, embed_width, bias=False)
        self.log_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def forward(self, hidden: Float[Tensor, "P D"]) -> Float[Tensor, "P embed_width"]:
        """[P D] -> [P embed_width], each row of length one, in float32 or wider."""
        x = stable_linear(hidden, self.proj.weight)
        return F.normalize(x.to(torch.promote_types(x.dtype, torch.float32)), dim=-1)

    @property
    def scale(self) -> Float[Tensor, ""]:
        """1 / temperature, at most 100 (CLIP's clip against instability)."""
        return self.log_scale.reshape(()).exp().clamp(max=100.0)  # an engine may keep it as a row of one number
