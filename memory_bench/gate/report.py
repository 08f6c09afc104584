"""What the gate found: a short table for a terminal or a pull request, JUnit XML, JSON."""

import xml.etree.ElementTree as ET
from collections.abc import Sequence
from typing import Any

from memory_bench.gate.judge import RED, SIGMAS, Comparison, Finding
from memory_bench.gate.lines import FACTS, SEVERITY, Line
from memory_bench.report.layout import NONE, Table, to_markdown
from memory_bench.report.tables import PERCENT, number, scaled, short

COUNTED = ("added_parameters", "state_bytes", "eval_flops_per_token")
BESIDE = (*FACTS, *COUNTED, "learned")
COLUMNS = ("verdict", "model", "task", "what", "reference", "now", "change", "allowed")


def headline(found: Comparison) -> str:
    """The result in a sentence."""
    lines = [f for f in found.findings if f.verdict != "new"]
    worse, missing = (len(found.of(verdict)) for verdict in RED)
    if found.holds:
        return f"The gate holds: {len(lines)} lines, none worse, none missing."
    said = [f"{worse} worse"] if worse else []
    said += [f"{missing} missing"] if missing else []
    result = [f"of {len(lines)} lines {' and '.join(said)}"] if said else []
    if found.absent:
        models = ", ".join(dict.fromkeys(found.absent))
        result.append(f"{len(found.absent)} cell(s) without a result ({models}); the command that began them ends them")
    return f"REGRESSION: {'; '.join(result)}."


def warnings(found: Comparison) -> list[str]:
    """What must not be overlooked, in sentences."""
    improved = found.of("improved")
    said = []
    if improved:
        lines = "1 line is" if len(improved) == 1 else f"{len(improved)} lines are"
        said.append(
            f"IMPROVED: {lines} better than the reference allows for. A leak looks like progress: find out why before "
            "you write a new reference."
        )
    new = found.of("new")
    if new:
        models = ", ".join(dict.fromkeys(f"{f.line.model} on {f.line.task}" for f in new))
        said.append(f"New, and not compared with anything: {models}.")
    return [*said, *found.notes]


def text(found: Comparison) -> str:
    """For a terminal: what does not hold, else the headlines; then the result."""
    shown = _collapsed(found.of(*RED, "improved")) or _rows(f for f in found.findings if f.line.metric not in BESIDE and
                                                          not f.line.slice and f.verdict != "new")  # fmt: skip
    table = to_markdown(Table(COLUMNS, tuple(shown)))
    return "\n".join([table, "", headline(found), *warnings(found)])


def markdown(found: Comparison, reference: str) -> str:
    """For a comment on a pull request: the result, what does not hold, and every line behind a fold."""
    out = [f"### memory-bench: {headline(found)}", *(f"> {sentence}" for sentence in warnings(found))]
    shown = _collapsed(found.of(*RED, "improved"))
    if shown:
        out.append(to_markdown(Table(COLUMNS, tuple(shown))))
    every = to_markdown(Table(COLUMNS, tuple(_rows(found.findings))))
    out.append(f"<details><summary>All {len(found.findings)} lines, against <code>{reference}</code></summary>")
    out += [every, f"Allowed: the declared tolerance, or {SIGMAS:.0f} × the spread between the reference's seeds, "
            "whichever is more.", "</details>"]  # fmt: skip
    return "\n\n".join(out) + "\n"


def junit(found: Comparison) -> str:
    """JUnit XML with one test case a line; what is worse or missing is a failure."""
    cases = [f for f in found.findings if f.verdict != "new"]
    failures, count = str(len(found.of(*RED)) + len(found.absent)), str(len(cases) + len(found.absent))
    root = ET.Element("testsuites", name="memory-bench", tests=count, failures=failures)
    suite = ET.SubElement(
        root, "testsuite", name="memory-bench check", tests=count, failures=failures, errors="0", skipped="0"
    )
    for place, label in enumerate(found.absent, 1):
        case = ET.SubElement(suite, "testcase", classname="cells", name=f"{label} {place}")
        ET.SubElement(case, "failure", type="missing", message=f"{label}: a cell that was asked for has no result")
    for finding in cases:
        line = finding.line
        case = ET.SubElement(
            suite, "testcase", classname=".".join(line.board), name=" ".join(filter(None, (line.model, _what(line))))
        )
        if finding.verdict in RED:
            ET.SubElement(case, "failure", type=finding.verdict, message=_sentence(finding))
        elif finding.verdict == "improved":
            ET.SubElement(case, "system-out").text = _sentence(finding)
    ET.indent(root)
    return ET.tostring(root, encoding="unicode", xml_declaration=True) + "\n"


def to_json(found: Comparison) -> dict[str, Any]:
    """Plain data."""
    return {
        "holds": found.holds,
        "result": headline(found),
        "warnings": warnings(found),
        "absent": list(found.absent),
        "lines": [
            {
                "verdict": f.verdict,
                "task": f.line.task,
                "backbone": f.line.backbone,
                "budget": f.line.budget,
                "model": f.line.model,
                "metric": f.line.metric,
                "slice": f.line.slice,
                "reference": f.before,
                "now": f.now,
                "change": f.change,
                "allowed": f.allowed,
                "tolerance": f.line.tolerance,
                "sigma": f.line.sigma,
            }
            for f in found.findings
        ],
    }


def _collapsed(findings: Sequence[Finding]) -> list[tuple[str, ...]]:
    """Rows of a table; the missing lines of a model are one row."""
    gone: dict[tuple[str, str], list[Finding]] = {}
    for f in findings:
        if f.verdict == "missing":
            gone.setdefault((f.line.model, f.line.task), []).append(f)
    rows = [
        ("missing", model, task, _what(same[0].line) if len(same) == 1 else f"{len(same)} lines", *[NONE] * 4)
        for (model, task), same in gone.items()
    ]
    return rows + _rows(f for f in findings if f.verdict != "missing")


def _rows(findings: Any) -> list[tuple[str, ...]]:
    return [
        (
            f.verdict,
            f.line.model,
            f.line.task,
            _what(f.line),
            _value(f.before, f.line.metric),
            _value(f.now, f.line.metric),
            _change(f.change, f.line.metric),
            NONE if f.allowed is None else f"±{_distance(f.allowed, f.line.metric)}",
        )
        for f in findings
    ]


def _what(line: Line) -> str:
    """Metric and slice."""
    name = short(line.metric) if line.metric not in BESIDE else line.metric.replace("_", " ")
    return f"{name} {line.slice}" if line.slice else name


def _value(value: float | None, metric: str) -> str:
    if value is None:
        return NONE
    if metric == "status":
        return next(name.replace("_", " ") for name, rank in SEVERITY.items() if rank == value)
    if metric == "parity":
        return "certified" if value else "none"
    if metric == "learned":
        return f"{value:.0%} of seeds"
    if metric in ("look_ahead", *COUNTED):
        return f"{value:,.0f}" if value < 1e6 else scaled(value)
    return number(value, metric)


def _change(value: float | None, metric: str) -> str:
    if value is None or metric in ("status", "parity"):
        return NONE
    return f"{'−' if value < 0 else '+'}{_distance(abs(value), metric)}"


def _distance(value: float, metric: str) -> str:
    """A difference without its sign: shares in percentage points, the rest with a digit more than the value."""
    if metric in (*PERCENT, "learned"):
        return f"{100 * value:.1f} pt"
    if metric in (*FACTS, *COUNTED):
        return f"{value:,.0f}" if value >= 1 or value < 0.005 else f"{value:.1g}"
    return number(value, metric, spread=True)


def _sentence(f: Finding) -> str:
    """A finding for somebody who sees nothing else."""
    line = f.line
    name = f"{line.model} on {line.task}, {_what(line)}"
    if f.verdict == "missing":
        return f"{name}: missing in the run; the reference has {_value(f.before, line.metric)}"
    allowed = "" if f.allowed is None else f" (allowed ±{_distance(f.allowed, line.metric)})"
    before, now = _value(f.before, line.metric), _value(f.now, line.metric)
    return f"{name}: {f.verdict}, {before} in the reference, {now} now{allowed}"
