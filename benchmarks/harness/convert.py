"""Published data sets in their original layout, as manifests that tasks, `weft prepare` and training read.

    python -m weft.benchmarks.harness.convert coco --annotations captions_val2017.json --images DIR/val2017 --out DIR/coco.jsonl

In: the files as their authors publish them. Out: a .jsonl beside the media (paths in a manifest do not leave its folder) and
the number of documents. Entries without their medium are refused, not skipped: the count of a score is part of the score.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

Line = dict[str, Any]


class ConvertError(ValueError):
    """Files that are not in the layout that was named."""


def coco(annotations: Path, images: Path, out: Path) -> int:
    """COCO captions (captions_val2017.json): one document per image, all captions in `metadata.captions`.

    Args:
        annotations: the JSON file with `images` and `annotations`.
        images: folder of the images.
        out: the manifest, in a folder that holds the images.
    """
    value = _json(annotations, "images", "annotations")
    captions: dict[int, list[str]] = defaultdict(list)
    for entry in value["annotations"]:
        captions[entry["image_id"]].append(entry["caption"].strip())

    def lines() -> Iterable[Line]:
        for entry in sorted(value["images"], key=lambda e: e["id"]):
            said = captions.get(entry["id"])
            if not said:
                raise ConvertError(f"{annotations}: image {entry['id']} has no caption; is this the captions file?")
            shown = {"image": _inside(Path(images) / entry["file_name"], out), "role": "observed"}
            yield _line(f"coco/{entry['id']}", [shown, _said(said[0])], captions=said)

    return _write(out, lines())


def vqav2(questions: Path, annotations: Path, images: Path, out: Path, prefix: str = "COCO_val2014_") -> int:
    """VQAv2: one document per question, the ten answers in `metadata.answers`.

    Args:
        questions: v2_OpenEnded_mscoco_val2014_questions.json.
        annotations: v2_mscoco_val2014_annotations.json.
        images: folder of the COCO images.
        out: the manifest, in a folder that holds the images.
        prefix: what stands before the twelve digits of an image's name.
    """
    asked, told = _json(questions, "questions"), _json(annotations, "annotations")
    answers = {entry["question_id"]: entry for entry in told["annotations"]}

    def lines() -> Iterable[Line]:
        for entry in asked["questions"]:
            known = answers.get(entry["question_id"])
            if known is None:
                raise ConvertError(
                    f"{annotations}: question {entry['question_id']} has no answers; take the files of one split"
                )
            shown = {"image": _inside(Path(images) / f"{prefix}{entry['image_id']:012d}.jpg", out), "role": "observed"}
            asks = {"text": entry["question"], "role": "observed"}
            about = {
                "answers": [a["answer"] for a in known["answers"]],
                "answer_type": known.get("answer_type", ""),
                "question_type": known.get("question_type", ""),
            }
            yield _line(f"vqav2/{entry['question_id']}", [shown, asks, _said(known["multiple_choice_answer"])], **about)

    return _write(out, lines())


def librispeech(root: Path, out: Path) -> int:
    """LibriSpeech (ROOT/test-clean/SPEAKER/CHAPTER/*.trans.txt with .flac beside them), words in lower case.

    Args:
        root: folder of one split, such as LibriSpeech/test-clean.
        out: the manifest, in `root` or above it.
    """
    transcripts = sorted(Path(root).rglob("*.trans.txt"))
    if not transcripts:
        raise ConvertError(f"{root} holds no *.trans.txt; give the folder of a split, such as LibriSpeech/test-clean")

    def lines() -> Iterable[Line]:
        for file in transcripts:
            for row in file.read_text(encoding="utf-8").splitlines():
                name, _, words = row.partition(" ")
                heard = {"audio": _inside(file.parent / f"{name}.flac", out), "role": "observed"}
                speaker, chapter = name.split("-")[:2]
                yield _line(f"librispeech/{name}", [heard, _said(words.strip().lower())], speaker=speaker, chapter=chapter)

    return _write(out, lines())


def episodes(
    parquet: Path,
    out: Path,
    kind: str,
    rate_hz: float,
    n: int | None = None,
    bound: float | None = None,
    limit: int | None = None,
) -> int:
    """Meta-World, MuJoCo and BabyAI demonstrations in the layout of JAT's data set: one Parquet row per episode.

    Columns: `continuous_observations` or `discrete_observations`, `continuous_actions` or `discrete_actions`, `rewards`, and
    for BabyAI `text_observations`, of which the first is the mission. Each reading and action is a segment of its own, as in a
    session. Needs pyarrow (`pip install 'weft[data]'`).

    Args:
        parquet: a file.
        out: the manifest.
        kind: sensor kind of the observations.
        rate_hz: steps per second.
        n: number of discrete actions.
        bound: continuous actions lie in [-bound, bound]; those beyond are clipped, as the environments do.
        limit: episodes at most.
    """
    try:
        import pyarrow.parquet as pq
    except ModuleNotFoundError:
        raise ModuleNotFoundError("reading Parquet needs pyarrow; pip install 'weft[data]'") from None
    table = pq.read_table(parquet)
    see, act = (_column(table, parquet, what) for what in ("observations", "actions"))
    if (n is None) != act.startswith("continuous") or (bound is None) == act.startswith("continuous"):
        raise ConvertError(f"{parquet} has {act}; give bound for continuous actions, n for discrete ones")

    def lines() -> Iterable[Line]:
        for i, row in enumerate(table.slice(0, limit).to_pylist()):
            missions = row.get("text_observations") or []
            pieces: list[Line] = [{"text": missions[0], "role": "observed"}] if missions else []
            if len(row[see]) != len(row[act]):
                raise ConvertError(
                    f"{parquet} row {i}: {len(row[see])} observations, {len(row[act])} actions; they must go together"
                )
            for k, (reading, action) in enumerate(zip(row[see], row[act])):
                clock = {"rate_hz": rate_hz, "start_s": round(k / rate_hz, 9)}
                values = [float(v) for v in (reading if isinstance(reading, list) else [reading])]
                pieces.append({"sensor": [values], "kind": kind, "role": "observed", **clock})
                pieces.append({**_action(action, n, bound), "role": "target", **clock})
            yield _line(f"{kind}/{i}", pieces, task=kind, **{"return": float(sum(row.get("rewards") or [0]))})

    return _write(out, lines())


def _action(action: Any, n: int | None, bound: float | None) -> Line:
    if n is not None:
        return {"action": [int(action)], "space": {"n": n}}
    assert bound is not None
    values = [min(max(float(v), -bound), bound) for v in action]
    return {"action": [values], "space": {"low": [-bound] * len(values), "high": [bound] * len(values)}}


def _column(table: Any, parquet: Path, what: str) -> str:
    found = [name for name in table.column_names if name in (f"continuous_{what}", f"discrete_{what}")]
    if len(found) != 1:
        raise ConvertError(
            f"{parquet} needs exactly one of continuous_{what} and discrete_{what}; it has {', '.join(table.column_names)}"
        )
    return str(found[0])


def _json(path: Path, *keys: str) -> Any:
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConvertError(f"{path} cannot be read as JSON ({error})") from error
    missing = [key for key in keys if not isinstance(value, dict) or key not in value]
    if missing:
        raise ConvertError(f"{path} has no key {missing[0]!r}; it is not the published file")
    return value


def _inside(media: Path, out: Path) -> str:
    """The path of a medium as a manifest writes it."""
    base = Path(out).resolve().parent
    if not media.is_file():
        raise ConvertError(f"{media} is missing; download it, or leave its entry out of the annotations")
    if not media.resolve().is_relative_to(base):
        raise ConvertError(f"{media} lies outside {base}; write the manifest to a folder that holds the media")
    return media.resolve().relative_to(base).as_posix()


def _said(words: str) -> Line:
    return {"text": words, "role": "target"}


def _line(key: str, segments: list[Line], **metadata: Any) -> Line:
    return {"id": key, "metadata": metadata, "segments": segments}


def _write(out: Path, lines: Iterable[Line]) -> int:
    """All lines or no file."""
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    draft, count = out.with_name(out.name + ".part"), 0
    try:
        with draft.open("w", encoding="utf-8") as file:
            for line in lines:
                file.write(json.dumps(line, separators=(",", ":")) + "\n")
                count += 1
        draft.replace(out)
    finally:
        draft.unlink(missing_ok=True)
    return count


def main() -> None:
    """`python -m weft.benchmarks.harness.convert NAME --help`."""
    from jsonargparse import auto_cli

    count = auto_cli([coco, vqav2, librispeech, episodes])
    print(f"{count} documents")


if __name__ == "__main__":
    main()
