"""An FSQ auto-encoder over a grid of feature vectors: one vector, one code.

    encode: features [n F] -> per-token MLP -> FSQ -> codes [n]
    decode: codes [h w] -> FSQ grid -> convolutions -> features [h w F]

The encoder sees only its own token: a code describes its own patch or frame, changing a neighbour cannot change it, and a
model that writes codes one by one never has to know patches that it has not written yet. The decoder looks at neighbours.

The encoder computes in float64. A code must not depend on how many tokens are encoded together, and float32 matrix products
do (in the last bits, which rounding can turn into another code). Torch multiplies, not numpy: a data worker has one torch
thread, while numpy would start one per core in every worker.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from weft.tokenizers.files import Arrays, TokenizerError, config_from
from weft.tokenizers.fsq import FSQ

_BLOCK = 1024  # tokens encoded at once: hidden values stay in the cache


@dataclass(frozen=True)
class CodecConfig:
    """Sizes of the auto-encoder."""

    levels: tuple[int, ...] = (8, 5, 5, 5)
    """FSQ levels; their product is the number of codes."""
    encoder_width: int = 128
    """Hidden units of the encoder MLP (two hidden layers)."""
    decoder_width: int = 64
    """Channels of the decoder."""
    decoder_blocks: int = 2
    """Residual 3x3 blocks (1x3 on a grid of height one): how far a patch looks at its neighbours."""

    def __post_init__(self) -> None:
        FSQ(self.levels)
        for name in ("encoder_width", "decoder_width"):
            if not 1 <= getattr(self, name) <= 8192:
                raise TokenizerError(f"codec {name}={getattr(self, name)} must be from 1 to 8192")
        if not 0 <= self.decoder_blocks <= 64:
            raise TokenizerError(f"codec decoder_blocks={self.decoder_blocks} must be from 0 to 64")


class Block(nn.Module):
    """x + conv(relu(conv(relu(x)))) with `kernel` = (rows, columns) of neighbours."""

    def __init__(self, width: int, kernel: tuple[int, int]) -> None:
        super().__init__()
        self.near = nn.Conv2d(width, width, kernel, padding=(kernel[0] // 2, kernel[1] // 2))
        self.mix = nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mix(torch.relu(self.near(torch.relu(x))))


class CodecNet(nn.Module):
    """The trainable part. Features [B h w F] -> (z before rounding [B h w D], reconstruction [B h w F])."""

    def __init__(self, config: CodecConfig, feature_size: int, flat: bool) -> None:
        super().__init__()
        self.fsq = FSQ(config.levels)
        dims, width = len(config.levels), config.encoder_width
        layers = [nn.Linear(feature_size, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, dims)]
        self.encoder = nn.Sequential(*layers)
        kernel = (1, 3) if flat else (3, 3)
        self.enter = nn.Conv2d(dims, config.decoder_width, 1)
        self.blocks = nn.ModuleList([Block(config.decoder_width, kernel) for _ in range(config.decoder_blocks)])
        self.leave = nn.Conv2d(config.decoder_width, feature_size, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.decode(self.fsq.round(self.encoder(x)))

    def decode(self, grid: Tensor) -> Tensor:
        """FSQ values [B h w D] -> normalised features [B h w F]."""
        y = self.enter(grid.permute(0, 3, 1, 2))
        for block in self.blocks:
            y = block(y)
        return self.leave(torch.relu(y)).permute(0, 2, 3, 1)


class Codec:
    """A fitted auto-encoder: features -> codes, codes -> features."""

    def __init__(self, config: CodecConfig, net: CodecNet, mean: float, scale: float, feature_size: int, flat: bool) -> None:
        self.config, self.net = config, net.eval().requires_grad_(False)
        self.mean, self.scale, self.feature_size, self.flat = float(mean), float(scale), feature_size, flat
        self.size = net.fsq.size

    @cached_property
    def _layers(self) -> list[tuple[Tensor, Tensor]]:
        linear = [m for m in self.net.encoder if isinstance(m, nn.Linear)]
        layers = [(m.weight.detach().double().T.contiguous(), m.bias.detach().double()) for m in linear]
        weight, bias = layers[0]  # fold (x - mean) / scale into the first layer
        layers[0] = (weight / self.scale, bias - weight.sum(0) * self.mean / self.scale)
        return layers

    @torch.inference_mode()
    def latent(self, features: np.ndarray) -> np.ndarray:
        """float [n F] -> float64 [n D] before rounding."""
        x = torch.from_numpy(features.astype(np.float64))
        for weight, bias in self._layers[:-1]:
            x = torch.addmm(bias, x, weight).relu_()
        return torch.addmm(self._layers[-1][1], x, self._layers[-1][0]).numpy()

    def encode(self, features: np.ndarray) -> np.ndarray:
        """float32 [n F] -> int64 [n] codes."""
        if features.shape[-1] != self.feature_size:
            raise TokenizerError(f"the codec was fitted on {self.feature_size} features per token, got {features.shape[-1]}")
        blocks = [self.net.fsq.codes(self.latent(features[i : i + _BLOCK])) for i in range(0, len(features), _BLOCK)]
        return blocks[0] if len(blocks) == 1 else np.concatenate([np.zeros(0, np.int64), *blocks])

    @torch.inference_mode()
    def decode(self, codes: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
        """int64 [n] codes on a grid (h, w) -> float32 [n F] features."""
        if not len(codes):
            return np.zeros((0, self.feature_size), np.float32)
        values = torch.from_numpy(self.net.fsq.values(codes.reshape(1, *grid)))
        out = self.net.decode(values) * self.scale + self.mean
        return out.reshape(-1, self.feature_size).numpy().copy()

    def arrays(self) -> Arrays:
        """Everything that was fitted, by name."""
        state = {f"codec.{k}": v.numpy() for k, v in self.net.state_dict().items()}
        return state | {"codec.norm": np.array([self.mean, self.scale], np.float64)}

    @classmethod
    def from_arrays(cls, config: CodecConfig, arrays: Arrays, feature_size: int, flat: bool) -> Codec:
        """What `arrays` returned; shapes must be those that the config implies."""
        net = CodecNet(config, feature_size, flat)
        state = {k.removeprefix("codec."): torch.from_numpy(v.copy()) for k, v in arrays.items() if k.startswith("codec.")}
        norm = state.pop("norm", None)
        if norm is None or norm.shape != (2,):
            raise TokenizerError("the codec's file has no codec.norm of two numbers; fit and save the tokenizer again")
        try:
            net.load_state_dict(state)
        except RuntimeError as error:
            raise TokenizerError(f"the codec's arrays do not fit its config: {error}") from error
        return cls(config, net, norm[0].item(), norm[1].item(), feature_size, flat)


def codec_settings(codec: Codec | None) -> dict[str, Any]:
    """What a tokenizer's JSON says of its codec, beside `Codec.arrays`; nothing where there is none."""
    return {"codec": asdict(codec.config), "flat": codec.flat} if codec else {}


def saved_codec(settings: dict[str, Any], arrays: Arrays, feature_size: int, where: str, flat: bool = False) -> Codec | None:
    """The inverse; `flat` for tokenizers that do not say it because it never changes. `where` is for errors."""
    if "codec" not in settings:
        return None
    config = config_from(CodecConfig, settings["codec"], where)
    return Codec.from_arrays(config, arrays, feature_size, flat or bool(settings.get("flat")))


def encode_all(codec: Codec | None, features: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Codes of every float32 [n F] in one call; without a codec all are -1."""
    if codec is None:
        return [np.full(len(f), -1, np.int64) for f in features]
    if len(features) == 1:
        return [codec.encode(features[0])]
    codes = codec.encode(np.concatenate([np.zeros((0, codec.feature_size), np.float32), *features]))
    return np.split(codes, np.cumsum([len(f) for f in features]))[:-1]
