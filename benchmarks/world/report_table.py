"""The table of results: what was measured, how sure it is, what it is held against.

In: results, verdicts, specialists' scores. Out: HTML. In every row better is to the right, whatever the unit.
"""

from __future__ import annotations

from collections.abc import Mapping

from weft.benchmarks.world.evaluate import Result
from weft.benchmarks.world.report_charts import number, whisker
from weft.benchmarks.world.report_media import esc
from weft.benchmarks.world.report_verdicts import Scores, Verdict, control_mean
from weft.benchmarks.world.tasks import Task, passed

GROUPS: dict[str, tuple[str, ...]] = {
    "Understanding": (
        "image -> word",
        "speech -> word",
        "speech -> words",
        "video -> digit and direction",
        "image + speech -> sum",
        "redundant image + speech",
    ),
    "Making": ("word -> image", "half image -> rest", "word -> speech"),
    "Finding": ("retrieval",),
    "Acting": (),
    "Sensing": ("motor: forecast", "motor: fault"),
    "Language": ("prose",),
}
"""Heading -> tasks; the environments stand under Acting, a task of no group under the last heading."""


def grouped(results: Mapping[str, Result]) -> dict[str, list[str]]:
    """Heading -> names of results, in order; no empty headings."""
    found: dict[str, list[str]] = {heading: [n for n in names if n in results] for heading, names in GROUPS.items()}
    placed = {name for names in found.values() for name in names}
    for name, result in results.items():
        if name not in placed:
            found["Acting" if result.task.kind == "control" else "Language"].append(name)
    return {heading: names for heading, names in found.items() if names}


def figure(task: Task, value: float | None) -> str:
    """A value in the task's way of writing: shares as percent."""
    return number(value, task.kind not in ("control", "forecast", "bits"))


def ends(task: Task, verdict: Verdict, scores: Scores) -> tuple[float, float]:
    """(worst, best): the axis of a row."""
    if task.kind == "control":
        return 0.0, 104.0
    if task.kind == "bits":
        known = [float(s["value"]) for name, s in scores.items() if name.startswith(task.name)]
        every = [*known, *verdict.interval]
        return max(every) * 1.03, min(every) * 0.9
    if task.kind == "forecast":
        return max(1.1, verdict.value), 0.0
    return (0.0, 1.0) if task.higher else (1.0, 0.0)


def pill(passed_must: bool | None, reached: bool) -> str:
    """One word about a row."""
    if passed_must is None:
        return '<span class="pill open">no bar</span>'
    if reached:
        return '<span class="pill aim">aim reached</span>'
    return '<span class="pill must">must held</span>' if passed_must else '<span class="pill below">below must</span>'


def colour(passed_must: bool | None) -> str:
    """Of the dot."""
    return "var(--bad)" if passed_must is False else "var(--good)"


def specialist_cell(result: Result, verdict: Verdict, scores: Scores) -> str:
    """The specialist's figure and its name, and the second figure of a task that has one."""
    task = result.task
    if task.kind == "control":
        return f"100<small>expert, return {number(result.parts.get('expert'))}</small>"
    if task.kind == "bits":
        keys = [f"{task.name}{more}" for more in (", unigram", "", ", 5-gram")]
        rows = [scores[key] for key in keys if key in scores]
        return "".join(f"<small>{number(float(s['value']))} {esc(s['name'])}</small>" for s in rows) or "-"
    if task.specialist is None or task.specialist not in scores:
        return f"<small>{_nobody(task)}</small>"
    score = scores[task.specialist]
    if task.kind == "rest":
        ours = number(result.parts.get("mean absolute pixel error"))
        theirs = number(float(score["value"]))
        first = figure(task, verdict.specialist) if verdict.specialist is not None else ""
        return f"{first}<small>{esc(score['name'])}; pixel error {theirs}, ours {ours}</small>"
    return f"{figure(task, verdict.specialist)}<small>{esc(score['name'])}</small>"


def _nobody(task: Task) -> str:
    if task.chance:
        return f"none can; chance {figure(task, task.chance)}"
    return "none"


def row(result: Result, verdict: Verdict, scores: Scores) -> str:
    """One task."""
    task, e = result.task, result.estimate
    chart = whisker(
        verdict.value,
        verdict.interval,
        ends(task, verdict, scores),
        must=verdict.must,
        aim=verdict.aim,
        specialist=None if task.kind == "control" else verdict.specialist,
        chance=task.chance if task.kind not in ("control", "bits") else None,
        colour=colour(verdict.passed if task.kind != "control" else passed(task, verdict.value)),
    )
    unit = "answers" if task.drop else {"control": "episodes", "retrieval": "queries"}.get(task.kind, "documents")
    interval = f"{figure(task, verdict.interval[0]).removesuffix(' %')} to {figure(task, verdict.interval[1])}"
    status = "" if task.kind == "control" else pill(verdict.passed, verdict.reached)
    return (
        f"<tr><td>{esc(task.name)}<small>{esc(task.measure)}, {e.n} {unit}</small></td>"
        f'<td class="num"><b>{figure(task, verdict.value)}</b><small>{interval}</small></td><td>{chart}</td>'
        f'<td class="num">{_limit(task, verdict.must)}</td><td class="num">{_limit(task, verdict.aim)}</td>'
        f"<td>{specialist_cell(result, verdict, scores)}</td><td>{status}</td></tr>"
    )


def _limit(task: Task, value: float | None) -> str:
    if value is None:
        return "-"
    if task.kind in ("control", "forecast", "bits"):
        return number(value)
    return f"{100 * value:.0f} %"


def mean_row(results: Mapping[str, Result], found: Mapping[str, Verdict]) -> str:
    """The four environments together: what their must is about."""
    tasks = [r.task for r in results.values() if r.task.kind == "control"]
    value, low, high = control_mean(results)
    verdict = found[tasks[0].name]
    chart = whisker(value, (low, high), (0.0, 104.0), must=verdict.must, aim=verdict.aim, colour=colour(verdict.passed))
    return (
        f"<tr><td><b>mean of {len(tasks)}</b><small>normalised return: random 0, expert 100</small></td>"
        f'<td class="num"><b>{number(value)}</b><small>{number(low)} to {number(high)}</small></td><td>{chart}</td>'
        f'<td class="num">{number(verdict.must)}</td><td class="num">{number(verdict.aim)}</td><td></td>'
        f"<td>{pill(verdict.passed, verdict.reached)}</td></tr>"
    )


def table(results: Mapping[str, Result], found: Mapping[str, Verdict], scores: Scores) -> str:
    """The whole table."""
    head = "<tr><th>task</th><th class=num>one model</th><th>better to the right</th><th class=num>must</th>"
    head += "<th class=num>aim</th><th>specialist</th><th></th></tr>"
    body = []
    for heading, names in grouped(results).items():
        body.append(f'<tr class="group"><td colspan="7">{heading}</td></tr>')
        body += [row(results[name], found[name], scores) for name in names]
        if heading == "Acting":
            body.append(mean_row(results, found))
    keys = (
        f"<span>{_key(KEY_DOT)}measured, with its 95 % interval</span><span>{_key(KEY_BAND)}from must to aim</span>"
        f"<span>{_key(KEY_DIAMOND)}specialist on the same data</span><span>{_key(KEY_CHANCE)}chance</span>"
    )
    return (
        f'<div class="card scroll"><table class="results">{head}{"".join(body)}</table></div><div class="legend">{keys}</div>'
    )


KEY_DOT = (
    '<line x1="2" x2="26" y1="7" y2="7" stroke="var(--good)" stroke-width="4" opacity=".45"/>'
    '<circle cx="14" cy="7" r="5" fill="var(--good)"/>'
)
KEY_BAND = (
    '<rect x="6" y="1" width="16" height="12" fill="var(--good)" opacity=".13"/>'
    '<line x1="6" x2="6" y1="0" y2="14" stroke="var(--soft)"/>'
    '<line x1="22" x2="22" y1="0" y2="14" stroke="var(--soft)" stroke-dasharray="3 2"/>'
)
KEY_DIAMOND = '<path d="M14 2l5 5-5 5-5-5z" fill="var(--card)" stroke="var(--ink)" stroke-width="1.4"/>'
KEY_CHANCE = '<line x1="14" x2="14" y1="0" y2="14" stroke="var(--soft)" stroke-dasharray="1 3" stroke-width="1.5"/>'


def _key(inside: str) -> str:
    return f'<svg viewBox="0 0 28 14" width="28" height="14">{inside}</svg>'
