"""What a config says about a model against the model itself."""

import pytest
import streams
import torch
from torch.utils.flop_counter import FlopCounterMode

from weft.model.config import ModelConfig
from weft.model.count import active_params, buffer_shapes, flops_per_token, memory, num_params, param_shapes
from weft.model.presets import PRESETS, preset
from weft.model.transformer import Transformer

VARIANTS = [
    {},
    {"tied": True, "experts": 0, "feature_hidden": 31},
    {
        "experts": 1,
        "experts_per_token": 1,
        "shared_width": 0,
        "feature_sizes": {"audio": 22, "image": 13},
        "resample": {"audio": {"tokens": 6, "latents": 3}},
    },
]


@pytest.mark.parametrize("changes", VARIANTS)
def test_names_and_shapes_follow_from_the_config(changes: dict[str, object]) -> None:
    config = streams.small_config(**changes)
    model = Transformer(config)
    assert list(param_shapes(config).items()) == [(name, tuple(p.shape)) for name, p in model.named_parameters()]
    assert buffer_shapes(config) == {name: tuple(b.shape) for name, b in model.named_buffers()}
    assert num_params(config) == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("name", list(PRESETS))
def test_presets_build_as_counted(name: str) -> None:
    config = preset(name, vocab_size=65536, feature_sizes={"image": 768, "audio": 320})
    with torch.device("meta"):
        model = Transformer(config)
    assert num_params(config) == sum(p.numel() for p in model.parameters())
    assert active_params(config) < num_params(config)
    assert ModelConfig.from_dict(config.to_dict()) == config


def test_active_parameters_are_those_that_a_token_touches() -> None:
    config = streams.small_config(feature_sizes={}, num_channels=1, num_modalities=1)
    model = Transformer(config)
    document = streams.document(1, 3, modality=0)
    document.features, document.feature_at = {}, {}
    output = model(document)
    (output.hidden.sum() + output.router.z_loss).backward()
    idle = 0
    for moe in model.routers():
        for weight in moe.experts.parameters():
            assert weight.grad is not None
            idle += sum(int(not g.any()) * g.numel() for g in weight.grad)
    assert num_params(config) - idle == active_params(config)


def test_flops_equal_the_counter_of_torch() -> None:
    model = Transformer(streams.small_config(feature_sizes={}, window=None))
    document = streams.document(48, 3, modality=0)
    document.features, document.feature_at = {}, {}
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        hidden = model(document).hidden
        model.logits(hidden, 1)
    flops = flops_per_token(model.config, slice_size=19)
    counts = counter.get_flop_counts()["Global"]
    linear = sum(n for op, n in counts.items() if str(op) in ("aten.mm", "aten.addmm"))
    statistics = 2 * 48 * 5 * 3  # the mean score of each expert, in three routed layers
    assert linear - statistics == 48 * (flops.forward - flops.attention_scores)


@pytest.mark.parametrize(
    "changes", [{"width": 256, "expert_width": 192, "shared_width": 256, "dense_width": 512}, {"layers": 7}]
)
def test_activation_memory_is_near_what_autograd_keeps(changes: dict[str, object]) -> None:
    config = streams.small_config(heads=4, kv_heads=2, head_width=32, **changes)
    model = Transformer(config)
    batch = streams.join([streams.document(61, i) for i in range(8)])
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = model(batch)
    assert output.hidden.requires_grad
    assert memory(config, len(batch.ids)).activations == pytest.approx(sum(kept.values()), rel=0.25)


def test_memory_by_part() -> None:
    config = streams.small_config()
    params = num_params(config)
    small, mixed = memory(config, 7), memory(config, 7, bytes_per_value=2, master=True)
    assert small.weights == small.gradients == 4 * params and small.optimizer == 8 * params
    assert mixed.weights == 2 * params and mixed.optimizer == 12 * params
    assert memory(config, 7, recompute=True).activations < small.activations < small.total
