"""The model: a batch of packed tokens in, hidden states, router statistics and monitors out.

In: any object with the tensor names of a batch: `ids modality channel [T]`, `position [T 3]`, `document landmark two_way [T]`,
`features {m: [k F]}`, `feature_at {m: [k]}`. Out: `Output`. Logits are never made for the whole vocabulary: the loss takes
`output_weight` [V D], decoding takes `logits` of one slice.

Single-device plain torch: what must differ in a parallel run is handed in or wrapped around from outside.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from weft.kernels.layout import StreamLayout
from weft.kernels.rotary import Rotary, rope_table
from weft.model import extend as extending
from weft.model.block import Block, RMSNorm
from weft.model.cache import StreamCache
from weft.model.config import ConfigError, ModelConfig
from weft.model.embedding import Embedding
from weft.model.heads import EmbedHead
from weft.model.init import initialize
from weft.model.media import medium_numbers
from weft.model.moe import MoE
from weft.model.router import RouterMeter, RouterStats, shift_bias
from weft.model.rows import stable_linear


@dataclass(frozen=True)
class Output:
    """What one forward returns."""

    hidden: Tensor  # [T D], after the final norm
    router: RouterStats
    monitors: dict[str, Tensor]  # no gradient; residual_rms [], logit_bound [layers]


class Transformer(nn.Module):
    """One trunk for every modality. `config` is the whole of its shape."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = Embedding(config)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.layers))
        self.norm = RMSNorm(config.width, config.norm_eps)
        self.output = None if config.tied else nn.Linear(config.width, config.vocab_size, bias=False)
        self.embed_head = EmbedHead(config.width, config.embed_width)
        if not self.norm.weight.is_meta:
            initialize(self)

    @property
    def layers(self) -> list[Block]:
        """The blocks, by their type."""
        return list(self.blocks)  # type: ignore[arg-type]

    @property
    def output_weight(self) -> Tensor:
        """[V D]: the output matrix, or the embedding matrix if they are tied."""
        return self.embedding.tokens.weight if self.output is None else self.output.weight

    @property
    def device(self) -> torch.device:
        return self.norm.weight.device

    def forward(self, batch: Any, recompute: bool = False) -> Output:
        """One packed batch. `recompute` keeps only each block's input and runs it again in the backward pass."""
        x = self.embedding(batch)
        rotary = self.rotary(batch.position)
        local, full = self.layouts(batch)
        config = self.config
        meter = RouterMeter(batch.modality, batch.ids == config.pad_id, config.num_modalities, max(config.experts, 1))
        for layer, block in enumerate(self.blocks):
            layout = full if config.is_full(layer) else local
            if recompute and torch.is_grad_enabled():
                x, routing = checkpoint(block, x, rotary, layout, use_reentrant=False)
            else:
                x, routing = block(x, rotary, layout)
            if routing is not None:
                meter.add(routing)
        return Output(self.norm(x), meter.stats(), self._monitors(x))

    def layouts(self, batch: Any) -> tuple[StreamLayout, StreamLayout]:
        """Lifetimes for local and for full layers; one object twice where the window spans the longest document."""
        config = self.config
        medium = medium_numbers(batch.modality, batch.landmark, config.last_medium)
        tokens = (batch.document, batch.landmark, batch.two_way)
        full = StreamLayout.build(*tokens, None, medium=medium)
        none_local = all(config.is_full(layer) for layer in range(config.layers))
        if none_local or config.window is None or int((full.document_end - full.document_start).max()) <= config.window:
            return full, full
        local = StreamLayout.build(*tokens, config.window, config.max_landmarks, medium)
        return local, full

    def rotary(self, position: Tensor) -> Rotary:
        """Angles of positions [T 3], shared by all layers."""
        return rope_table(position, self.config.head_width, self.config.rope_theta, self.config.rope_split)

    def logits(self, hidden: Tensor, slice_index: int) -> Tensor:
        """[N D] -> [N slice] over the ids of one output slice; add the slice's first id to an argmax to get an id."""
        if not 0 <= slice_index < len(self.config.slices):
            raise ConfigError(f"output slice {slice_index} does not exist; the model has {len(self.config.slices)}")
        first, end = self.config.slices[slice_index]
        return stable_linear(hidden, self.output_weight[first:end])

    def embed(self, hidden: Tensor) -> Tensor:
        """Closing tokens' hidden states [P D] -> unit vectors [P embed_width]."""
        return self.embed_head(hidden)

    @torch.no_grad()
    def update_router_bias(self, load: Tensor) -> None:
        """After an optimizer step: move each router's selection bias by 0.001 against the load [R M E] (or [R E]), which the
        caller has summed over ranks and micro-steps."""
        routers = self.routers()
        if len(load) != len(routers):
            raise ValueError(f"load speaks of {len(load)} routed layers, the model has {len(routers)}")
        for moe, layer_load in zip(routers, load):
            shift_bias(moe.bias, layer_load.sum(0) if layer_load.dim() == 2 else layer_load)

    def routers(self) -> list[MoE]:
        """The routed layers, in order."""
        return [block.mlp for block in self.layers if block.mlp is not None]

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Refused: see the message. `torch.compile(block)` of a single block gives equal results (tests hold it)."""
        raise NotImplementedError(  # on purpose: whoever asks is told what to compile instead
            "a weft Transformer is not compiled as a whole: layouts and expert counts are read from the data, so every "
            "block with experts falls into pieces that are compiled anew for other counts; compile single blocks with "
            "torch.compile(block) and measure, or leave it: on a CPU weft.kernels.fused joins the same small operations"
        )

    def new_cache(self) -> StreamCache:
        """An empty cache of one document, on the model's device and in its type."""
        return StreamCache(self.config, self.device, self.norm.weight.dtype)

    def extend(self, new: Any, caches: Sequence[StreamCache], lengths: Sequence[int]) -> Tensor:
        """Append tokens to documents and return their hidden states [T D]; see `extend.extend`."""
        return extending.extend(self, new, caches, lengths)

    @torch.no_grad()
    def _monitors(self, x: Tensor) -> dict[str, Tensor]:
        bounds = torch.stack([block.attention.logit_bound() for block in self.layers])
        return {"residual_rms": x.detach().square().mean().sqrt(), "logit_bound": bounds}
