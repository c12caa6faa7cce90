"""From a YAML file and shards of real media to a folder that inference loads; and the plan that came before."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.training.data_world import documents, sentence, tokenizer, write_manifest
from tests.training.synthetic import small_config
from weft.model.presets import preset
from weft.model.save import from_pretrained
from weft.model.transformer import Transformer
from weft.tokenizers.bundle import StreamTokenizer
from weft.tokenizers.pack import Batch
from weft.tokenizers.text import TextTokenizer
from weft.training.build import build_model
from weft.training.checkpoint import checkpoints, publish, verify
from weft.training.config import ConfigError, load_run
from weft.training.data.prepare import prepare
from weft.training.engine import EngineConfig, LocalEngine
from weft.training.loss import LossConfig
from weft.training.optim import OptimizerConfig
from weft.training.plan import GPUS, PlanError, plan, step_bytes, table
from weft.training.state import write_inference_files
from weft.training.train import main

RUN = """\
folder: {root}/run
max_steps: 6
model:
  preset: tiny
  sizes: {{width: 24, layers: 2, heads: 2, kv_heads: 1, head_width: 12, experts: 3, expert_width: 16, dense_width: 40}}
data:
  tokenizer: {root}/tokenizer
  batch_tokens: 600
  length: 256
  micro_batches: 2
  sources:
    - path: {root}/shards
  validation:
    - path: {root}/shards
      split: val
checkpoint: {{every: 2}}
evaluation: {{every: 3, batches: 2}}
monitors: {{router_every: 2, probe_every: 3}}
tracking: {{trackers: [], panel: plain, plain_every_s: 0}}
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of 40 documents, a tokenizer, a run file."""
    folder = tmp_path_factory.mktemp("shards")
    prepare(write_manifest(folder / "media", documents(40)), folder / "shards")
    tokenizer().save(folder / "tokenizer")
    (folder / "run.yaml").write_text(RUN.format(root=folder))
    return folder


def test_run_file_trains_on_shards_and_resumes(root, capsys):
    assert main([str(root / "run.yaml"), "max_steps=4"]) == 0
    assert main([str(root / "run.yaml")]) == 0
    text = capsys.readouterr().out
    assert "continuing from" in text
    assert "step 6/6" in text
    run = root / "run"
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in rows if "loss" in r] == list(range(6))
    assert any("eval/loss" in r for r in rows)
    assert rows[-1].keys() >= {"step", "eval/loss"}
    assert {p.name for p in (run / "plots").iterdir()} >= {"loss.png", "loss_by_modality.png"}
    verify(run / "final")
    assert [p.name for p in checkpoints(run / "checkpoints")] == ["step-00000004", "step-00000006"]
    model = from_pretrained(run / "final")
    assert model.config.vocab_size == len(tokenizer().vocabulary)
    assert (run / "final" / "tokenizer").is_dir()
    assert (run / "config.yaml").read_text().startswith("folder:")


def test_dry_run_takes_two_real_steps_and_leaves_nothing(root, capsys):
    assert main([str(root / "run.yaml"), "--dry-run", "folder=" + str(root / "never")]) == 0
    text = capsys.readouterr().out
    assert "memory per rank" in text
    assert "whole run: 6 steps" in text
    assert not (root / "never").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("data.tokenizer=null", "data needs tokenizer"),
        ("data.micro_batches=0", "micro_batches must be at least 1, got 0"),
        ("optimizer.clipp=1", "did you mean 'clip'"),
        ("data.sources.0.path=/nowhere/at/all", "/nowhere/at/all"),
        ("model.init=/nowhere/at/all", "/nowhere/at/all"),
    ],
)
def test_a_mistake_is_one_sentence_and_status_2(root, capsys, change, message):
    assert main([str(root / "run.yaml"), f"folder={root}/bad", change]) == 2
    assert message in capsys.readouterr().err


def test_weights_of_another_text_tokenizer_are_refused_although_they_fit(root, tmp_path):
    """Same sizes, other words: nothing but the digest tells."""
    plain = build_model(load_run(root / "run.yaml"), tokenizer())
    given = (plain.state_dict(), plain.config.to_dict(), tokenizer(), 1.0)
    publish(tmp_path / "model", lambda draft: write_inference_files(draft, *given))
    run = load_run(root / "run.yaml", [f"model.init={tmp_path}/model"])
    assert build_model(run, tokenizer()).config == plain.config
    letters = str.maketrans("abcdefghijklmnopqrstuvwxyz", "bcdefghijklmnopqrstuvwxyza")
    text = TextTokenizer.fit([sentence(i).translate(letters) for i in range(200)], size=300)
    other = StreamTokenizer.build([text, *(t for name, t in tokenizer().tokenizers.items() if name != "text")])
    assert other.vocabulary == tokenizer().vocabulary
    with pytest.raises(ConfigError, match=r"model\.init: .* \(its text differ\): its ids would mean something else; use the"):
        build_model(run, other)


def test_worker_command_accepts_a_launchers_local_rank(root):
    command = [
        sys.executable,
        "-m",
        "weft.training.train",
        "--local_rank=0",
        str(root / "run.yaml"),
        f"folder={root}/worker",
        "max_steps=1",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    verify(root / "worker" / "final")


# ---- plan ------------------------------------------------------------------------------------------------------------------


def peak_bytes(config, tokens: int) -> int:
    """Weights and moments, plus the most that a forward and backward pass holds at one time by torch's own account."""
    n, none = tokens, torch.zeros(0, dtype=torch.int64)
    zeros = torch.zeros(n, dtype=torch.int64)
    batch = Batch(
        ids=torch.randint(1, config.vocab_size, (n,)), modality=zeros, channel=zeros,
        position=torch.arange(n, dtype=torch.int32)[:, None].expand(n, 3).contiguous(), document=zeros.int(),
        landmark=zeros.bool(), two_way=zeros.int() - 1, features={}, feature_at={},
        target=torch.randint(1, config.vocab_size, (n,)), target_modality=zeros, target_slice=zeros, weight=torch.ones(n),
        embed_at=none, embed_pair=none, rows=1,
    )  # fmt: skip
    engine = LocalEngine(Transformer(config), EngineConfig(device="cpu"), OptimizerConfig(), LossConfig())
    swap = engine.exchange([batch], [])
    engine.forward_backward([batch], swap.whole)
    engine.step(1.0)
    held = sum(t.numel() * t.element_size() for t in [*engine.weights().values(), *engine.moments().values()])
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        engine.forward_backward([batch], swap.whole)
    now = most = 0
    for event in sorted(profile.profiler.kineto_results.events(), key=lambda e: e.start_ns()):
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    return held + most


@pytest.mark.parametrize(("experts", "tokens"), [(0, 768), (4, 1024)])
def test_memory_plan_is_within_15_percent_of_a_measured_step(experts, tokens):
    config = preset("tiny", vocab_size=997, window=None, experts=experts, layers=3)
    planned = sum(step_bytes(config, tokens))
    measured = peak_bytes(config, tokens)
    assert planned == pytest.approx(measured, rel=0.15)


def test_zero_divides_what_it_says():
    config = small_config()
    rows = [step_bytes(config, 64, stage, 4) for stage in (0, 1, 2, 3)]
    assert rows[1] == (rows[0][0], rows[0][1], rows[0][2] / 4, rows[0][3])
    assert rows[2] == (rows[0][0], rows[0][1] / 4, rows[0][2] / 4, rows[0][3])
    assert rows[3] == (rows[0][0] / 4, rows[0][1] / 4, rows[0][2] / 4, rows[0][3])


@pytest.mark.parametrize("name", ["tiny", "small", "base", "large"])
def test_plan_speaks_of_every_preset_and_gpu(name):
    config = preset(name, vocab_size=65536)
    for gpu in GPUS:
        one = plan(config, gpus=8, gpu=gpu, zero_stage=3, total_tokens=1e12, gpu_hour=2.0)
        assert one.tokens_per_s > 0
        assert one.days is not None and one.cost == pytest.approx(one.days * 24 * 8 * 2.0)
    assert len(table(config, gpus=8).splitlines()) == 6
    with pytest.raises(PlanError, match="choose one of"):
        plan(config, gpu="abacus")
