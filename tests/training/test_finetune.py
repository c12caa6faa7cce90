"""Starting from given weights, training a part of them, and handing the result to inference."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.training import runs
from tests.training.synthetic import small_model
from weft.model.save import from_pretrained
from weft.training.checkpoint import CheckpointError, verify
from weft.training.export import export
from weft.training.finetune import FinetuneConfig, apply
from weft.training.pretrained import PretrainedError, load_trunk, load_vision


def test_frozen_parts_keep_their_bits_and_others_move(tmp_path):
    before = small_model().state_dict()
    runs.go(
        runs.config(tmp_path, max_steps=3, finetune={"freeze": ["embedding.*", "blocks.0.*"], "train": ["*.attention.out.*"]})
    )
    after = load_file(tmp_path / "final" / "model.safetensors")
    for name, value in before.items():
        frozen = name.startswith(("embedding.", "blocks.0.")) and ".attention.out." not in name
        assert torch.equal(after[name], value) == frozen or name.endswith(("log_scale", "embed_head.proj.weight")), name


LORA = {"lora": ["blocks.*.attention.*.weight", "blocks.*.experts.*"], "rank": 2, "alpha": 4.0}


def test_lora_starts_at_the_given_model_and_merges_into_plain_weights(tmp_path):
    plain, adapted = small_model(), small_model()
    names = apply(adapted, FinetuneConfig(**{**LORA, "lora": tuple(LORA["lora"])}))
    assert sum(".experts." in n for n in names) == 2
    assert torch.equal(adapted.blocks[1].mlp.experts.down_proj, plain.blocks[1].mlp.experts.down_proj)
    trainable = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    assert 0 < trainable < 0.3 * sum(p.numel() for p in plain.parameters())

    model = small_model()
    result = runs.go(runs.config(tmp_path / "run", max_steps=4, finetune=LORA), model=model)
    merged = from_pretrained(tmp_path / "run" / "final")
    expected = model.blocks[1].mlp.experts.down_proj
    assert torch.allclose(merged.blocks[1].mlp.experts.down_proj, expected, atol=1e-7)
    assert not torch.equal(merged.blocks[1].mlp.experts.down_proj, plain.blocks[1].mlp.experts.down_proj)
    assert torch.equal(merged.norm.weight, plain.norm.weight)
    assert result.steps == 4


def test_a_killed_lora_run_resumes_exactly(tmp_path):
    for name, stops in (("whole", [6]), ("parts", [3, 6])):
        for steps in stops:
            runs.go(runs.config(tmp_path / name, max_steps=steps, finetune=LORA, schedule={"kind": "constant"}))
    whole, parts = (
        load_file(tmp_path / n / "checkpoints" / "step-00000006" / "adapted.safetensors") for n in ("whole", "parts")
    )
    assert all(torch.equal(whole[k], parts[k]) for k in whole)


def test_a_pattern_that_fits_nothing_is_named():
    with pytest.raises(ValueError, match=r"finetune\.freeze pattern 'embeding\.\*' fits no parameter"):
        apply(small_model(), FinetuneConfig(freeze=("embeding.*",)))


def test_export_is_loadable_sealed_and_can_change_type(tmp_path):
    runs.go(runs.config(tmp_path / "run", max_steps=3, checkpoint={"ema": 0.5}))
    out = export(tmp_path / "run", tmp_path / "out")
    verify(out)
    assert sorted(p.name for p in out.iterdir()) == ["config.json", "manifest.json", "model.safetensors"]
    model = from_pretrained(out)
    assert torch.equal(
        model.norm.weight, load_file(tmp_path / "run/checkpoints/step-00000003/model.safetensors")["norm.weight"]
    )
    half = load_file(export(tmp_path / "run", tmp_path / "half", dtype="bf16", average=True) / "model.safetensors")
    assert half["norm.weight"].dtype == torch.bfloat16
    assert half["blocks.1.mlp.bias"].dtype == torch.float32
    with pytest.raises(FileExistsError, match="choose another folder"):
        export(tmp_path / "run", tmp_path / "out")
    with pytest.raises(CheckpointError, match="neither a sealed model nor a valid checkpoint"):
        export(tmp_path, tmp_path / "x")


def test_the_exported_average_of_a_lora_run_is_what_its_final_folder_holds(tmp_path):
    runs.go(runs.config(tmp_path / "run", max_steps=4, finetune=LORA, checkpoint={"ema": 0.9, "every": 2}))
    found = load_file(export(tmp_path / "run", tmp_path / "out", average=True) / "model.safetensors")
    final = load_file(tmp_path / "run" / "final" / "model.safetensors")
    assert found.keys() == final.keys() and all(torch.equal(found[name], final[name]) for name in final)
    plain = load_file(export(tmp_path / "run", tmp_path / "plain") / "model.safetensors")
    assert not torch.equal(plain["blocks.1.mlp.experts.down_proj"], final["blocks.1.mlp.experts.down_proj"])


# ---- weights of others -------------------------------------------------------------------------------------------------------


def llama(folder: Path, width=24, layers=2, inner=40, vocab=53, norms=False) -> dict[str, torch.Tensor]:
    """Random weights in the layout of transformers' LlamaForCausalLM (or Qwen3 with `norms`)."""
    g = torch.Generator().manual_seed(3)
    draw = lambda *shape: torch.randn(*shape, generator=g) * 0.05  # noqa: E731
    tensors = {
        "model.embed_tokens.weight": draw(vocab, width),
        "lm_head.weight": draw(vocab, width),
        "model.norm.weight": 1 + draw(width),
    }
    for n in range(layers):
        at = f"model.layers.{n}"
        tensors |= {f"{at}.self_attn.q_proj.weight": draw(24, width), f"{at}.self_attn.o_proj.weight": draw(width, 24)}
        tensors |= {f"{at}.self_attn.{x}_proj.weight": draw(12, width) for x in "kv"}
        tensors |= {f"{at}.mlp.{x}_proj.weight": draw(inner, width) for x in ("gate", "up")}
        tensors |= {f"{at}.mlp.down_proj.weight": draw(width, inner)}
        tensors |= {f"{at}.{x}_layernorm.weight": 1 + draw(width) for x in ("input", "post_attention")}
        if norms:
            tensors |= {f"{at}.self_attn.{x}_norm.weight": 1 + draw(12) for x in "qk"}
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    return tensors


def reference(tensors: dict[str, torch.Tensor], ids: torch.Tensor) -> torch.Tensor:
    """A plain Qwen3-style forward in the layout of the file: logits over its own vocabulary."""
    rms = lambda x, w: x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * w  # noqa: E731
    x = tensors["model.embed_tokens.weight"][ids]
    angle = torch.arange(len(ids))[:, None] * 10000.0 ** (-2 * torch.arange(6) / 12)
    cos, sin = angle.cos()[:, None], angle.sin()[:, None]

    def turn(y):
        a, b = y.chunk(2, -1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)

    for n in range(2):
        w = lambda name, n=n: tensors[f"model.layers.{n}.{name}.weight"]  # noqa: E731
        h = rms(x, w("input_layernorm"))
        q = turn(rms((h @ w("self_attn.q_proj").T).view(-1, 2, 12), w("self_attn.q_norm")))
        k = turn(rms((h @ w("self_attn.k_proj").T).view(-1, 1, 12), w("self_attn.k_norm")))
        v = (h @ w("self_attn.v_proj").T).view(-1, 1, 12)
        score = torch.einsum("qhd,kgd->hqk", q, k) / 12**0.5
        score = score.masked_fill(torch.triu(torch.ones(len(ids), len(ids), dtype=torch.bool), 1), float("-inf"))
        mixed = torch.einsum("hqk,kgd->qhd", score.softmax(-1), v).flatten(1)
        x = x + mixed @ w("self_attn.o_proj").T
        h = rms(x, w("post_attention_layernorm"))
        x = x + (torch.nn.functional.silu(h @ w("mlp.gate_proj").T) * (h @ w("mlp.up_proj").T)) @ w("mlp.down_proj").T
    return rms(x, tensors["model.norm.weight"]) @ tensors["lm_head.weight"].T


def test_a_trunk_with_qk_norm_computes_what_it_computed_before(tmp_path):
    from tests.training.synthetic import VOCABULARY, stream
    from weft.tokenizers.pack import collate

    tensors = llama(tmp_path / "llama", norms=True)
    model = small_model(shared_width=40, window=None)
    span = VOCABULARY.spans["text"]
    lines = load_trunk(model, tmp_path / "llama", span)
    assert "tensors taken over" in lines[0]
    with torch.no_grad():
        model.embedding.modality.weight.zero_()
        model.embedding.channel.weight.zero_()
    batch = collate([stream([("text", True)], 1, size=9)])
    ids = torch.randint(0, 53, (len(batch.ids),), generator=torch.Generator().manual_seed(1))
    from dataclasses import replace

    hidden = model(replace(batch, ids=ids + span[0])).hidden
    ours = hidden @ model.output_weight[span[0] : span[1]].T
    assert torch.allclose(ours, reference(tensors, ids), atol=1e-4)


@pytest.mark.parametrize("change", [{"width": 20}, {"layers": 1}, {"inner": 36}])
def test_a_trunk_that_does_not_fit_changes_nothing(tmp_path, change):
    llama(tmp_path / "llama", **change)
    model = small_model(shared_width=40)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(PretrainedError, match=r"set model\.sizes|lacks"):
        load_trunk(model, tmp_path / "llama")
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_a_vit_projection_gives_the_same_patch_embeddings(tmp_path):
    conv = torch.nn.Conv2d(3, 24, 2, 2)
    (tmp_path / "vit").mkdir()
    prefix = "vit.embeddings.patch_embeddings.projection."
    save_file({prefix + k: v.detach().clone() for k, v in conv.state_dict().items()}, tmp_path / "vit" / "model.safetensors")
    model = small_model()
    load_vision(model, tmp_path / "vit")
    picture = torch.rand(2, 2, 3)
    expected = conv(((picture - 0.5) / 0.5).permute(2, 0, 1)[None]).flatten()
    assert torch.allclose(model.embedding.features["image"].proj(picture.reshape(1, -1))[0], expected, atol=1e-5)
    with pytest.raises(PretrainedError, match="feature_hidden"):
        load_vision(small_model(width=36, base_width=36), tmp_path / "vit")


def test_pickled_weights_are_not_read(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04")
    with pytest.raises(PretrainedError, match=r"no \.safetensors files"):
        load_trunk(small_model(), tmp_path)
