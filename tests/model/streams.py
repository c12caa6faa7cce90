"""Random documents of all six modalities as batches with the tensor names that the model reads."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import Tensor

from weft.model.config import ModelConfig

FEATURES = {"audio": 11, "image": 13, "sensor": 3, "video": 17}
NAMES = ("text", "image", "video", "audio", "sensor", "action")
SLICES = ((0, 31), (31, 50), (50, 61), (61, 78), (78, 91))
SLICE_OF = (0, 1, 1, 2, 3, 4)


def small_config(**changes: object) -> ModelConfig:
    """All parts at sizes that are distinct primes where they may be."""
    sizes: dict[str, object] = {
        "vocab_size": 91,
        "slices": SLICES,
        "feature_sizes": FEATURES,
        "num_channels": 7,
        "width": 40,
        "layers": 4,
        "heads": 6,
        "kv_heads": 2,
        "head_width": 10,
        "experts": 5,
        "experts_per_token": 2,
        "expert_width": 23,
        "shared_width": 19,
        "dense_width": 37,
        "window": 13,
        "full_every": 4,
        "embed_width": 17,
        "base_width": 40,
    }
    return ModelConfig.from_dict({**sizes, **changes})


def document(length: int, seed: int, modality: int | None = None, two_way: bool = True) -> SimpleNamespace:
    """One random document: segments of 3 to 9 tokens, landmarks at their ends, images two-way, positions that grow."""
    g = torch.Generator().manual_seed(seed)
    draw = lambda low, high: int(torch.randint(low, high, (), generator=g))  # noqa: E731
    kind = torch.zeros(length, dtype=torch.int64)
    blocks = torch.full((length,), -1, dtype=torch.int32)
    landmark = torch.zeros(length, dtype=torch.bool)
    landmark[0] = True
    at, block = 1, 0
    while at < length:
        end = min(length, at + draw(3, 10))
        kind[at:end] = draw(0, 6) if modality is None else modality
        if int(kind[at]) in (1, 2) and two_way and end - at > 2:
            blocks[at + 1 : end - 1] = block
            block += 1
        landmark[end - 1] = True
        at = end
    first = torch.tensor([SLICES[s][0] for s in SLICE_OF])[kind]
    last = torch.tensor([SLICES[s][1] for s in SLICE_OF])[kind]
    ids = (first + (torch.rand(length, generator=g) * (last - first)).long()).clamp(min=1)
    position = torch.stack([torch.arange(length), *torch.randint(0, 5, (2, length), generator=g)], 1).int()
    channel = torch.where(kind >= 4, torch.randint(0, 7, (length,), generator=g), 0)
    at_of = {n: torch.nonzero((kind == NAMES.index(n)) & (torch.rand(length, generator=g) < 0.7))[:, 0] for n in FEATURES}
    rows = {n: torch.rand(len(at_of[n]), size, generator=g) for n, size in FEATURES.items()}
    return SimpleNamespace(
        ids=ids, modality=kind, channel=channel, position=position, document=torch.zeros(length, dtype=torch.int32),
        landmark=landmark, two_way=blocks, features=rows, feature_at=at_of,
    )  # fmt: skip


def join(documents: list[SimpleNamespace]) -> SimpleNamespace:
    """Documents side by side: one packed batch."""
    joined: dict[str, object] = {}
    for name in ("ids", "modality", "channel", "position", "landmark"):
        joined[name] = torch.cat([getattr(d, name) for d in documents])
    joined["document"] = torch.cat([torch.full((len(d.ids),), i, dtype=torch.int32) for i, d in enumerate(documents)])
    shifted, shift = [], 0
    for d in documents:
        shifted.append(torch.where(d.two_way >= 0, d.two_way + shift, -1).int())
        shift = max(shift, int(shifted[-1].max()) + 1)
    joined["two_way"] = torch.cat(shifted)
    starts = torch.tensor([0, *(len(d.ids) for d in documents)]).cumsum(0).tolist()
    joined["features"] = {n: torch.cat([d.features[n] for d in documents]) for n in FEATURES}
    joined["feature_at"] = {n: torch.cat([d.feature_at[n] + s for d, s in zip(documents, starts)]) for n in FEATURES}
    return SimpleNamespace(**joined)


def cut(document: SimpleNamespace, first: int, end: int) -> SimpleNamespace:
    """Tokens [first, end) of a document, for streaming."""
    part: dict[str, object] = {
        name: getattr(document, name)[first:end]
        for name in ("ids", "modality", "channel", "position", "document", "landmark", "two_way")
    }
    inside = {n: (at >= first) & (at < end) for n, at in document.feature_at.items()}
    part["features"] = {n: document.features[n][keep] for n, keep in inside.items()}
    part["feature_at"] = {n: document.feature_at[n][keep] - first for n, keep in inside.items()}
    return SimpleNamespace(**part)


def cuts(document: SimpleNamespace, seed: int, most: int = 9) -> list[int]:
    """Random borders 0 .. length that never split a two-way block."""
    g = torch.Generator().manual_seed(seed)
    length, borders = len(document.ids), [0]
    blocks = document.two_way.tolist()
    while borders[-1] < length:
        end = min(length, borders[-1] + int(torch.randint(1, most + 1, (), generator=g)))
        while end < length and blocks[end] >= 0 and blocks[end] == blocks[end - 1]:
            end += 1
        borders.append(end)
    return borders


def to_double(document: SimpleNamespace) -> SimpleNamespace:
    """The same with float64 features."""
    features: dict[str, Tensor] = {n: rows.double() for n, rows in document.features.items()}
    return SimpleNamespace(**{**vars(document), "features": features})
