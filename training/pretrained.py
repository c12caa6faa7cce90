"""Starting from weights on disk: a LLaMA- or Mistral-style trunk, a ViT patch encoder. Safetensors only, nothing is downloaded.

    theirs (transformers' names)                                   ours
    model.embed_tokens.weight, lm_head.weight [Vt D]               embedding.tokens, output: the rows of the text span
    layers.N.input_layernorm, post_attention_layernorm             blocks.N.attention_norm, blocks.N.ffn_norm
    layers.N.self_attn.{q,k,v}_proj [.. D]                         blocks.N.attention.qkv (rows one after the other)
    layers.N.self_attn.o_proj                                      blocks.N.attention.out
    layers.N.mlp.{gate,up}_proj, mlp.down_proj                     blocks.N.ffn.gate_up, blocks.N.ffn.down
    model.norm                                                     norm
    embeddings.patch_embeddings.projection [Dv C p p]              embedding.features.image.proj (or proj.0 with feature_hidden)

Rotary pairs lie in halves (c, c + K/2) on both sides, so nothing is permuted; text moves all three axes together and is
turned as theirs if rope_theta agrees. Routed experts have no counterpart: their down projections start at zero, so a
block begins as its dense original plus nothing. What remains different is QK-norm, which LLaMA lacks: the start is
close to, not equal to, the original function, unless the folder has q_norm and k_norm (Qwen3), which are taken over and
make it equal.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from weft.model.transformer import Transformer


class PretrainedError(ValueError):
    """Weights on disk that do not fit the model."""


def read_folder(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder's `*.safetensors` files."""
    files = sorted(folder.glob("*.safetensors")) if folder.is_dir() else []
    if not files:
        raise PretrainedError(f"{folder} holds no .safetensors files; convert pickled weights first, weft does not read them")
    tensors: dict[str, Tensor] = {}
    for path in files:
        try:
            with safe_open(path, framework="pt") as file:
                tensors.update({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise PretrainedError(f"cannot read {path} ({error}); fetch the file again") from error
    return tensors


@torch.no_grad()
def load_trunk(model: Transformer, folder: Path, text_span: tuple[int, int] | None = None) -> list[str]:
    """Fill the trunk; returns what was done, line by line. Raises `PretrainedError` before anything is changed.

    text_span: ids of the text pieces; the embedding rows are taken over if the file has exactly as many.
    """
    theirs = {name.removeprefix("model."): value for name, value in read_folder(folder).items()}
    planned, lines = _plan_trunk(model, theirs, text_span)
    ours = {**dict(model.named_parameters())}
    for name, value, rows in planned:
        place = ours[name] if rows is None else ours[name][rows[0] : rows[1]]
        if place.shape != value.shape:
            raise PretrainedError(
                f"{folder}: {name} needs shape {tuple(place.shape)}, the file has {tuple(value.shape)}; "
                "set model.sizes (width, layers, heads, kv_heads, head_width, dense_width, shared_width) to the file's"
            )
    for name, value, rows in planned:
        place = ours[name] if rows is None else ours[name][rows[0] : rows[1]]
        place.copy_(value)
    for router in model.routers():
        router.experts.down_proj.zero_()
    return [f"{folder}: {len(planned)} tensors taken over", *lines]


Planned = list[tuple[str, Tensor, tuple[int, int] | None]]


def _plan_trunk(model: Transformer, theirs: dict[str, Tensor], span: tuple[int, int] | None) -> tuple[Planned, list[str]]:
    def take(name: str) -> Tensor:
        if name not in theirs:
            raise PretrainedError(
                f"the trunk folder lacks {name!r}; it must be a LLaMA- or Mistral-style model with {len(model.blocks)} layers"
            )
        return theirs[name].float()

    planned: Planned = [("norm.weight", take("norm.weight"), None)]
    lines = []
    for n, block in enumerate(model.blocks):
        at = f"layers.{n}"
        qkv = torch.cat([take(f"{at}.self_attn.{x}_proj.weight") for x in "qkv"])
        planned += [
            (f"blocks.{n}.attention_norm.weight", take(f"{at}.input_layernorm.weight"), None),
            (f"blocks.{n}.ffn_norm.weight", take(f"{at}.post_attention_layernorm.weight"), None),
            (f"blocks.{n}.attention.qkv.weight", qkv, None),
            (f"blocks.{n}.attention.out.weight", take(f"{at}.self_attn.o_proj.weight"), None),
        ]
        for x in "qk":
            if f"{at}.self_attn.{x}_norm.weight" in theirs:
                planned.append((f"blocks.{n}.attention.{x}_norm", take(f"{at}.self_attn.{x}_norm.weight"), None))
        if block.ffn is not None:
            gate_up = torch.cat([take(f"{at}.mlp.gate_proj.weight"), take(f"{at}.mlp.up_proj.weight")])
            planned.append((f"blocks.{n}.ffn.gate_up.weight", gate_up, None))
            planned.append((f"blocks.{n}.ffn.down.weight", take(f"{at}.mlp.down_proj.weight"), None))
    extra = sum(name.startswith(f"layers.{len(model.blocks)}.") for name in theirs)
    if extra:
        lines.append(f"the file has more than {len(model.blocks)} layers; the rest is left out")
    rows = len(theirs["embed_tokens.weight"]) if "embed_tokens.weight" in theirs else 0
    if span is None or rows != span[1] - span[0]:
        lines.append(
            f"embeddings stay fresh: the file has {rows} rows, the text span {0 if span is None else span[1] - span[0]}"
        )
        return planned, lines
    planned.append(("embedding.tokens.weight", take("embed_tokens.weight"), span))
    if model.output is not None:
        head = "lm_head.weight" if "lm_head.weight" in theirs else "embed_tokens.weight"
        planned.append(("output.weight", take(head), span))
    return planned, lines


@torch.no_grad()
def load_vision(model: Transformer, folder: Path, mean: float = 0.5, std: float = 0.5) -> list[str]:
    """Fill the image feature encoder with a ViT's patch projection; its input normalisation (x - mean) / std is folded in,
    because our pixels lie in [0, 1] and come in the order row, column, channel."""
    theirs = read_folder(folder)
    suffix = "embeddings.patch_embeddings.projection."
    weight = next((value.float() for name, value in theirs.items() if name.endswith(suffix + "weight")), None)
    bias = next((value.float() for name, value in theirs.items() if name.endswith(suffix + "bias")), None)
    if weight is None or weight.dim() != 4:
        raise PretrainedError(f"{folder} has no {suffix}weight of shape [width, channels, patch, patch]; it must be a ViT")
    if "image" not in model.embedding.features:
        raise PretrainedError("the model has no image features; give the run's tokenizer an image tokenizer")
    encoder = model.embedding.features["image"].get_submodule("proj")
    first = encoder if isinstance(encoder, torch.nn.Linear) else encoder.get_submodule("0")
    assert isinstance(first, torch.nn.Linear)
    matrix = weight.permute(0, 2, 3, 1).flatten(1)
    if first.weight.shape != matrix.shape:
        raise PretrainedError(
            f"{folder}: the patch projection is {tuple(matrix.shape)}, the model's {tuple(first.weight.shape)}; "
            f"set the image patch to {weight.size(-1)} and model.sizes.feature_hidden to {weight.size(0)}"
        )
    first.weight.copy_(matrix / std)
    first.bias.copy_((0 if bias is None else bias) - matrix.sum(1) * mean / std)
    return [f"{folder}: patch projection {tuple(weight.shape)} taken over"]
