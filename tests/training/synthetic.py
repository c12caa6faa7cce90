"""Small valid streams and models for tests of the loop: every modality, observed or learnt, from a seed."""

from __future__ import annotations

import numpy as np

from weft.model.config import ModelConfig
from weft.model.transformer import Transformer
from weft.tokenizers.pack import Batch, collate
from weft.tokenizers.stream import NO_TIME, Stream
from weft.tokenizers.vocabulary import MODALITIES, SLICE_OF, Vocabulary

VOCABULARY = Vocabulary(text=53, image=31, audio=29, sensor=23, discrete=5, bins=7, numbers=16)
FEATURES = {"image": 12, "audio": 7, "sensor": 3}
SPAN = {"text": "text", "image": "image", "video": "image", "audio": "audio", "sensor": "sensor", "action": "bins"}


def small_config(**sizes: object) -> ModelConfig:
    """A model of a few thousand weights with routed experts in its second block."""
    given = {
        "vocab_size": len(VOCABULARY),
        "slices": VOCABULARY.slices,
        "feature_sizes": FEATURES,
        "num_channels": 5,
        "width": 24,
        "layers": 2,
        "heads": 2,
        "kv_heads": 1,
        "head_width": 12,
        "experts": 3,
        "experts_per_token": 1,
        "expert_width": 16,
        "shared_width": 16,
        "dense_width": 40,
        "window": 16,
        "full_every": 2,
        "embed_width": 8,
        "base_width": 24,
    }
    return ModelConfig.from_dict({**given, **sizes})


def small_model(seed: int = 0, **sizes: object) -> Transformer:
    """The same weights for the same seed."""
    import torch

    state = torch.get_rng_state()
    torch.manual_seed(seed)
    model = Transformer(small_config(**sizes))
    torch.set_rng_state(state)
    return model


def stream(pieces: list[tuple[str, bool]], seed: int, size: int = 5, pair: str | None = None) -> Stream:
    """One document of (modality, learnt) pieces; an observed piece carries features where the modality has them."""
    rng = np.random.default_rng(seed)
    special, spans = VOCABULARY.special, VOCABULARY.spans
    rows: list[tuple[int, int, int, float, bool, int]] = [(special["<doc>"], 0, 0, 0.0, True, -1)]
    features: dict[str, list[np.ndarray]] = {name: [] for name in FEATURES}
    feature_at: dict[str, list[int]] = {name: [] for name in FEATURES}
    for i, (name, learnt) in enumerate(pieces):
        m, part = MODALITIES.index(name), SLICE_OF[name]
        first, end = spans[SPAN[name]]
        if name != "text":
            rows.append((special[f"<{name}>"], m, 0, 0.0, False, i))
        for _ in range(size):
            if not learnt and name in FEATURES:
                feature_at[name].append(len(rows))
                features[name].append(rng.random(FEATURES[name], dtype=np.float32))
            rows.append((int(rng.integers(first, end)), m, part, float(learnt), False, i))
        rows.append((special[f"</{name}>"], m, part, float(learnt), True, i))
    ids, modality, part_of, weight, landmark, segment = (np.array(column) for column in zip(*rows))
    n = len(rows)
    return Stream(
        ids=ids.astype(np.int64),
        modality=modality.astype(np.int64),
        position=np.repeat(np.arange(n, dtype=np.int32)[:, None], 3, axis=1),
        time=np.full(n, NO_TIME),
        channel=np.zeros(n, np.int64),
        segment=segment.astype(np.int64),
        landmark=landmark.astype(bool),
        two_way=np.full(n, -1, np.int32),
        output_slice=part_of.astype(np.int64),
        weight=weight.astype(np.float32),
        features={k: np.stack(v) for k, v in features.items() if v},
        feature_at={k: np.array(v, np.int64) for k, v in feature_at.items() if v},
        pair=pair,
    )


def mixed_streams(count: int, seed: int = 0) -> list[Stream]:
    """Documents that walk through all modalities, each once observed and once learnt."""
    out = []
    for i in range(count):
        first, second = MODALITIES[i % 6], MODALITIES[(i * 5 + 2) % 6]
        out.append(stream([(first, False), (second, True), ("text", True)], seed * 1000 + i, size=3 + i % 4))
    return out


def batch(pieces: list[tuple[str, bool]], seed: int, rows: int = 2, length: int = 32, pair: str | None = None) -> Batch:
    """`rows` documents of the same shape, one per row."""
    streams = [stream(pieces, seed * 100 + r, pair=pair) for r in range(rows)]
    return collate([[s] for s in streams], length, FEATURES)
