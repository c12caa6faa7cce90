"""A step's batches are a function of (seed, step); bad samples are replaced; nothing depends on who asks, or when."""

import errno
import functools
import hashlib
import json
import os
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.training.data_world import documents, episode, tokenizer, write_manifest
from weft.tokenizers.pack import Batch, unpack
from weft.tokenizers.plan import PRESETS
from weft.training.data.config import LoaderConfig, SourceConfig
from weft.training.data.loader import Loader, StepData
from weft.training.data.prepare import prepare
from weft.training.data.quarantine import TooManyBadSamples
from weft.training.data.shards import ShardDataset
from weft.training.data.stored import store_source

CONFIG = LoaderConfig(
    batch_tokens=700, length=192, micro_batches=4, round_to=16, dropout={"image": 0.3, "audio": 0.3}, prefetch=0
)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixty mixed documents and twenty episodes, each in shards of their own, and the saved tokenizer."""
    folder = tmp_path_factory.mktemp("data")
    prepare(write_manifest(folder / "raw", documents(60)), folder / "mixed", shard_bytes=2**15)
    prepare(write_manifest(folder / "raw", [episode(i) for i in range(20)], "control.jsonl"), folder / "control")
    tokenizer().save(folder / "tokenizer")
    return folder


def loader(data: Path, config: LoaderConfig = CONFIG, **settings: object) -> Loader:
    sources = [SourceConfig(str(data / "mixed"), weight=0.7), SourceConfig(str(data / "control"), weight=0.3, control=True)]
    return Loader(sources, tokenizer(), config, **{"seed": 5, "plan": PRESETS["dense"], **settings})  # type: ignore[arg-type]


def tensors(batch: Batch) -> list[tuple[str, torch.Tensor]]:
    flat = []
    for name, value in vars(batch).items():
        items = value.items() if isinstance(value, dict) else [("", value)]
        flat += [(f"{name}.{k}", v) for k, v in items if isinstance(v, torch.Tensor)]
    return flat


def digest(batches: list[Batch]) -> str:
    total = hashlib.sha256()
    for batch in batches:
        for name, value in tensors(batch):
            total.update(f"{name}{value.dtype}{tuple(value.shape)}".encode() + value.numpy().tobytes())
    return total.hexdigest()


def streams(steps: list[StepData]) -> Counter[bytes]:
    """The documents of some batches, whatever micro-batch they lie in."""
    return Counter(s.ids.tobytes() for step in steps for batch in step.batches for s in unpack(batch))


def test_a_step_is_a_function_of_its_number(data: Path) -> None:
    one, two = loader(data), loader(data)
    forward = [digest(one.step(s).batches) for s in range(6)]
    backward = [digest(two.step(s).batches) for s in reversed(range(6))][::-1]
    assert forward == backward and len(set(forward)) == 6
    assert digest(loader(data, seed=6).step(0).batches) != forward[0]


def test_three_chained_resumes_give_the_exact_order(data: Path) -> None:
    whole = [digest(s.batches) for s in loader(data).steps(0, 12)]
    pieces: list[str] = []
    config = LoaderConfig(**{**vars(CONFIG), "prefetch": 3})
    for until in (2, 5, 9, 12):
        with loader(data, config) as again:
            for step in again.steps(len(pieces)):
                pieces.append(digest(step.batches))
                if len(pieces) == until:
                    break
    assert pieces == whole


@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.sampled_from([1, 2, 4]), st.integers(1, 3), st.sampled_from([0, 2])), min_size=3, max_size=5))
def test_any_chain_of_resumes_and_worlds_gives_the_same_micro_batches(data: Path, chain: list[tuple[int, int, int]]) -> None:
    """Each link starts anew at the step where the last one stopped, with its own number of ranks and prefetched steps."""
    step, found = 0, []
    config = {**vars(CONFIG), "draws_per_step": 12}
    for world, count, prefetch in chain:
        ranks = [loader(data, LoaderConfig(**{**config, "prefetch": prefetch}), rank=r, world=world) for r in range(world)]
        made = [[s.batches for s in r.steps(step, step + count)] for r in ranks]
        found += [[digest([b]) for rank in made for b in rank[i]] for i in range(count)]
        step += count
    alone = loader(data, LoaderConfig(**config))
    assert found == [[digest([b]) for b in alone.step(s).batches] for s in range(step)]


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_divide_the_global_batch(data: Path, world: int) -> None:
    alone = loader(data)
    ranks = [loader(data, rank=r, world=world) for r in range(world)]
    assert {r.identity()["digest"] for r in ranks} == {alone.identity()["digest"]}
    for s in range(3):
        parts = [b for r in ranks for b in r.step(s).batches]
        assert [digest([b]) for b in parts] == [digest([b]) for b in alone.step(s).batches]


def test_micro_batches_only_divide_the_documents(data: Path) -> None:
    fixed = {**vars(CONFIG), "draws_per_step": 24, "max_tokens": 4000}
    several = [loader(data, LoaderConfig(**{**fixed, "micro_batches": m})).step(3) for m in (1, 3, 4)]
    assert streams([several[0]]) == streams([several[1]]) == streams([several[2]])
    sizes = [len(b.ids) for b in several[2].batches]
    assert max(sizes) <= 1.5 * min(sizes)


def test_worker_processes_change_nothing(data: Path) -> None:
    found = []
    for workers in (0, 1, 3):  # a worker takes seconds to start
        config = LoaderConfig(**{**vars(CONFIG), "decode_workers": workers, "prefetch": 2 if workers else 0})
        with loader(data, config, tokenizer_folder=data / "tokenizer") as made:
            found.append([digest(s.batches) for s in made.steps(4, 7)])
    assert found[0] == found[1] == found[2]


SCRIPT = """
import sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from tests.training.test_data_loader import digest, loader
print([digest(s.batches) for s in loader(Path(sys.argv[2])).steps(0, 3)])
"""


def test_hash_seed_folder_locale_and_zone_change_nothing(data: Path, tmp_path: Path) -> None:
    here = str([digest(s.batches) for s in loader(data).steps(0, 3)])
    env = {**os.environ, "PYTHONHASHSEED": "123", "TZ": "Asia/Kathmandu", "LC_ALL": "C", "LANG": "C"}
    command = [sys.executable, "-c", SCRIPT, os.getcwd(), str(data)]
    assert subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, check=True).stdout.strip() == here


def test_caches_change_nothing(data: Path, tmp_path: Path) -> None:
    tiny = LoaderConfig(**{**vars(CONFIG), "token_cache_bytes": 4000, "document_cache_bytes": 4000, "stream_cache_bytes": 0})
    disk = LoaderConfig(**{**vars(CONFIG), "token_cache_folder": str(tmp_path), "token_cache_bytes": 10_000})
    full = [digest(s.batches) for s in loader(data).steps(0, 4)]
    for config in (tiny, disk, disk):
        made = loader(data, config)
        assert [digest(s.batches) for s in made.steps(0, 4)] == full
        assert made.cache.memory.bytes <= config.token_cache_bytes
    assert made.cache.misses == 0  # the third found everything on disk


def test_a_full_disk_costs_the_token_cache_and_not_the_run(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "replace", full)
    made = loader(data, LoaderConfig(**{**vars(CONFIG), "token_cache_folder": str(tmp_path)}))
    assert digest(made.step(1).batches) == digest(loader(data).step(1).batches)
    assert caplog.text.count("takes no more tokens") == 1
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_every_document_comes_once_per_pass(data: Path) -> None:
    config = LoaderConfig(**{**vars(CONFIG), "draws_per_step": 18, "micro_batches": 1, "max_tokens": 10**5, "length": 10**4})
    made = Loader([SourceConfig(str(data / "mixed"), repeats=2)], tokenizer(), config, seed=5)
    assert made.mixture.draws == 108 and made.has(5) and not made.has(6)
    seen = [step for step in made.steps()]
    assert len(seen) == 6 and sum(s.documents for s in seen) == 108
    for half in (seen[:3], seen[3:]):
        assert sum(streams(half).values()) == 54
    assert streams(seen[:3]).keys() == streams(seen[3:]).keys() or CONFIG.dropout


def test_a_step_holds_its_tokens_with_little_padding(data: Path) -> None:
    made = loader(data, LoaderConfig(**{**vars(CONFIG), "batch_tokens": 4000}))
    steps = list(made.steps(0, 8))
    tokens = [s.tokens for s in steps]
    assert abs(np.mean(tokens) / 4000 - 1) < 0.15 and np.std(tokens) < 0.25 * np.mean(tokens)
    assert sum(s.padding for s in steps) < 0.02 * sum(tokens)
    assert sum(s.dropped for s in steps) == 0
    assert all(len(b.ids) % 16 == 0 for s in steps for b in s.batches)


def test_a_full_micro_batch_drops_and_counts(data: Path) -> None:
    config = LoaderConfig(**{**vars(CONFIG), "draws_per_step": 40, "max_tokens": 200})
    step = loader(data, config).step(0)
    assert step.dropped > 0 and all(len(b.ids) <= 208 for b in step.batches)


def test_long_documents_are_cut_and_counted(data: Path) -> None:
    step = loader(data, LoaderConfig(**{**vars(CONFIG), "length": 40})).step(0)
    assert step.cut > 0
    assert max(len(s) for b in step.batches for s in unpack(b)) <= 40


def test_roles_and_dropout_follow_the_plan(data: Path) -> None:
    """Half of the pictures beside an observed text go; one that is the only observation of a target stays."""
    opener = tokenizer().vocabulary.special["<image>"]
    config = LoaderConfig(**{**vars(CONFIG), "dropout": {"image": 0.5}, "micro_batches": 1})
    source = [SourceConfig(str(data / "mixed"))]
    share = {}
    for plan in (None, PRESETS["dense"]):
        pictures = []
        for dropout in ({"image": 0.5}, {}):
            made = Loader(source, tokenizer(), LoaderConfig(**{**vars(config), "dropout": dropout}), seed=5, plan=plan)
            docs = [s for step in made.steps(0, 12) for b in step.batches for s in unpack(b)]
            pictures.append(sum(int((s.ids == opener).sum()) for s in docs))
        share[plan is None] = pictures[0] / pictures[1]
    assert 0.35 < share[True] < 0.65 and share[False] == 1


def test_control_sequences_begin_with_demonstrations(data: Path) -> None:
    config = LoaderConfig(batch_tokens=1000, length=256, prefetch=0)
    action = tokenizer().vocabulary.special["</action>"]
    share = {}
    for rate in (0.0, 0.25, 1.0):
        source = SourceConfig(str(data / "control"), control=True, prompt_rate=rate)
        made = Loader([source], tokenizer(), config, seed=1, plan=PRESETS["gato"])
        docs = [s for st in made.steps(0, 12) for b in st.batches for s in unpack(b)]
        prompted = [int((s.ids == action).sum()) > 1 or len(s) > 60 for s in docs]
        share[rate] = np.mean(prompted)
        for s in docs:  # loss lies on the episode's own twelve actions alone, and one closing token per piece
            assert int(((s.weight > 0) & (s.output_slice == 4)).sum()) in (13, 14)
    assert share[0.0] == 0 and share[1.0] == 1 and abs(share[0.25] - 0.25) < 0.1


def test_documents_of_one_pair_come_together(tmp_path: Path) -> None:
    docs = [{"id": f"d{i}", "pair": f"p{i // 2}", "segments": [{"text": f"number {i}"}]} for i in range(20)]
    prepare(write_manifest(tmp_path / "raw", docs), tmp_path / "out")
    config = LoaderConfig(batch_tokens=200, length=64, micro_batches=2, prefetch=0)
    for step in Loader([SourceConfig(str(tmp_path / "out"))], tokenizer(), config, seed=0).steps(0, 5):
        for batch in step.batches:
            assert set(Counter(batch.embed_pair.tolist()).values()) <= {2, 4}


def _damage(folder: Path, numbers: list[int]) -> list[str]:
    dataset = ShardDataset(folder)
    names = []
    for number in numbers:
        shard, entry = dataset.locate(number)
        path = folder / shard.shard
        data = bytearray(path.read_bytes())
        data[entry.offset + 600] ^= 1
        path.write_bytes(data)
        names.append(dataset.name(number))
    return names


def test_bad_samples_are_replaced_named_and_never_shorten_a_rank(data: Path, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(data / "mixed", tmp_path / "mixed")
    names = _damage(tmp_path / "mixed", [3, 30])
    config = LoaderConfig(**{**vars(CONFIG), "bad_budget": 0.04, "draws_per_step": 18})
    sources = [SourceConfig(str(tmp_path / "mixed"))]
    good = Loader([SourceConfig(str(data / "mixed"))], tokenizer(), config, seed=5)
    first = Loader(sources, tokenizer(), config, seed=5, quarantine=tmp_path / "q")
    steps = list(first.steps(0, 6))
    assert sum(s.replaced for s in steps) >= 4 and all(len(s.batches) == 4 for s in steps)
    assert [s.documents for s in steps] == [s.documents for s in good.steps(0, 6)]
    lines = [json.loads(x) for x in (tmp_path / "q" / "quarantine-0.jsonl").read_text().splitlines()]
    assert sorted({x["sample"] for x in lines}) == sorted(names) and "corrupted" in lines[0]["reason"]
    again = Loader(sources, tokenizer(), config, seed=5, quarantine=tmp_path / "q")
    assert [digest(s.batches) for s in again.steps(0, 6)] == [digest(s.batches) for s in steps]
    with pytest.raises(TooManyBadSamples, match=r"2 samples of source 'mixed' cannot be used, the budget of 0.10% allows 1"):
        list(Loader(sources, tokenizer(), LoaderConfig(**{**vars(config), "bad_budget": 0.001}), seed=5).steps(0, 6))


def test_mistakes_are_said_before_the_first_step(data: Path) -> None:
    with pytest.raises(ValueError, match="micro_batches=4 must be a multiple of the 3 ranks"):
        loader(data, rank=0, world=3)
    with pytest.raises(ValueError, match="must lie in 0 to 1"):
        LoaderConfig(dropout={"image": 1.5})
    less = tokenizer()
    from weft.tokenizers.bundle import StreamTokenizer

    only_text = StreamTokenizer.build([less.tokenizers["text"]])
    with pytest.raises(ValueError, match="source 'mixed' holds action, audio, image, sensor, the tokenizer has text"):
        Loader([SourceConfig(str(data / "mixed"))], only_text, replace(CONFIG, dropout={}), seed=0)
    with pytest.raises(ValueError, match="dropout names 'audio'; modalities of the tokenizer are text"):
        Loader([SourceConfig(str(data / "mixed"))], only_text, CONFIG, seed=0)


def test_an_abandoned_iterator_leaves_no_thread(data: Path) -> None:
    import threading

    made = loader(data, LoaderConfig(**{**vars(CONFIG), "prefetch": 2}))
    steps = made.steps(0)
    next(steps)
    steps.close()
    time.sleep(0.05)
    assert not any(t.name == "loader" for t in threading.enumerate())


def test_a_loaded_document_is_the_encoded_document(data: Path) -> None:
    """What is trained on is, token for token and position for position, what inference encodes."""
    from weft.tokenizers.manifest import load_document
    from weft.training.data.assemble import Assembler

    lines = {row["id"]: row for row in map(json.loads, (data / "raw" / "manifest.jsonl").read_text().splitlines())}
    with loader(data, CONFIG, plan=PRESETS["instruct"]) as load:
        assembler: Assembler = load.assembler
        assembler.config = LoaderConfig(length=10_000, max_tokens=10_000)
        seen = 0
        for draw in range(60):
            if load.mixture.at(draw)[0] != 0:
                continue
            _, source, numbers = load._choose(draw)
            for stream in assembler.draw(draw, source, numbers):
                row = lines[stream.id]
                if any(piece.get("role", "either") == "either" for piece in row["segments"]):
                    row = {**row, "segments": [{"role": "observed", **piece} for piece in row["segments"]]}
                plain = load.tokenizer.encode(load_document(row, data / "raw"), plan=PRESETS["instruct"])
                for name in ("ids", "position", "time", "channel", "modality", "two_way", "landmark", "output_slice", "weight"):
                    np.testing.assert_array_equal(getattr(stream, name), getattr(plain, name), err_msg=f"{stream.id} {name}")
                seen += 1
        assert seen > 10


def settled(count: int) -> list[dict[str, Any]]:
    """Documents of which every second one says of all its segments whether they are learnt."""
    made = documents(count)
    for document in made[::2]:
        for segment in document["segments"]:
            segment["role"] = "target" if "text" in segment else "observed"
    return made


def test_streams_made_ahead_give_the_same_batches(data: Path, tmp_path: Path) -> None:
    prepare(write_manifest(tmp_path / "raw", settled(60)), tmp_path / "mixed")
    sources = [SourceConfig(str(tmp_path / "mixed"), weight=0.7), SourceConfig(str(data / "control"), weight=0.3, control=True)]
    config = LoaderConfig(
        batch_tokens=700, length=48, micro_batches=2, round_to=16, prefetch=0, streams_folder=str(tmp_path / "streams")
    )
    loader = functools.partial(Loader, sources, tokenizer(), seed=5, plan=PRESETS["dense"])
    fresh = loader(config)
    want = [digest(fresh.step(s).batches) for s in range(12)]
    assert fresh.assembler.stored == [None, None]
    paths = {source.name: store_source(source, config, fresh.plan, data / "tokenizer") for source in fresh.sources}
    stamp = {path: path.stat().st_mtime_ns for path in paths.values()}
    ahead = loader(config)
    mixed, control = ahead.assembler.stored
    assert mixed is not None and control is None, "demonstrations are drawn for control, so nothing of it is settled"
    made = [mixed.get(n, None) is not None for n in range(len(ahead.datasets[0]))]
    assert any(made) and not all(made), "long documents and undecided roles are left to the loader"
    assert [digest(ahead.step(s).batches) for s in range(12)] == want
    assert ahead.assembler.count == fresh.assembler.count
    asked: list[tuple[int, int]] = []
    ahead.documents.fetch = asked.extend  # type: ignore[method-assign]
    ahead.step(12)
    assert asked and not [n for source, n in asked if source == 0 and mixed.has(n)], "nobody reads what was made ahead"
    assert store_source(ahead.sources[0], config, ahead.plan, data / "tokenizer") == paths["mixed"]
    assert {path: path.stat().st_mtime_ns for path in paths.values()} == stamp, "what is there is not made again"


def test_streams_of_another_plan_or_length_are_not_used(data: Path, tmp_path: Path) -> None:
    config = LoaderConfig(length=48, streams_folder=str(tmp_path), prefetch=0)
    source = SourceConfig(str(data / "mixed"))
    store_source(source, config, PRESETS["dense"], data / "tokenizer")
    assert Loader([source], tokenizer(), config, seed=5, plan=PRESETS["dense"]).assembler.stored[0] is not None
    assert Loader([source], tokenizer(), config, seed=5, plan=PRESETS["gato"]).assembler.stored[0] is None
    longer = LoaderConfig(length=49, streams_folder=str(tmp_path), prefetch=0)
    assert Loader([source], tokenizer(), longer, seed=5, plan=PRESETS["dense"]).assembler.stored[0] is None
    with pytest.raises(ValueError, match="streams_folder is null"):
        store_source(source, LoaderConfig(), PRESETS["dense"], data / "tokenizer")
