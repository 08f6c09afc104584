"""The regression gate: lines of a run against those of a reference.

The rule, for every line of the reference: the mean over seeds may move by max(declared tolerance, 3 × sigma), where
sigma is the standard deviation between the reference's own seeds. Further in the bad direction is ``worse``, which is
red; further in the good one is ``improved``, which is not, but is said, for a leak looks like progress. A line that is
not there is ``missing``, which is red; one that only the run has is ``new``.

Means are over the seeds that both have where the reference knows all seeds of the run, else over all seeds of each.
With the same seeds on the same machine values repeat exactly; on another one rounding leads training elsewhere, at most
as far as another seed does. Between means over m and k unlike seeds, 3 sigma are 3 / √(1/m + 1/k) standard errors: 4.6
for 3 against 10, 3.7 for 3 against 3. Of few seeds sigma itself is uncertain, so a reference should have more than the
three it needs. Facts (status, look-ahead, parity) have no spread: the worst seed counts.
"""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

from memory_bench.errors import UserError, unknown
from memory_bench.gate.lines import FACTS, Line

SIGMAS = 3.0
RED = ("worse", "missing")
WHAT = {
    "device": "the device",
    "data": "the data",
    "data_revision": "the revision of the data",
    "limits": "the limits of the budget",
    "options": "the options of the task",
    "training": "the training data or recipe",
    "backbone_revision": "the backbone's revision",
}


@dataclass(frozen=True, slots=True)
class Finding:
    """What became of one line.

    Attributes:
        verdict: ``holds``, ``worse``, ``improved``, ``missing`` or ``new``.
        line: of the reference; for ``new`` that of the run.
        before, now: the values that were compared; None where there is none.
        allowed: how far they may be apart.
    """

    verdict: str
    line: Line
    before: float | None
    now: float | None
    allowed: float | None

    @property
    def change(self) -> float | None:
        """``now - before``."""
        return None if self.before is None or self.now is None else self.now - self.before


@dataclass(frozen=True, slots=True)
class Comparison:
    """What the gate found.

    Attributes:
        findings: in the reference's order, then what is new.
        notes: sentences a reader must know.
        absent: labels of cells that were asked for and have no result; a mean over the other seeds would hide them.
    """

    findings: tuple[Finding, ...]
    notes: tuple[str, ...] = ()
    absent: tuple[str, ...] = ()

    def of(self, *verdicts: str) -> list[Finding]:
        """The findings with one of these verdicts."""
        return [f for f in self.findings if f.verdict in verdicts]

    @property
    def holds(self) -> bool:
        """Nothing is red."""
        return not self.of(*RED) and not self.absent


def compare(
    run: Sequence[Line],
    reference: Sequence[Line],
    declared: Mapping[str, float] | None = None,
    absent: Sequence[str] = (),
) -> Comparison:
    """Compare a run with a reference.

    Args:
        run: lines of the run.
        reference: lines of the reference.
        declared: tolerances by metric, instead of the reference's.
        absent: labels of cells without a result.

    Raises:
        UserError: the two are not comparable, or `declared` names a metric that the reference does not have.
    """
    for metric in declared or {}:
        if metric not in {line.metric for line in reference}:
            raise unknown("metric of the reference", metric, {line.metric for line in reference})
    _same_boards(run, reference)
    found: dict[tuple[str, ...], list[Line]] = {}
    for line in run:
        found.setdefault(line.identity, []).append(line)
    findings, pairs = [], []
    for line in reference:
        candidates = found.pop(line.identity, [])
        mine = next((c for c in candidates if c.setting == line.setting), candidates[0] if candidates else None)
        if mine is None:
            findings.append(Finding("missing", line, _centre(line, list(line.values)), None, None))
            continue
        _comparable(mine, line)
        pairs.append((mine, line))
        findings.append(_judge(mine, line, (declared or {}).get(line.metric, line.tolerance)))
    new = [Finding("new", lines[0], None, _centre(lines[0], list(lines[0].values)), None) for lines in found.values()]
    return Comparison((*findings, *new), tuple(_notes(pairs)), tuple(absent))


def _judge(run: Line, reference: Line, tolerance: float) -> Finding:
    shared = list(run.values) if run.values.keys() <= reference.values.keys() else list(reference.values)
    before, now = _centre(reference, shared), _centre(run, list(run.values))
    fact = reference.metric in FACTS
    allowed = tolerance if fact else max(tolerance, SIGMAS * reference.sigma)
    gain = now - before if reference.higher_is_better else before - now
    slack = allowed + 1e-9 * max(abs(before), abs(now))  # the sum that a mean is, in another order
    verdict = "holds" if abs(gain) <= slack else "improved" if gain > 0 else "worse"
    return Finding(verdict, reference, before, now, allowed)


def _centre(line: Line, seeds: Sequence[int]) -> float:
    """The value of a line over `seeds`: the mean, or the worst for facts."""
    values = [line.values[seed] for seed in seeds]
    if line.metric in FACTS:
        return min(values) if line.higher_is_better else max(values)
    return statistics.fmean(values)


def _same_boards(run: Sequence[Line], reference: Sequence[Line]) -> None:
    """Refuse a run that has a task of the reference, but on another backbone or under another budget."""
    have = {line.board for line in run}
    for task, backbone, budget in dict.fromkeys(line.board for line in reference):
        others = sorted((b, u) for t, b, u in have if t == task)
        if others and (backbone, budget) not in others:
            ours = " and ".join(f"backbone {b} under budget {u}" for b, u in others)
            raise UserError(
                f"Not comparable: the run has {task} with {ours}, the reference with backbone {backbone} under budget "
                f"{budget}."
            )


def _comparable(run: Line, reference: Line) -> None:
    """Refuse a pair of lines that were measured under other circumstances."""
    ours, theirs = asdict(run.setting), asdict(reference.setting)
    # An option that came with a later version has a default that changes nothing, or the numbers tell.
    ours["options"] = {k: v for k, v in ours["options"].items() if k in theirs["options"]}
    for name, what in WHAT.items():
        if ours[name] != theirs[name]:
            raise UserError(
                f"Not comparable: {what} of {run.model} on {run.task} is {_shown(ours[name], theirs[name])} in the run "
                f"and {_shown(theirs[name], ours[name])} in the reference."
            )


def _shown(value: object, other: object) -> str:
    """A value, or of a table those entries that differ."""
    if not isinstance(value, dict) or not isinstance(other, dict):
        return f"'{value}'"
    names = [n for n in sorted({*value, *other}) if value.get(n) != other.get(n)]
    return ", ".join(f"{n} = {value.get(n, 'not set')}" for n in names)


def _notes(pairs: Sequence[tuple[Line, Line]]) -> list[str]:
    """What differs without standing in the way, and what a reader must know of the data and seeds."""
    said: dict[str, None] = {}
    for run, reference in pairs:
        if "stand-in" in run.setting.data:
            said[
                f"{run.task}: these are numbers of a stand-in, in the run and in the reference: {run.setting.data}."
            ] = None
        for name in run.setting.options.keys() - reference.setting.options.keys():
            said[f"{run.task}: the reference does not know the option {name} = {run.setting.options[name]}."] = None
        if run.version != reference.version:
            said[f"{run.model} is version {run.version} here and {reference.version} in the reference."] = None
        for name, theirs in reference.versions.items():
            if (ours := run.versions.get(name, theirs)) != theirs:
                said[f"{name} is {ours} here and {theirs} in the reference."] = None
        if not run.values.keys() <= reference.values.keys():
            seeds = ", ".join(map(str, run.values))
            said[f"{run.task}: the reference does not have all of the seeds {seeds}, so means over other seeds are "
                 "compared."] = None  # fmt: skip
    return list(said)
