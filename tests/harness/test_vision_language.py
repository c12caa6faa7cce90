"""Tiny random vision-language models with processors built here answer the harness's tasks, in batches as alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.harness.conftest import pixels
from weft.benchmarks.harness.rivals import open_model
from weft.benchmarks.harness.runner import EvalConfig, evaluate
from weft.benchmarks.harness.task import load_tasks
from weft.benchmarks.harness.transformers_model import TransformersModel
from weft.tokenizers.segment import Audio, Image, Segment, Text

pytest.importorskip("transformers", reason="rivals need pip install 'weft[bench]'")
pytestmark = pytest.mark.filterwarnings("ignore")
TASKS = """
tasks:
  - {name: name, data: {manifest: look.test.jsonl, train: look.train.jsonl}, answer: choices, choices: [dark, light],
     shots: 1, metrics: [accuracy, calibration_error]}
  - {name: write, data: {manifest: look.test.jsonl}, answer: text, produce: {max_tokens: 3}, metrics: [exact_match, wer]}
  - {name: caption, data: {manifest: look.test.jsonl}, prompt: [{observed: image}], answer: bits, metrics: [bits_per_byte]}
  - {name: both, data: {manifest: both.test.jsonl}, answer: text, metrics: [exact_match]}
"""


def tokenizer(*marks: str) -> Any:
    """Byte-level, with the image tokens of a family."""
    import tokenizers
    import transformers

    bpe = tokenizers.ByteLevelBPETokenizer()
    special = ["<s>", "<pad>", *marks]
    bpe.train_from_iterator(["dark or light? a seven and a nine make sixteen"] * 3, vocab_size=300, special_tokens=special)
    more = {"additional_special_tokens": list(marks)} if marks else {}
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=bpe._tokenizer, bos_token="<s>", eos_token="<s>", pad_token="<pad>", **more
    )


LANGUAGE = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 512,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 1,
}


def llava(folder: Path) -> Path:
    """Pictures of one size, so many tokens each."""
    import transformers as tf

    words = tokenizer("<image>")
    see = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "projection_dim": 24}
    config = tf.LlavaConfig(
        vision_config=tf.CLIPVisionConfig(image_size=8, patch_size=4, **see),
        text_config=tf.LlamaConfig(**LANGUAGE),
        image_token_index=words.convert_tokens_to_ids("<image>"),
        image_seq_length=4,
    )
    sight = tf.CLIPImageProcessor(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8})
    processor = tf.LlavaProcessor(
        sight, words, patch_size=4, vision_feature_select_strategy="default", num_additional_image_tokens=1
    )
    tf.LlavaForConditionalGeneration(config).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def qwen(folder: Path) -> Path:
    """Pictures at their own sizes, positions of three axes."""
    import transformers as tf

    marks = ("<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>")
    words = tokenizer(*marks)
    at = {name: words.convert_tokens_to_ids(f"<|{name}|>") for name in ("vision_start", "vision_end", "image_pad", "video_pad")}
    config = tf.Qwen2VLConfig(
        text_config={**LANGUAGE, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}},
        vision_config={"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 2, "patch_size": 4, "mlp_ratio": 2},
        image_token_id=at["image_pad"],
        video_token_id=at["video_pad"],
        vision_start_token_id=at["vision_start"],
        vision_end_token_id=at["vision_end"],
    )
    small = {"shortest_edge": 64, "longest_edge": 400}
    sight = tf.Qwen2VLImageProcessor(patch_size=4, merge_size=2, size=small)
    film = tf.Qwen2VLVideoProcessor(patch_size=4, merge_size=2, size=small)
    tf.Qwen2VLForConditionalGeneration(config).save_pretrained(folder)
    tf.Qwen2VLProcessor(sight, words, film).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=["llava", "qwen"])
def rival(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Any]:
    import torch

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp(request.param)
    return open_model(f"hf:{ {'llava': llava, 'qwen': qwen}[request.param](folder) }", "cpu")


def test_a_vision_language_model_answers_about_pictures(rival: tuple[str, Any], data: Path, tmp_path: Path) -> None:
    (tmp_path / "t.yaml").write_text(TASKS)
    tasks = [(task, data) for task in load_tasks(tmp_path / "t.yaml")]
    found = evaluate(rival[1], tasks, tmp_path / "out", EvalConfig(rounds=10, missing=True))["tasks"]
    for name in ("name", "write", "caption"):
        assert found[name]["failed"] == 0, found[name]["failures"]
    assert found["both"]["failed"] == 5 and "the prompt holds audio" in next(iter(found["both"]["failures"]))
    assert set(found["name"]["missing"]) == {"without image", "without text"}


def ask(bright: bool, words: str, count: int = 1) -> list[Segment]:
    return [*(Image(np.tile(pixels(i, bright), (1, 1 + i))) for i in range(count)), Text(words)]


def test_a_batch_gives_what_each_prompt_gives_alone(rival: tuple[str, Any]) -> None:
    model: TransformersModel = rival[1]
    prompts = [ask(True, "dark?"), ask(False, "a seven and a nine make", 2), [Text("is it dark or light, or a seven?")]]
    prompts += [ask(True, "light or dark, or both of them?"), [Text("one")]]
    choices = ["dark", "a seven and a nine"]
    together = model.predict(prompts, choices=choices)
    for prompt, one in zip(prompts, together):
        (alone,) = model.predict([prompt], choices=choices)
        assert np.allclose(one.logprobs, alone.logprobs, atol=1e-4)
    words = [Text("dark"), Text("light and a nine"), Text("a"), Text("sixteen"), Text("or")]
    for prompt, what, one in zip(prompts, words, model.score(prompts, [[w] for w in words])):
        assert np.allclose(one.logprobs, model.score([prompt], [[what]])[0].logprobs, atol=1e-4)
    written = model.generate(prompts, max_tokens=4)
    assert [reply.text for reply in written] == [model.generate([p], max_tokens=4)[0].text for p in prompts]


def test_the_picture_decides(rival: tuple[str, Any]) -> None:
    model: TransformersModel = rival[1]
    dark, light = (model.predict([ask(bright, "dark?")], choices=["dark", "light"])[0] for bright in (False, True))
    assert not np.allclose(dark.logprobs, light.logprobs, atol=1e-6)
    with pytest.raises(ValueError, match="reads text and images, the prompt holds audio"):
        model.predict([[Audio(np.zeros(800, np.float32), rate_hz=8000)]], choices=["a", "b"])
