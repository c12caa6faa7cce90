"""Configs that cannot be built are refused by name."""

import pytest
import streams
from hypothesis import given
from hypothesis import strategies as st

from weft.model.config import ConfigError, ModelConfig
from weft.model.presets import preset, scaled

WRONG = [
    ({"layers": 1025}, "layers"),
    ({"layers": True}, "layers"),
    ({"width": 65537}, "width"),
    ({"experts": 4097}, "experts"),
    ({"experts_per_token": 6}, "experts_per_token=6 exceeds"),
    ({"heads": 5}, "multiple of kv_heads"),
    ({"head_width": 9}, "even"),
    ({"slices": ((0, 92),)}, "slice"),
    ({"slices": ((5, 5),)}, "slice"),
    ({"slices": 3}, "slices"),
    ({"feature_sizes": {"a.b": 3}}, "plain word"),
    ({"feature_sizes": [1]}, "mapping"),
    ({"feature_sizes": {"image": 10**9}}, "feature_sizes"),
    ({"resample": {"touch": {"tokens": 4, "latents": 2}}}, "needs feature_sizes"),
    ({"resample": {"image": {"tokens": 3}}}, "needs the keys"),
    ({"resample": {"image": {"tokens": 3, "latents": 10**9}}}, "latents"),
    ({"resample": {"image": {"tokens": 3, "latents": 2}}}, "tokens=3 must be a multiple of latents=2"),
    ({"resample": {"image": {"tokens": 4, "latents": 2}}}, r"feature_sizes\[image\]=13 must hold the 2 rows"),
    ({"rope_split": (1, 1, 1)}, "rope_split"),
    ({"rope_theta": float("nan")}, "rope_theta"),
    ({"norm_eps": "small"}, "norm_eps"),
    ({"tied": 1}, "tied"),
    ({"pad_id": 91}, "pad_id"),
    ({"windw": 3}, "unknown key 'windw'"),
]


@pytest.mark.parametrize(("changes", "message"), WRONG)
def test_a_wrong_config_is_refused_by_name(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        streams.small_config(**changes)


def test_missing_vocabulary_and_unknown_preset_are_refused() -> None:
    with pytest.raises(ConfigError, match="vocab_size is missing"):
        ModelConfig.from_dict({})
    with pytest.raises(ConfigError, match="known are tiny"):
        preset("huge", vocab_size=9)


@given(layers=st.integers(1, 40), full_every=st.integers(0, 7))
def test_every_nth_layer_is_full(layers: int, full_every: int) -> None:
    config = streams.small_config(layers=layers, full_every=full_every)
    full = [config.is_full(layer) for layer in range(layers)]
    assert sum(full) == (layers // full_every if full_every else 0)
    assert all(streams.small_config(layers=layers, window=None).is_full(layer) for layer in range(layers))


def test_scaled_multiplies_widths_only() -> None:
    config = scaled(streams.small_config(), 3)
    assert (config.width, config.heads, config.layers, config.base_width) == (120, 18, 4, 40)
