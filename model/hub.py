"""Checkpoint folders on a hub, through huggingface_hub's own ModelHubMixin.

In: a folder as `save_pretrained` or `weft.inference.load.save` writes it. Out: a repository with the files of `SHARED` and a
model card, and back. What goes over the wire is the folder and not a module: weights, config, tokenizers and the manifest with
their SHA-256 belong together, and the folder is what every loader checks. Only names in `SHARED` are sent or fetched, so that
no optimizer state leaves by accident and no pickle or code arrives.

    checkpoint("runs/quickstart/final").push_to_hub("owner/name", private=True)
    folder = fetch("owner/name", revision="main")
"""

from __future__ import annotations

import functools
import re
import shutil
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

SHARED = ("config.json", "model.safetensors", "manifest.json", "tokenizer/*", "README.md")
TAGS = ["weft", "multimodal", "mixture-of-experts"]


class HubError(OSError):
    """A hub did not take or give a checkpoint: no such repository, no access, no network, or a folder without a model."""


def is_hub_id(name: str | Path) -> bool:
    """Whether a name can only mean a repository: `owner/name`, and no folder here."""
    return bool(re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", str(name))) and not Path(name).exists()


def checkpoint(folder: str | Path) -> Any:
    """The folder as a `ModelHubMixin`, with `push_to_hub(repo_id, private=..., ...)` and `save_pretrained(folder)`."""
    return _mixin()(folder=Path(folder))


def push_to_hub(folder: str | Path, repo: str, private: bool = True, **options: Any) -> str:
    """Send a checkpoint folder to `repo` (owner/name) and return the address of the commit. Needs `weft[hub]` and a login.

    `options`: those of `ModelHubMixin.push_to_hub` (revision as `branch`, `commit_message`, `token`, `create_pr` ...).
    Raises `HubError`.
    """
    mine = checkpoint(folder)
    return _asked(f"take {repo}", lambda: str(mine.push_to_hub(repo, private=private, **options)))


def fetch(repo: str, revision: str | None = None, **options: Any) -> Path:
    """Download a repository's `SHARED` files into the local cache, once per revision, and return the folder.

    `options`: those of `ModelHubMixin.from_pretrained` (`token`, `cache_dir`, `force_download`, `local_files_only`).
    Raises `HubError`.
    """
    folder: Path = _asked(f"give {repo}", lambda: _mixin().from_pretrained(repo, revision=revision, **options).folder)
    return folder


def _asked(what: str, call: Any) -> Any:
    """Whatever goes wrong on the way (HTTP, network, a config that is no JSON) as one kind of error."""
    try:
        return call()
    except HubError:
        raise
    except (OSError, ValueError, RecursionError, AssertionError, KeyError, TypeError, AttributeError) as error:
        reason = (str(error).strip().splitlines() or [""])[0]
        raise HubError(
            f"the hub did not {what} ({type(error).__name__}: {reason}); check the name, the network and `hf auth login`"
        ) from error


@functools.cache
def _mixin() -> Any:
    """The class, made when it is first needed: huggingface_hub is optional."""
    try:
        import huggingface_hub
    except ModuleNotFoundError:
        raise ModuleNotFoundError("the hub needs huggingface_hub: pip install 'weft[hub]'") from None

    class HubCheckpoint(huggingface_hub.ModelHubMixin, library_name="weft", tags=list(TAGS)):  # type: ignore[call-arg]
        """A checkpoint folder that huggingface_hub can send and fetch."""

        def __init__(self, folder: Path) -> None:
            self.folder = folder

        def save_pretrained(self, save_directory: str | Path, **options: Any) -> str | None:
            if Path(save_directory).resolve() == self.folder.resolve():  # the mixin would remove its config.json first
                raise HubError(f"{self.folder} is the checkpoint itself; name another folder")
            said: str | None = super().save_pretrained(save_directory, **options)
            return said

        def _save_pretrained(self, save_directory: Path) -> None:
            copy_shared(self.folder, save_directory)

        @classmethod
        def _from_pretrained(cls, *, model_id: str, **options: Any) -> HubCheckpoint:
            if Path(model_id).is_dir():
                return cls(folder=Path(model_id))
            names = ("revision", "cache_dir", "force_download", "local_files_only", "token")
            chosen = {name: options[name] for name in names if name in options}
            return cls(folder=Path(huggingface_hub.snapshot_download(model_id, allow_patterns=list(SHARED), **chosen)))

    return HubCheckpoint


def copy_shared(source: Path, target: Path) -> None:
    """The files of `SHARED` from one folder to another. Raises `HubError` for a folder without a model."""
    for needed in SHARED[:2]:
        if not (source / needed).is_file():
            raise HubError(f"{source} has no {needed}; a checkpoint folder holds config.json and model.safetensors")
    for path in sorted(source.rglob("*")):
        name = path.relative_to(source).as_posix()
        if path.is_file() and any(fnmatch(name, pattern) for pattern in SHARED):
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target / name)
