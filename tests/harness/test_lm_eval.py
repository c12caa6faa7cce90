"""lm-eval's figures equal our own runner's on the same documents, from the repository root and through its command line."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from weft.benchmarks.harness.lm_eval_model import command_line
from weft.benchmarks.harness.runner import EvalConfig, evaluate
from weft.benchmarks.harness.task import load_tasks
from weft.inference.generalist import Generalist

lm_eval = pytest.importorskip("lm_eval")
ROOT = Path(__file__).parents[2]
CHOICES = ["dark", "light", "a seven"]


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Path:
    """The same questions as lm-eval tasks (JSON lines and YAML) and as ours (manifest and YAML); theirs are one more."""
    root = tmp_path_factory.mktemp("lm_eval")
    docs = [
        {"q": f"{word} or {i}?", "answer": i % 3, "text": f"is it {word}, {i}", "file": str(data / f"test-0{i}.png")}
        for i, word in enumerate(["one", "two", "dark", "nine", "five"])
    ]
    (root / "docs.jsonl").write_text("".join(json.dumps(d) + "\n" for d in docs))
    base = f"dataset_path: json\ndataset_kwargs: {{data_files: {{test: {root}/docs.jsonl}}}}\ntest_split: test\n"
    pick = f"output_type: multiple_choice\ndoc_to_choice: {CHOICES}\ndoc_to_target: answer\n"
    pick += "metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]\n"
    (root / "pick.yaml").write_text(f"task: weft_pick\n{base}{pick}doc_to_text: '{{{{q}}}}'\n")
    (root / "see.yaml").write_text(
        f"task: weft_see\n{base}{pick}doc_to_text: '<image> {{{{q}}}}'\ndoc_to_image: !function pictures.of\n"
    )
    (root / "pictures.py").write_text("from PIL import Image\n\n\ndef of(doc):\n    return [Image.open(doc['file'])]\n")
    (root / "roll.yaml").write_text(
        f"task: weft_roll\n{base}output_type: loglikelihood_rolling\ndoc_to_text: ''\ndoc_to_target: '{{{{text}}}}'\n"
        "metric_list: [{metric: bits_per_byte}]\n"
    )
    (root / "write.yaml").write_text(
        f"task: weft_write\n{base}output_type: generate_until\ndoc_to_text: '{{{{q}}}}'\ndoc_to_target: '{{{{text}}}}'\n"
        "generation_kwargs: {until: ['zzz'], max_gen_toks: 5, do_sample: false}\n"
        "metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]\n"
    )
    ours = [
        {
            "id": str(i),
            "metadata": {"label": CHOICES[int(d["answer"])]},
            "segments": [
                {"image": Path(d["file"]).name, "role": "observed"},
                {"text": d["q"], "role": "observed"},
                {"text": d["text"], "role": "target"},
            ],
        }
        for i, d in enumerate(docs[:4])
    ]
    (data / "ours.jsonl").write_text("".join(json.dumps(d) + "\n" for d in ours))
    choose = f"answer: choices, choices: {CHOICES}, reference: {{metadata: label}}, metrics: [accuracy]"
    (root / "ours.yaml").write_text(
        "tasks:\n"
        f"- {{name: pick, data: {{manifest: ours.jsonl}}, prompt: [{{observed: text}}], {choose}}}\n"
        f"- {{name: see, data: {{manifest: ours.jsonl}}, {choose}}}\n"
        "- {name: roll, data: {manifest: ours.jsonl}, answer: bits, prompt: [{observed: audio}], metrics: [bits_per_byte]}\n"
        "- {name: write, data: {manifest: ours.jsonl}, answer: text, prompt: [{observed: text}],\n"
        "   produce: {max_tokens: 5, stop: zzz}, metrics: [accuracy]}\n"
    )
    return root


def samples(file: Path) -> dict[str, Any]:
    """Lines of a file by the number of the document."""
    rows = map(json.loads, file.read_text().splitlines())
    return {str(row["doc_id"] if "doc_id" in row else row["key"]): row for row in rows}


def test_the_command_from_the_repository_root_gives_the_figures_of_our_own_runner(
    tiny: Generalist, folder: Path, local: Path, data: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    if (ROOT / "setup.py").exists():
        monkeypatch.chdir(ROOT)
        monkeypatch.syspath_prepend(str(ROOT))  # where `python -m weft` looks first
    what = ["--tasks", "weft_pick,weft_see,weft_roll,weft_write", "--include_path", str(local), "--limit", "4"]
    how = ["--batch_size", "auto", "--device", "cpu", "--log_samples", "--output_path", str(tmp_path / "theirs")]
    command_line(["--model_args", f"pretrained={folder}", *what, *how])
    (file,) = (tmp_path / "theirs").rglob("results_*.json")
    theirs = json.loads(file.read_text())["results"]
    tasks = [(task, data) for task in load_tasks(local / "ours.yaml")]
    ours = evaluate(tiny, tasks, tmp_path / "ours", EvalConfig(batch=3, rounds=10))["tasks"]
    assert all(ours[name]["failed"] == 0 for name in ours), ours
    said = {name: samples(next(file.parent.glob(f"samples_weft_{name}_*.jsonl"))) for name in ours}
    mine = {name: samples(next((tmp_path / "ours" / name).glob("whole-*.jsonl"))) for name in ours}
    for name in ("pick", "see"):
        assert theirs[f"weft_{name}"]["acc,none"] == pytest.approx(ours[name]["metrics"]["accuracy"]["value"], abs=1e-6)
        for key, record in mine[name].items():
            got = [float(r[0][0]) for r in said[name][key]["resps"]]
            assert np.allclose(got, record["logprobs"], atol=1e-5), name
    assert mine["pick"]["0"]["logprobs"] != mine["see"]["0"]["logprobs"]  # the picture is seen
    want = ours["roll"]["metrics"]["bits_per_byte"]["value"]
    assert theirs["weft_roll"]["bits_per_byte,none"] == pytest.approx(want, abs=1e-5)
    assert {k: r["resps"][0][0] for k, r in said["write"].items()} == {k: r["answer"] for k, r in mine["write"].items()}


def test_images_and_sound_reach_the_model(tiny: Generalist, folder: Path) -> None:
    from lm_eval.api.instance import Instance
    from PIL import Image as Picture

    from tests.harness.conftest import RATE_HZ, pixels, sound
    from weft.benchmarks.harness.lm_eval_model import model_class
    from weft.inference.generate import Request
    from weft.tokenizers.segment import Audio, Image

    model = model_class()(pretrained=str(folder), device="cpu")
    media = {"visual": [Picture.fromarray(pixels(3, True))], "audio": [{"array": sound(1, True), "sampling_rate": RATE_HZ}]}
    asked = [("see <image> and hear <audio> now", {"until": [], "max_gen_toks": 4}, media)]
    got = model.generate_until([Instance("generate_until", {}, a, 0) for a in asked])
    prompt = ["see", Image(media["visual"][0]), "and hear", Audio(sound(1, True), rate_hz=RATE_HZ), "now"]
    want = tiny.generate(Request(prompt, "text", {"max_tokens": 4, "temperature": 0.0})).text
    assert got == [want]
    likely = model.loglikelihood([Instance("loglikelihood", {}, ("<image> is", " dark", media), 0)])
    sounds_last = tiny.score([Audio(sound(1, True), rate_hz=RATE_HZ), Image(media["visual"][0]), "is"], "dark")
    assert likely[0][0] == pytest.approx(sounds_last.total, abs=1e-5)


def test_greedy_means_that_greedy_decoding_writes_it(tiny: Generalist, folder: Path) -> None:
    from lm_eval.api.instance import Instance

    from weft.benchmarks.harness.lm_eval_model import model_class

    model = model_class()(pretrained=str(folder), device="cpu")
    pairs = [("dark or light?", " dark"), ("one, two", " seven")]
    for context, _ in list(pairs):
        reply = tiny.generate(context, max_tokens=40, temperature=0.0)
        if reply.finish == "done" and reply.text == reply.text.lstrip():
            pairs.append((context, reply.text))
    found = model.loglikelihood([Instance("loglikelihood", {}, p, 0) for p in pairs])
    for (context, continuation), (_, greedy) in zip(pairs, found):
        reply = tiny.generate(
            context, max_tokens=max(len(tiny.score(context, continuation.lstrip()).tokens), 1), temperature=0.0
        )
        assert greedy == (reply.text == continuation.lstrip() and reply.finish == "done")


def test_a_batch_that_does_not_fit_is_halved() -> None:
    from weft.benchmarks.harness.lm_eval_model import in_batches

    sizes = []

    def work(items: Any) -> list[int]:
        if len(items) > 3:
            raise RuntimeError("CUDA out of memory")
        sizes.append(len(items))
        return [i + 1 for i in items]

    assert in_batches(range(10), 8, work) == list(range(1, 11)) and max(sizes) == 2
    with pytest.raises(RuntimeError, match="other"):
        in_batches([1, 2], 2, lambda _: (_ for _ in ()).throw(RuntimeError("other")))


@pytest.mark.slow
def test_the_command_runs_in_a_process_of_its_own(folder: Path, local: Path) -> None:
    args = ["--model_args", f"pretrained={folder}", "--tasks", "weft_pick", "--include_path", str(local), "--device", "cpu"]
    run = subprocess.run(
        [sys.executable, "-m", "weft", "lm-eval", *args],
        cwd=ROOT if (ROOT / "setup.py").exists() else None,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert run.returncode == 0 and "weft_pick" in run.stdout and "acc" in run.stdout, run.stderr[-2000:]
