"""What a caller can do wrong, one small class each. Every message says what was found, what is needed and how to repair it."""

from __future__ import annotations


class PromptError(ValueError):
    """The prompt is empty, too long, or holds something that no tokenizer of this model reads."""


class ProduceError(ValueError):
    """What shall be produced is unknown, or this model has no way to produce it."""


class SamplingError(ValueError):
    """A sampling option is out of its range."""


class SpaceError(ValueError):
    """An action space is of a kind that the model cannot act in, or an action is not legal in it."""


class CheckpointError(OSError):
    """A folder is not a checkpoint, or its parts do not belong together."""


class SearchError(ValueError):
    """Keys, vectors, payloads or numbers that a search index cannot take."""


class IndexFileError(OSError):
    """A search index on disk is missing, torn, or of another model."""


class IndexServerError(OSError):
    """A search server does not answer, lacks pgvector, or holds another model's index under this name."""


class SessionError(ValueError):
    """A session is used in a way its spec or its time line does not allow."""


class SessionFileError(OSError):
    """A saved session on disk is missing, torn, or of another model."""
