"""Model folders: round trip, and refusal of what is damaged or hostile."""

import json
import struct
from pathlib import Path

import pytest
import streams
import torch

from weft.model.config import ConfigError
from weft.model.save import SaveError, from_pretrained, save_pretrained
from weft.model.transformer import Transformer


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    model = Transformer(streams.small_config(layers=2))
    model.routers()[0].bias.normal_()
    save_pretrained(model, tmp_path)
    return tmp_path


def test_a_saved_model_returns_bit_equal(tmp_path: Path) -> None:
    model = Transformer(streams.small_config(tied=True, resample={"audio": {"tokens": 1, "latents": 1}}))
    model.routers()[0].bias.normal_()
    save_pretrained(model, tmp_path / "deep" / "folder")
    copy = from_pretrained(tmp_path / "deep" / "folder")
    batch = streams.join([streams.document(50, 1)])
    assert copy.config == model.config
    assert torch.equal(copy(batch).hidden, model(batch).hidden)
    assert sorted(p.name for p in (tmp_path / "deep" / "folder").iterdir()) == ["config.json", "model.safetensors"]
    half = from_pretrained(tmp_path / "deep" / "folder", dtype=torch.bfloat16)
    assert half.norm.weight.dtype == torch.bfloat16 and half.routers()[0].bias.dtype == torch.float32


def test_a_loaded_model_trains(folder: Path) -> None:
    model = from_pretrained(folder)
    model(streams.join([streams.document(20, 1)])).hidden.sum().backward()
    assert model.embedding.tokens.weight.grad is not None


def edit(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_a_config_that_does_not_fit_the_weights_is_refused_before_allocation(folder: Path) -> None:
    edit(folder, width=65536, vocab_size=2**26, experts=4096, experts_per_token=2)  # petabytes, if it were built
    with pytest.raises(SaveError, match=r"must be a float tensor of shape"):
        from_pretrained(folder)


@pytest.mark.parametrize(
    "changes", [{"layers": 10**6}, {"heads": 10**9}, {"__class__": "os.system"}, {"model": "other"}, {"slices": [[0, {}]]}]
)
def test_hostile_configs_are_refused(folder: Path, changes: dict[str, object]) -> None:
    edit(folder, **changes)
    with pytest.raises(ConfigError):
        from_pretrained(folder)


@pytest.mark.parametrize("text", ["", "[1]", "{", '{"a":' * 40 + "1" + "}" * 40, "[" * 10**5, " " * (2**20 + 1), "\x00"])
def test_config_files_that_are_no_config_are_refused(folder: Path, text: str) -> None:
    (folder / "config.json").write_text(text)
    with pytest.raises((SaveError, ConfigError)):
        from_pretrained(folder)


def test_damaged_weights_are_refused(folder: Path) -> None:
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    length = struct.unpack("<Q", whole[:8])[0]
    header = json.loads(whole[8 : 8 + length])
    extra = json.dumps({**header, "virus": header["norm.weight"]}).encode()
    lacking = json.dumps({k: v for k, v in header.items() if k != "norm.weight"}).encode()
    for damaged, message in (
        (b"", "header"),
        (b"\xff" * 8, "header"),
        (whole[:-1], "cut short"),
        (whole[: 8 + length // 2], "not JSON"),
        (struct.pack("<Q", len(extra)) + extra + whole[8 + length :], "unknown tensor 'virus'"),
        (struct.pack("<Q", len(lacking)) + lacking + whole[8 + length :], "lacks 'norm.weight'"),
    ):
        path.write_bytes(damaged)
        with pytest.raises(SaveError, match=message):
            from_pretrained(folder)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(SaveError, match=r"config\.json"):
        from_pretrained(tmp_path)


@pytest.mark.parametrize("offsets", [None, [0], [0, 1, 2], ["a", "b"], [True, 2], {"0": 1}, "overlap"])
def test_a_header_that_lies_about_places_is_refused(folder: Path, offsets: object) -> None:
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    length = struct.unpack("<Q", whole[:8])[0]
    header = json.loads(whole[8 : 8 + length])
    if offsets == "overlap":  # two tensors of one size at one place
        offsets = header["norm.weight"]["data_offsets"]
    header["blocks.0.attention_norm.weight"]["data_offsets"] = offsets
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + whole[8 + length :])
    with pytest.raises(SaveError, match="damaged"):
        from_pretrained(folder)
