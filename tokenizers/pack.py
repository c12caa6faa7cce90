"""Streams side by side in rows of fixed length: what the model and the loss read."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """B rows of L tokens, flattened to T = B * L. Documents never cross a row; the model never sees rows.

    `target[i]` is the token that position i predicts: the next token of the same document.
    """

    ids: Tensor  # int64 [T]
    modality: Tensor  # int64 [T]
    channel: Tensor  # int64 [T]
    position: Tensor  # int32 [T 3]
    document: Tensor  # int32 [T], grows from 0 along the batch; padding is a document of its own per row
    landmark: Tensor  # bool [T]
    two_way: Tensor  # int32 [T], block number unique in the batch, or -1
    features: dict[str, Tensor]  # modality -> float32 [k F]; every modality with features has an entry, maybe k = 0
    feature_at: dict[str, Tensor]  # modality -> int64 [k], indices into T
    target: Tensor  # int64 [T], 0 where there is none
    target_modality: Tensor  # int64 [T]
    target_slice: Tensor  # int64 [T]
    weight: Tensor  # float32 [T], 0 where nothing is learnt
    embed_at: Tensor  # int64 [P], closing tokens of the documents that carry a pair key
    embed_pair: Tensor  # int64 [P], equal numbers are positives
    rows: int
    """B."""
