"""Meaning as a unit vector: any segment or list of segments in, the embedding of its last closing token out.

Each item is a document of its own, as in the contrastive loss: `<doc> segments`, read at the last closing token.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from weft.inference.feed import extend, part_of
from weft.inference.prompts import encode
from weft.tokenizers.bundle import StreamTokenizer

ITEMS = 64
"""Items that are read at once."""


@torch.inference_mode()
def embed(model: Any, tokenizer: StreamTokenizer, items: Sequence[Any]) -> np.ndarray:
    """float32 [n E], rows of length one, in the order of the items."""
    rows = []
    for first in range(0, len(items), ITEMS):
        prompts = [encode(tokenizer, item, "thing to embed") for item in items[first : first + ITEMS]]
        caches = [model.new_cache() for _ in prompts]
        hidden = extend(model, caches, [part_of(prompt.stream) for prompt in prompts])
        # A prompt ends with the closing token of its last segment.
        rows.append(model.embed(torch.stack([states[-1] for states in hidden])).float().cpu().numpy())
    return np.concatenate(rows) if rows else np.zeros((0, model.config.embed_width), np.float32)
