"""Random streams for the kernel tests, and the attention mask written down from first principles."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Draw:
    """The tensors that describe a packed stream."""

    document: Tensor
    landmark: Tensor
    two_way: Tensor
    medium: Tensor


def draw(seed: int, lengths: list[int], landmarks: float = 0.15, blocks: float = 0.5, longest: int = 9) -> Draw:
    """Documents of these lengths with landmarks anywhere, two-way blocks of up to `longest` tokens, and media around them."""
    rng = np.random.default_rng(seed)
    total = sum(lengths)
    document = np.repeat(np.arange(len(lengths)), lengths)
    two_way, medium = np.full(total, -1), np.full(total, -1)
    at, number = 0, 0
    for length in lengths:
        end = at + length
        while at < end:
            size = min(int(rng.integers(1, longest + 1)), end - at)
            if rng.random() < blocks:
                number += 1
                two_way[at : at + size] = number if rng.random() < 0.7 else -1
                medium[max(at - int(rng.integers(0, 2)), end - length) : at + size] = number
            at += size
    landmark = rng.random(total) < landmarks
    as_int = [torch.from_numpy(x.astype(np.int32)) for x in (document, two_way, medium)]
    return Draw(as_int[0], torch.from_numpy(landmark), as_int[1], as_int[2])


def first_principles(
    stream: Draw, window: int | None, max_landmarks: int | None = None, last_medium: bool = False
) -> np.ndarray:
    """bool [T queries, T keys], one pair at a time, from the words of the design and from nothing in `kernels/`."""
    document, landmark, two_way = (x.tolist() for x in (stream.document, stream.landmark, stream.two_way))
    medium = stream.medium.tolist() if last_medium else [-1] * len(document)
    total = len(document)
    mask = np.zeros((total, total), bool)

    def exists(key: int, query: int) -> bool:
        together = two_way[key] >= 0 and two_way[key] == two_way[query]
        return document[key] == document[query] and (together or key <= query)

    for query in range(total):
        for key in range(total):
            if not exists(key, query):
                continue
            together = two_way[key] >= 0 and two_way[key] == two_way[query]
            near = window is None or query - key < window
            later = sum(landmark[other] and exists(other, query) for other in range(key + 1, total))
            kept = landmark[key] and (max_landmarks is None or later < max_landmarks)
            followed = medium[key] >= 0 and any(
                medium[other] >= 0 and medium[other] != medium[key] and document[other] == document[key]
                for other in range(key + 1, query + 1)
            )
            mask[query, key] = together or ((near or kept) and not followed)
    return mask
