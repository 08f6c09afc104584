"""Tables of text and how they are laid out in Markdown and LaTeX."""

from collections.abc import Sequence
from dataclasses import dataclass

NONE = "–"
"""Shown where there is nothing to say."""


@dataclass(frozen=True, slots=True)
class Table:
    """A heading row and rows of text; the first column is a name, the others are numbers or short words."""

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def without_empty_columns(self) -> "Table":
        """The table without columns in which nothing is said."""
        keep = [i for i in range(len(self.columns)) if any(row[i] != NONE for row in self.rows)]
        return Table(tuple(self.columns[i] for i in keep), tuple(tuple(row[i] for i in keep) for row in self.rows))


def to_markdown(table: Table) -> str:
    """A Markdown table whose columns are aligned, so that it also reads in a terminal."""
    cells = [[text.replace("|", "\\|") for text in row] for row in (table.columns, *table.rows)]
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
