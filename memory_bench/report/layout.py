"""Tables of text and how they are laid out in Markdown and LaTeX."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

NONE = "–"
"""Shown where there is nothing to say."""
MARKUP = (
    (r"\\(?=[!-/:-@\[-`{-~])", r"\\\\"), (r"([`*])", r"\\\1"), (r"<(?=[A-Za-z/!?])", r"\<"), (r"&(?=#?\w+;)", r"\&"),
    (r"(?<!\w)_|_(?!\w)", r"\_"), (r"\[(?=[^\]]*\][(\[:])", r"\["), (r"~(?=~)|(?<=~)~", r"\~"), (r"\$(?=.*\$)", r"\$"),
    (r"(?<=http):(?=//)|(?<=https):(?=//)", r"\:"), (r"\b(www)\.", r"\1\."), (r"[\r\n\v\f\u2028\u2029]+", " "),
)  # fmt: skip
"""What Markdown would take for markup, and how it is written so that it is text; in the order of replacing."""


@dataclass(frozen=True, slots=True)
class Table:
    """A heading row and rows of text; the first column is a name, the others are numbers or short words."""

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def without_empty_columns(self) -> "Table":
        """The table without columns in which nothing is said."""
        keep = [i for i in range(len(self.columns)) if any(row[i] != NONE for row in self.rows)]
        return Table(tuple(self.columns[i] for i in keep), tuple(tuple(row[i] for i in keep) for row in self.rows))


def plain_markdown(text: str) -> str:
    """A text of whatever origin (a label, a title of a book) as Markdown that shows it and is no markup."""
    for pattern, instead in MARKUP:
        text = re.sub(pattern, instead, text)
    return text


def sentence_markdown(text: str) -> str:
    """The same for a sentence of ours with something in it, whose parts in backticks are code."""
    parts = re.split(r"(`[^`\n]+`)", text)
    return "".join(part if i % 2 else plain_markdown(part) for i, part in enumerate(parts))


def to_markdown(table: Table) -> str:
    """A Markdown table whose columns are aligned, so that it also reads in a terminal; its texts are no markup."""
    cells = [[plain_markdown(text).replace("|", "\\|") for text in row] for row in (table.columns, *table.rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(table.columns))]

    def line(row: Sequence[str]) -> str:
        return "| " + " | ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)) + " |"

    rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    return "\n".join([line(cells[0]), rule, *map(line, cells[1:])])


def to_tex(table: Table) -> str:
    """A LaTeX ``tabular`` that needs no package."""
    escapes = {"\\": r"\textbackslash{}", "%": r"\%", "_": r"\_", "&": r"\&", "#": r"\#", "$": r"\$", "{": r"\{",
               "}": r"\}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "−": "$-$", "–": "--", "<": "$<$",
               "Δ": r"$\Delta$", ">": "$>$", "·": r"$\cdot$", "|": r"$|$"}  # fmt: skip

    def line(row: Sequence[str]) -> str:
        return " & ".join("".join(escapes.get(c, c) for c in text) for text in row) + r" \\"

    return "\n".join([
        rf"\begin{{tabular}}{{{'l' * len(table.columns)}}}", r"\hline", line(table.columns), r"\hline",
        *map(line, table.rows), r"\hline", r"\end{tabular}", "",
    ])  # fmt: skip
