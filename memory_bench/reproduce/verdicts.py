"""What came of published claims: findings with effect, intervals, seeds and records, and how a person reads them."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from memory_bench.published.claims import Claim, Setup, Test
from memory_bench.report.layout import NONE, Table, to_markdown
from memory_bench.statistics.effects import NOT_RUN, Bounds, Effect, together

INTRODUCTION = """\
Every claim is a list of tests, and holds where all of them do. An effect is the difference in token perplexity, in
percent, of the first model against the second on the same texts, so that below zero is better; where something is
counted, the unit is named. It has two 95 % intervals: over documents (seeds averaged, bootstrap) and over seeds
(documents averaged, Student's t). A test holds where both intervals say so, does not hold where both say the opposite,
and cannot be told where they do not decide. Intervals are not corrected for the number of claims."""


@dataclass(frozen=True, slots=True)
class Finding:
    """What came of one test.

    Attributes:
        test: what must hold.
        length: tokens from the beginning that were compared; None: all.
        effect: None where something is missing.
        verdict: of `memory_bench.statistics.effects`.
        seeds: of the trainings, or of the draws.
        keys: of the records that the effect was computed from.
        why: what is missing.
    """

    test: Test
    length: int | None
    effect: Effect | None
    verdict: str
    seeds: tuple[int, ...] = ()
    keys: tuple[str, ...] = ()
    why: str = ""

    @property
    def title(self) -> str:
        """The test for a person."""
        t = self.test
        if t.kind == "parameters":
            return f"{t.left} adds {100 * t.low:g} to {100 * t.high:g} % to {t.backbone}"
        if t.kind == "pool":
            return f"{t.left}: rows left of a block, against the law (within {100 * t.tolerance:g} points)"
        if t.kind == "recall":
            return f"{t.left}: recall's weight on filler minus that on text"
        if t.kind == "share":
            return f"share of {t.left}'s gain over {t.base} that {t.right} does not have, {t.task}"
        words = {"lower": "below", "measure": "against"}.get(
            t.kind, f"{t.kind} than" if "worse" in t.kind else "equal to"
        )
        within = f" (within {100 * t.tolerance:g} %)" if t.tolerance else ""
        at = f", first {self.length:,} tokens" if self.length else ""
        return f"{t.left} {words} {t.right}{within}, {t.task}{at}"


@dataclass(frozen=True, slots=True)
class Verdict:
    """What came of one claim."""

    claim: Claim
    findings: tuple[Finding, ...]

    @property
    def word(self) -> str:
        """Whether it holds."""
        return together([f.verdict for f in self.findings])

    @property
    def measured(self) -> str:
        """The effects of its tests in their order, in percent."""
        return ", ".join(f"{f.effect.value:+.2f}" if f.effect else NONE for f in self.findings) + " %"

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {"claim": asdict(self.claim), "verdict": self.word, "findings": [asdict(f) for f in self.findings]}


def markdown(verdicts: Sequence[Verdict], setup: Setup, facts: Mapping[str, str]) -> str:
    """The page: verdicts in a table, every test with its numbers, and what was not run with what it needs.

    Args:
        verdicts: in the order of the page.
        setup: of the rows.
        facts: what else was the same for all, for example the data.
    """
    tested = [v for v in verdicts if v.findings]
    left = [v for v in verdicts if not v.findings]
    same = {"backbone": setup.backbone, "budget": setup.budget, **facts}
    out = ["# Published claims", INTRODUCTION, f"For all rows: {', '.join(f'{k} {v}' for k, v in same.items())}."]
    if tested:
        lines = tuple((v.claim.id, v.claim.says, v.claim.reported, v.measured, v.word) for v in tested)
        out += [
            "## Verdicts",
            to_markdown(Table(("claim", "what is said", "reported", "measured here", "verdict"), lines)),
        ]
        out.append("## Tests")
        for verdict in tested:
            out += _details(verdict)
    if left:
        wanting = tuple((v.claim.id, v.claim.says, v.claim.tier, v.claim.needs) for v in left)
        out += ["## Not run", to_markdown(Table(("claim", "what is said", "tier", "needs"), wanting))]
    return "\n\n".join(out) + "\n"


def _details(verdict: Verdict) -> list[str]:
    claim = verdict.claim
    head = ("test", "effect", "documents", "seeds", "n", "seeds n", "verdict")
    keys = list(dict.fromkeys(key for f in verdict.findings for key in f.keys))
    seeds = sorted({seed for f in verdict.findings for seed in f.seeds})
    out = [f"### {claim.id}: {verdict.word}", f"{claim.says}. {claim.source}; reported: {claim.reported}."]
    out += [f"Differs from the paper: {claim.differs}."] if claim.differs else []
    if claim.evidence:
        out.append(f"Published numbers (`memory-bench list reported`): {', '.join(f'`{e}`' for e in claim.evidence)}.")
    out.append(to_markdown(Table(head, tuple(map(_line, verdict.findings)))))
    if verdict.word != NOT_RUN:
        out.append(f"Seeds {', '.join(map(str, seeds))}; records {', '.join(f'`{key}`' for key in keys)}.")
    return out


def _line(finding: Finding) -> tuple[str, ...]:
    e = finding.effect
    if e is None:
        return finding.title, finding.why, "", "", "", "", finding.verdict
    unit = "" if e.unit == "perplexity" else f" of {e.unit}"
    intervals = _range(e.documents), _range(e.seeds)
    return finding.title, f"{e.value:+.2f} %{unit}", *intervals, str(e.n), str(e.count), finding.verdict


def _range(bounds: Bounds) -> str:
    return f"{bounds[0]:+.2f} to {bounds[1]:+.2f}"
