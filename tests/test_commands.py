"""Every command as a user types it, on real small files: a tiny model, a pendulum's episodes, a photo, spoken words."""

from __future__ import annotations

import json
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image as Pillow

import weft
from tests.inference.conftest import clip, make_model, make_tokenizer, picture, readings
from weft import cli
from weft.commands.arguments import UsageError, build, call, parameters, split
from weft.inference.files import picture as to_picture
from weft.inference.files import save_segment
from weft.inference.load import save

ROOT = Path(__file__).parents[1]
OWN = (
    "inspect", "prepare", "fit-tokenizer", "tokenize", "data-report", "train", "plan", "export", "generate", "predict", "embed",
    "search", "explain",
)  # fmt: skip
checkout = pytest.mark.skipif(not (ROOT / "examples").is_dir(), reason="reads the examples of a checkout")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `model/`, `photo.png`, `imu.csv`, `word.wav`, `film/` and `photos/`."""
    folder = tmp_path_factory.mktemp("home")
    tokenizer = make_tokenizer()
    save(make_model(tokenizer), tokenizer, folder / "model")
    to_picture(picture().pixels).save(folder / "photo.png")
    (folder / "photos").mkdir()
    for i in range(3):
        to_picture(picture(i + 1).pixels).save(folder / "photos" / f"{i}.png")
    samples = np.random.default_rng(0).uniform(-0.5, 0.5, 800).astype(np.float32)
    save_segment(weft.Audio(samples, rate_hz=8000), folder / "word")
    save_segment(clip(), folder / "film")
    np.savetxt(folder / "imu.csv", readings(count=8).values, delimiter=",", header="x,y,z", comments="")
    return folder


@pytest.fixture
def here(home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(home)
    return home


def weft_(line: str) -> None:
    """Run a command line."""
    cli.main(shlex.split(line))


def mistake(line: str, capsys: pytest.CaptureFixture[str]) -> str:
    """The one sentence that a mistake prints."""
    with pytest.raises(SystemExit) as stop:
        weft_(line)
    said = capsys.readouterr().err
    assert stop.value.code == 2 and said.count("\n") == 1 and "Traceback" not in said, said
    return said


# -- words on the line


def spoken(place: str, *words: str, grid: str | None = None, top_k: int = 3, dry_run: bool = False) -> tuple[object, ...]:
    """Say it.

    Args:
        place: where.
        words: what.
        grid: how large.
        top_k: how many.
        dry_run: or not.
    """
    return place, words, grid, top_k, dry_run


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("here", ("here", (), None, 3, False)),
        ("--top-k 5 here a 'b c'", ("here", ("a", "b c"), None, 5, False)),
        ("here --dry-run a --grid 4x6 -3", ("here", ("a", "-3"), "4x6", 3, True)),
        ("here --no-dry-run -- --top-k", ("here", ("--top-k",), None, 3, False)),
        ("here --grid=-1 null [x] {y}", ("here", ("null", "[x]", "{y}"), "-1", 3, False)),
    ],
)
def test_words_and_options_come_in_any_order(line: str, found: tuple[object, ...]) -> None:
    assert call(spoken, shlex.split(line), "weft say") == found


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("", "PLACE missing"),
        ("here --top-k many", "--top-k"),
        ("here --topk 3", "did you mean --top-k"),
        ("here --grid", "--grid needs a value"),
    ],
)
def test_words_that_do_not_fit_are_named(line: str, said: str) -> None:
    with pytest.raises(UsageError, match=re.escape(said)):
        call(spoken, shlex.split(line), "weft say")


@pytest.mark.parametrize("name", OWN)
def test_help_explains_every_option(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    cli.main([name, "--help"])
    out = re.sub(r"\s+", " ", capsys.readouterr().out)
    command = cli.find(name)
    for option, p in parameters(command).items():
        shown = f"--{option.replace('_', '-')}" if p.default is not p.empty else option
        assert shown in out, option
    undocumented = [a.dest for a in build(command, "weft")._actions if not a.help or a.help.startswith("(")]
    assert not undocumented


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("generate model nosuch.png", "no file nosuch.png"),
        ("generate nosuch hello", "does not exist"),
        ("generate model", "the prompt is empty"),
        ("generate model hi --produce imagge", "cannot produce 'imagge'"),
        ("generate model hi --produce action", "--space"),
        ("generate model hi --grid 4by4 --produce image", "4x6"),
        ("generate model hi --device cuda:77", "cuda:77"),
        ("generate model hi --edit photo.png", "give both or neither"),
        ("generate model hi --edit photo.png --keep 3.5", "keep=3.5 must be a fraction"),
        ("generate model hi --quantize int3", "'int8' or 'int4'"),
        ("embed model photo.png --index postgresql://here/db", "names no index"),
        ("generate model imu.csv", "--rate-hz"),
        ("generate model imu.csv --rate-hz 50", "--kind"),
        ("predict model hi", "exactly one of --choices, --horizon and --action"),
        ("predict model hi --choices [a", "is no JSON list"),
        ("predict model imu.csv --rate-hz 50 --kind imu --horizon soon", "0.5s"),
        ("predict model hi --action round", "no action space"),
        ("embed model photo.png", "--index"),
        ("search model nosuch.index hi", "no index at nosuch.index"),
        ("inspect nosuch.json", "nosuch.json"),
        ("inspect photo.png --tokenizer nosuch", "no tokenizer at nosuch"),
        ("prepare nosuch --out x", "nosuch is no .jsonl manifest"),
        ("prepare nosuch.jsonl", "--out is missing"),
        ("data-report photos", "holds no finished dataset"),
        ("fit-tokenizer photos --out x", "photos"),
        ("train nosuch.yaml", "nosuch.yaml"),
        ("train nosuch.yaml lr", "section.key=value"),
        ("plan huge", "no preset"),
        ("plan tiny --gpu abacus", "abacus"),
        ("plan tiny small", "one word too many"),
        ("export photos --out x", "photos"),
    ],
)
def test_a_mistake_is_one_sentence(here: Path, line: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert said in mistake(line, capsys)


# -- using a model


def test_generate_prints_what_the_model_says(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weft_("generate model 'the quick' photo.png word.wav --max-tokens 6")
    prompt = ["the quick", weft.Image("photo.png"), weft.Audio("word.wav")]
    assert capsys.readouterr().out == weft.load("model").generate(prompt, max_tokens=6).text + "\n"


def test_generate_saves_media_and_never_over_an_earlier_reply(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from PIL import Image

    for _ in range(2):
        weft_("generate model 'draw it' --produce image,audio --grid 2x3 --seconds 0.2 --n 2 --out media --seed 5")
    paths = [Path(p) for p in capsys.readouterr().out.split()]
    assert len(set(paths)) == 8 and all(p.is_file() for p in paths)
    with Image.open(paths[0]) as found:
        assert found.size == (12, 8)
    assert [p.suffix for p in paths[:2]] == [".png", ".wav"]


def test_generate_keeps_a_part_of_a_picture_and_of_a_sound(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weft_("generate model 'finish it' --edit photo.png --keep 0.5 --out edited --seed 2")
    weft_("generate model 'go on' --edit word.wav --keep 0.5 --out edited --seed 2")
    image, sound = (Path(p) for p in capsys.readouterr().out.split())
    model = weft.load("model")
    assert np.array_equal(
        np.asarray(to_picture(model.generate("finish it", weft.Image("photo.png"), keep=0.5, seed=2).image.pixels)),
        np.asarray(Pillow.open(image)),
    )
    assert sound.suffix == ".wav" and sound.stat().st_size > 44


def test_generate_goes_on_with_a_sensor_and_acts(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weft_("generate model imu.csv film --rate-hz 50 --kind imu --produce sensor --readings 4 --out more")
    weft_("""generate model go --produce action --space '{"low": [-1, 0], "high": [1, 2]}' --out more""")
    readings_, action = (Path(p) for p in capsys.readouterr().out.split())
    assert np.loadtxt(readings_, delimiter=",", skiprows=1).shape == (4, 3)
    x, y = np.loadtxt(action, delimiter=",", skiprows=1).reshape(-1, 2)[0]
    assert -1 <= x <= 1 and 0 <= y <= 2


def test_predict_answers_each_question(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weft_("predict model 'Is it?' photo.png --choices yes,no,maybe")
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[1:]]
    choice = weft.load("model").predict(["Is it?", weft.Image("photo.png")], choices=["yes", "no", "maybe"])
    assert rows[0][0] == choice.best and sum(float(p) for _, p, _ in rows) == pytest.approx(1, abs=0.01)
    weft_("predict model imu.csv --rate-hz 50 --kind imu --horizon 0.1s --samples 4 --out next.csv")
    assert "median" in capsys.readouterr().out
    assert np.loadtxt("next.csv", delimiter=",", skiprows=1).shape == (5, 9)
    weft_("predict model go --action 4")
    assert json.loads(capsys.readouterr().out) in range(4)


def test_search_finds_the_file_itself(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weft_("embed model photos 'the quick brown fox' --index my.index --out vectors.npy")
    weft_("embed model word.wav --index my.index")
    assert "my.index: 1 added, 5 in it" in capsys.readouterr().out
    assert np.load("vectors.npy").shape == (4, 20) and len(json.loads(Path("vectors.json").read_text())) == 4
    weft_("search model my.index photos/1.png -k 2")
    hits = capsys.readouterr().out.splitlines()
    assert len(hits) == 2 and hits[0].endswith("photos/1.png") and float(hits[0].split()[0]) == pytest.approx(1, abs=1e-3)
    weft_("search model photos photos/2.png --save photos.index")
    assert capsys.readouterr().out.splitlines()[0].endswith("photos/2.png") and len(weft.Index.load("photos.index")) == 3


def test_explain_writes_a_page(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weft_("explain model 'What is it?' photo.png --reply 'a fox' --out pages/why.html")
    out = capsys.readouterr().out
    assert "What is it?" in out and "photo.png" in out and "<img" in Path("pages/why.html").read_text()
    facts = json.loads(Path("pages/why.json").read_text())
    assert f"{facts['parts'][0]['leave_one_out']:+.2f} nats" in out


# -- from files to a model


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What examples/demo_document.py writes."""
    pytest.importorskip("sklearn")
    pytest.importorskip("espeakng_loader")
    if not (ROOT / "examples").is_dir():
        pytest.skip("reads the examples of a checkout")
    folder = tmp_path_factory.mktemp("demo")
    runpy.run_path(str(ROOT / "examples" / "demo_document.py"))["write"](folder, 8)
    return folder


def photo_mean(folder: Path) -> float:
    """Mean of the photo's pixels, 0 to 255."""
    from PIL import Image

    with Image.open(folder / "photo.png") as found:
        return float(np.asarray(found).mean())


def test_inspect_shows_every_modality_of_the_demo(demo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weft_(f"inspect {demo}/demo.json --out {demo}/page.html --chunk-s 0.25 --steps 3")
    out = capsys.readouterr().out
    for modality, of in {"text": 2, "image": 1, "video": 1, "audio": 1, "sensor": 2, "action": 1}.items():
        assert re.search(rf"^  {modality} +\d+ tokens +[\d.]+% +{of} segments", out, re.M), modality
    data = json.loads(re.search(r'id="data">(.*?)</script>', (demo / "page.html").read_text(), re.S)[1])  # type: ignore[index]
    at = [i for i, slot in enumerate(data["tokens"]["colour"]) if slot and slot.startswith("#")][: 14 * 20]
    shown = np.array([[int(data["tokens"]["colour"][i][k : k + 2], 16) for k in (1, 3, 5)] for i in at])
    assert np.ptp(shown, axis=0).min() > 30 and abs(shown.mean() - photo_mean(demo)) < 4, "cells have their patch's colour"
    assert "2.99 s on the clock" in out and (demo / "page.html").stat().st_size > 50_000


def test_prepare_fit_train_export_generate(
    demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = ['{"id": "x", "segments": [{"image": "no.png"}]}', "nonsense"]
    (demo / "mixed.jsonl").write_text((demo / "episodes.jsonl").read_text() + "\n".join(bad) + "\n")
    monkeypatch.chdir(tmp_path)
    weft_(f"prepare {demo}/mixed.jsonl --out demo/shards")
    out = capsys.readouterr().out
    assert "7 train, 1 val" in out and "\n2 refused\n" in out and "1  missing file" in out and "1  bad manifest" in out
    assert len(Path("demo/shards/refused.jsonl").read_text().splitlines()) == 2
    weft_("fit-tokenizer demo/shards --out demo/tokenizer --chunk-s 0.1 --patch 16 --steps 2")
    weft_("data-report demo/shards --out report.html --tokenizer demo/tokenizer")
    out = capsys.readouterr().out
    assert "8 documents" in out and "refused 2" in out and "tokens of 7 documents" in out and Path("report.html").is_file()
    small = "data.batch_tokens=1024 data.length=1024 max_steps=2 tracking.plots=false tracking.trackers=[] tracking.panel=none"
    weft_(f"train {ROOT}/examples/pendulum.yaml --dry-run model.sizes.width=64 model.sizes.heads=1 {small}")
    assert "whole run: 2 steps" in capsys.readouterr().out and not Path("runs").exists()
    weft_(f"train {ROOT}/examples/pendulum.yaml model.sizes.width=64 model.sizes.heads=1 {small}")
    assert "2 steps, loss" in capsys.readouterr().out
    weft_("export runs/pendulum --out model --dtype bf16")
    weft_("plan model --gpus 1 --gpu rtx4090")
    assert "M weights" in capsys.readouterr().out
    weft_("generate model 'Where is it?' --max-tokens 3 --dtype float32")
    assert "one too many" not in capsys.readouterr().err


@checkout
def test_the_run_for_many_gpus_is_one_that_can_be_trained(demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from weft.commands.train import sizes
    from weft.training.config import load_run

    run = load_run(ROOT / "examples" / "pretrain-deepspeed.yaml")
    assert run.engine.kind == "deepspeed" and run.data.micro_tokens == 16_384
    assert all(run.data.micro_batches % ranks == 0 for ranks in (1, 8, 16, 64, 128, 256))
    config, _ = sizes(str(ROOT / "examples" / "pretrain-deepspeed.yaml"))
    assert config.experts == 64


# -- what the documents say


def lines_of(page: str) -> list[str]:
    """The command lines in a document's shell blocks."""
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    blocks = re.findall(r"```sh\n(.*?)```", text, re.S)
    return [line for block in blocks for line in block.splitlines() if line.startswith("weft ")]


@checkout
@pytest.mark.parametrize("page", ["commands.md", "training-at-scale.md"])
def test_every_line_of_the_documents_parses(page: str) -> None:
    lines = lines_of(page)
    assert len(lines) >= 3
    for line in lines:
        _, name, *rest = shlex.split(line, comments=True)
        if name in OWN:
            options, words = split(cli.find(name), rest)
            build(cli.find(name), name).parse_args([*options, "--", *words])
        else:
            assert name in cli.COMMANDS


@checkout
def test_the_ten_examples_run(here: Path) -> None:
    text = (ROOT / "docs" / "python.md").read_text(encoding="utf-8")
    blocks = re.findall(r"## (\d+)\..*?```python\n(.*?)```", text, re.S)
    assert [int(number) for number, _ in blocks] == list(range(1, 11))
    names: dict[str, object] = {}
    for number, block in blocks:
        exec(compile(block, f"docs/python.md, example {number}", "exec"), names)
    right, unseen = names["right"], names["unseen"]
    assert isinstance(right, int) and isinstance(unseen, list) and right > 0.8 * len(unseen)
    assert Path("why.html").is_file() and Path("ride.html").is_file() and Path("things.index").is_file()


def test_a_slip_is_told_before_torch_is_imported(tmp_path: Path) -> None:
    """Importing it takes seconds; a missing word or file must not."""
    slips = [["inspect"], ["inspect", "none.json"], ["inspect", "a b", "--tokenizer", "none"], ["prepare", "none.jsonl"]]
    slips += [["prepare", "none.jsonl", "--out", "x"], ["fit-tokenizer", "x"], ["fit-tokenizer", "none", "--out", "x"]]
    code = f"""
import sys
from weft.cli import main
for words in {slips}:
    try:
        main(words)
    except SystemExit as end:
        assert end.code == 2 and "torch" not in sys.modules, words
    else:
        raise AssertionError(words)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
