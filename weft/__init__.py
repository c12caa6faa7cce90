"""The face: `import weft`. Names are fetched from the rooms when first used, so that importing costs nothing."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_WHERE = {
    "Text": "weft.tokenizers.segment",
    "Image": "weft.tokenizers.segment",
    "Video": "weft.tokenizers.segment",
    "Audio": "weft.tokenizers.segment",
    "Sensor": "weft.tokenizers.segment",
    "Action": "weft.tokenizers.segment",
    "ActionSpace": "weft.tokenizers.segment",
    "Document": "weft.tokenizers.segment",
    "StreamTokenizer": "weft.tokenizers.bundle",
    "ModelConfig": "weft.model.config",
    "Transformer": "weft.model.transformer",
    "RunConfig": "weft.training.config",
    "train": "weft.training.train",
    "load": "weft.inference.load",
    "Generalist": "weft.inference.generalist",
    "Index": "weft.inference.index",
    "Produce": "weft.inference.request",
    "Request": "weft.inference.generate",
    "Sampling": "weft.inference.sampling",
    "SessionSpec": "weft.inference.session",
    "EpisodeSpec": "weft.inference.rollout",
}

__all__ = [
    "Action",
    "ActionSpace",
    "Audio",
    "Document",
    "EpisodeSpec",
    "Generalist",
    "Image",
    "Index",
    "ModelConfig",
    "Produce",
    "Request",
    "RunConfig",
    "Sampling",
    "Sensor",
    "SessionSpec",
    "StreamTokenizer",
    "Text",
    "Transformer",
    "Video",
    "load",
    "train",
    "__version__",
]

if TYPE_CHECKING:
    from weft.inference.generalist import Generalist
    from weft.inference.generate import Request
    from weft.inference.index import Index
    from weft.inference.load import load
    from weft.inference.request import Produce
    from weft.inference.rollout import EpisodeSpec
    from weft.inference.sampling import Sampling
    from weft.inference.session import SessionSpec
    from weft.model.config import ModelConfig
    from weft.model.transformer import Transformer
    from weft.tokenizers.bundle import StreamTokenizer
    from weft.tokenizers.segment import Action, ActionSpace, Audio, Document, Image, Sensor, Text, Video
    from weft.training.config import RunConfig
    from weft.training.train import train


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'weft' has no attribute {name!r}; it offers {', '.join(sorted(_WHERE))}")
    return getattr(import_module(_WHERE[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
