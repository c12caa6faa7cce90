"""Checkpoints go to a hub and come back, over HTTP, through huggingface_hub's mixin; the hub is a server of this process."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hub_server import Hub

from weft.inference.load import save
from weft.model.hub import HubError, checkpoint, copy_shared, is_hub_id
from weft.model.presets import preset
from weft.model.transformer import Transformer
from weft.tokenizers.bundle import StreamTokenizer
from weft.tokenizers.text import TextTokenizer

pytest.importorskip("huggingface_hub")

SCRIPT = """
import json, sys, torch, weft
from weft.inference.errors import CheckpointError
from weft.model.hub import HubError, fetch, push_to_hub
from weft.model.save import from_pretrained

folder, said = sys.argv[1], {}
said["address"] = push_to_hub(folder, "owner/tiny", commit_message="first")
first, again = weft.load(folder), weft.load("owner/tiny")
said["digest"] = first.digest == again.digest
said["tokens"] = [m.generate("ab", max_tokens=5, min_tokens=5).tokens.tolist() for m in (first, again)]
model = from_pretrained("owner/tiny", revision="main")
said["weights"] = all(torch.equal(a, b) for a, b in zip(model.parameters(), first.model.parameters(), strict=True))
said["files"] = sorted(p.relative_to(fetch("owner/tiny")).as_posix() for p in fetch("owner/tiny").rglob("*") if p.is_file())
for name, load in (("none/such", fetch), ("broken/config", fetch), ("none/such", weft.load)):
    try:
        load(name)
    except (HubError, CheckpointError) as error:
        said[f"{load.__name__} {name}"] = type(error).__name__ + ": " + str(error)
print(json.dumps(said))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tokenizer = StreamTokenizer.build([TextTokenizer.fit(["the quick brown fox", "a seven and a nine"] * 8, 288)])
    words = tokenizer.vocabulary
    sizes = {"vocab_size": len(words), "slices": words.slices, "num_modalities": len(words.modalities), "layers": 2}
    path = save(
        Transformer(preset("tiny", **sizes, width=32, heads=2, head_width=16)), tokenizer, tmp_path_factory.mktemp("run")
    )
    (path / "optimizer.pt").write_bytes(b"not for others")
    return path


def test_a_pushed_checkpoint_is_pulled_and_loads_as_the_same_model(folder: Path, tmp_path: Path) -> None:
    with Hub() as hub:
        hub.put("broken/config", {"config.json": b"[" * 10**5, "model.safetensors": b""})
        hub.put("owner/tiny", {"README.md": b"old", "evil.py": b"1 / 0", "pytorch_model.bin": b"pickle"})
        settings = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path), "HF_TOKEN": hub.token, "HF_HUB_OFFLINE": "0"}
        quiet = {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-c", SCRIPT, str(folder)]
        done = subprocess.run(command, env={**os.environ, **settings, **quiet}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout.splitlines()[-1])
    assert said["address"].startswith(f"{hub.url}/owner/tiny")
    assert said["digest"] and said["weights"] and said["tokens"][0] == said["tokens"][1]
    assert hub.repos["owner/tiny"]["private"] is True
    _, files = hub.files("owner/tiny", "main") or ("", {})
    assert "optimizer.pt" not in files and b"library_name: weft" in files["README.md"]
    sent = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()} - {"optimizer.pt"}
    assert set(said["files"]) == sent | {"README.md"}
    assert all(files[name] == (folder / name).read_bytes() for name in sent)
    assert not [line for line in hub.asked if "evil.py" in line or "pytorch_model" in line]
    assert said["fetch none/such"].startswith("HubError: the hub did not give none/such")
    assert said["fetch broken/config"].startswith("HubError")
    assert said["load none/such"].startswith("CheckpointError") and "none/such" in said["load none/such"]


def test_a_folder_without_a_model_is_not_pushed(tmp_path: Path) -> None:
    with pytest.raises(HubError, match=r"has no config\.json"):
        copy_shared(tmp_path, tmp_path / "out")


def test_saving_a_checkpoint_over_itself_is_refused(folder: Path) -> None:
    with pytest.raises(HubError, match="name another folder"):
        checkpoint(folder).save_pretrained(folder)
    assert (folder / "config.json").is_file()


@pytest.mark.parametrize(
    ("name", "wanted"),
    [("owner/tiny", True), ("runs/a/b", False), ("tiny", False), ("../x", False), ("./x", False), ("a b/c", False)],
)
def test_only_owner_and_name_mean_a_repository(name: str, wanted: bool) -> None:
    assert is_hub_id(name) is wanted
