"""The report of a run: ``leaderboard.{md,csv,html,tex}`` and plots, made from the records' folder alone.

Building is a pure function of the folder: the bootstraps have fixed seeds and no file holds the time it was made, so a
report that is built twice is the same to the byte.
"""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from memory_bench.files.artefacts import explained, unfit, vouch, write_atomically
from memory_bench.report import cuts, distances, planned, sweeps, words
from memory_bench.report.beside import MEANING, TITLE, Beside, find_beside
from memory_bench.report.board import Board, collect
from memory_bench.report.layout import plain_markdown, sentence_markdown, to_markdown, to_tex
from memory_bench.report.libraries import Libraries, missing
from memory_bench.report.rows import Scorer
from memory_bench.report.tables import held, long_form, long_rows, look_ahead, pretrained, quality, spend
from memory_bench.store import Store

if TYPE_CHECKING:
    from memory_bench.report.plots import Drawn


PLAIN = missing("it was made without its libraries")
SUMS, PAGES = "leaderboard.sha256", "tables, page and plots of a run"


@dataclass(frozen=True)
class Report:
    """All boards of a run.

    Attributes:
        boards: in the order they are shown.
        certificates: model to parity (``exact``, ``max|Δ|=…``).
        warnings: sentences about files that could not be used.
        name: of the run.
        axis: of `memory_bench.axes.Axes`, by which the rows of a board are put together; empty: by numbers alone.
        run: ``run.json``; empty where there is none.
        libraries: what the page is made with.
    """

    boards: tuple[Board, ...]
    certificates: Mapping[str, str] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    name: str = ""
    axis: str = ""
    run: Mapping[str, Any] = field(default_factory=dict)
    libraries: Libraries = PLAIN

    def sections(self) -> list[tuple[str, list[Board], str]]:
        """(heading, boards, sentence) for equal tokens, equal FLOPs, others; the sentence where one is missing."""
        order = list(words.KINDS)
        ranked = sorted(self.boards, key=lambda board: order.index(board.kind))
        found = [(words.KINDS[kind], list(same), "") for kind, same in groupby(ranked, key=lambda board: board.kind)]
        return found + [(heading, [], sentence) for heading, sentence in words.missing_boards(self.boards)]

    @cached_property
    def sweeps(self) -> "list[sweeps.Sweep]":
        """Boards that differ in one limit of their budgets."""
        return sweeps.sweeps(self.boards)

    def _file(self, place: int) -> str:
        """Name of a sweep's plot, without ending."""
        first = self.sweeps[place].boards[0]
        stem = re.sub(r"[^A-Za-z0-9_.-]+", "_", f"{first.task}-{first.backbone}-by-{self.sweeps[place].limit}")
        return f"{stem}-{place}" if place else stem

    @cached_property
    def _besides(self) -> dict[int, Beside]:
        return {id(board): find_beside(board) for board in self.boards}

    def beside(self, board: Board) -> Beside:
        """Published numbers beside those of one of the boards."""
        return self._besides[id(board)]

    def legend(self) -> list[tuple[str, str]]:
        """What the columns mean."""
        compared = any(found.pairs for found in self._besides.values())
        plans = any(planned.table(board) for board in self.boards)
        more = [(planned.TITLE.lower(), planned.MEANING)] if plans else []
        return [*words.legend(self.boards), *more, *([(TITLE.lower(), MEANING)] if compared else [])]

    def markdown(self, *, links: bool = False) -> str:
        """The leaderboard for a person, also readable as plain text.

        Args:
            links: name the plots' files.
        """
        out = [f"# Leaderboard{f': {plain_markdown(self.name)}' if self.name else ''}"]
        out += [f"> Warning: {sentence_markdown(warning)}" for warning in self.warnings]
        if not self.boards:
            return "\n\n".join([*out, "No results yet."]) + "\n"
        for heading, boards, sentence in self.sections():
            out.append(f"## {heading}")
            out += [sentence] if sentence else []
            for board in boards:
                out += self._board(board, links)
        for place, sweep in enumerate(self.sweeps):
            out += [
                f"## {sweeps.TITLE}",
                f"{plain_markdown(sweep.heading)}. Each budget's board is above; budgets are not paired.",
            ]
            out += [to_markdown(sweep.table()), *([f"Plot: plots/{self._file(place)}.png"] if links else [])]
        legend = [f"- **{term}**: {meaning}." for term, meaning in self.legend()]
        if note := words.percent_note(self.boards):
            legend.append(f"- {note}")
        return "\n\n".join([*out, "## How to read this", "\n".join(legend)]) + "\n"

    def _board(self, board: Board, links: bool) -> list[str]:
        said = " ".join(s for s in (words.direction(board), words.levels(board), words.winners(board)) if s)
        out = [
            f"### {plain_markdown(words.title(board))}",
            *map(plain_markdown, filter(None, (words.scope(board), words.equal(board), said))),
            *(f"> Warning: {plain_markdown(warning)}" for warning in words.known_already(board)),
            to_markdown(quality(board, self.axis)),
        ]
        if far := distances.table(board):
            said = distances.other_order(board)
            out += [distances.heading(board), to_markdown(far), *([plain_markdown(said)] if said else [])]
        for heading, cut in cuts.tables(board):
            out += [heading, to_markdown(cut)]
        if board.ahead:
            out += ["Look-ahead: these predictions could see text they predict, so they are not ranked.",
                    to_markdown(look_ahead(board))]  # fmt: skip
        if board.pretrained:
            out += [words.PRETRAINED, to_markdown(pretrained(board))]
        out += ["Cost:", to_markdown(spend(board, self.certificates))]
        if len((more := held(board)).columns) > 1:
            out += [f"{words.HELD}:", to_markdown(more)]
        if plan := planned.table(board):
            out += [f"{planned.TITLE}:", to_markdown(plan)]
        found = self.beside(board)
        if found.pairs:
            out += [f"{TITLE}:", to_markdown(found.table()), *([found.more] if found.more else [])]
        elif found.refused:
            out.append(f"{TITLE}: {found.refused}")
        if links:
            from memory_bench.report.plots import plots

            out.append("Plots: " + ", ".join(f"[{plot.caption}](plots/{plot.name}.png)" for plot in plots(board)))
        return out

    def csv(self) -> str:
        """``leaderboard.csv``."""
        return long_form(self.rows())

    def rows(self) -> list[dict[str, object]]:
        """The lines of ``leaderboard.csv`` as plain data, for JSON."""
        return long_rows(self.boards, self.certificates)

    def tex(self) -> str:
        """The quality tables as LaTeX ``tabular`` environments, one a board."""
        return "\n".join(
            "".join(
                f"% {' '.join(said.split())}\n" for said in (words.title(board), words.scope(board), words.equal(board))
            )
            + to_tex(quality(board, self.axis))
            for board in self.boards
        )

    def drawn(self) -> "list[list[Drawn]]":
        """The plots of each board."""
        from memory_bench.report.plots import render

        return [render(board, self._labels) for board in self.boards]

    @property
    def _labels(self) -> list[str]:
        """Of all rows, among which no two shall look the same."""
        return sorted({row.label for board in self.boards for row in board.everything})

    def drawn_sweeps(self) -> "list[Drawn]":
        """The plots of `sweeps`."""
        from memory_bench.report.plots import render_sweep

        return [render_sweep(sweep, self._file(place), self._labels) for place, sweep in enumerate(self.sweeps)]

    def html(self) -> str:
        """The page, with everything it shows inside."""
        from memory_bench.report.page import page

        return page(self, self.libraries)

    def write(self, folder: Path) -> list[Path]:
        """Write tables, page and plots into `folder`, each file atomically.

        Returns:
            The files, the leaderboard first.

        Raises:
            UserError: the folder cannot be written to.
        """
        drawn = self.drawn()
        files: dict[str, str | bytes] = {
            "leaderboard.md": self.markdown(links=True),
            "leaderboard.csv": self.csv(),
            "leaderboard.tex": self.tex(),
            "leaderboard.html": self.html(),
        }
        for plot in (plot for plots in (*drawn, self.drawn_sweeps()) for plot in plots):
            files[f"plots/{plot.plot.name}.png"] = plot.png
            files[f"plots/{plot.plot.name}.svg"] = plot.svg
        for name, content in files.items():
            write_atomically(folder / name, content)
        with explained(folder):
            vouch(folder / SUMS, PAGES, {name: folder / name for name in files})
        return [folder / name for name in files]


def is_as_written(folder: Path) -> bool:
    """Whether the files that `Report.write` left in a folder are all there, unchanged; older ones have no checksums."""
    return not (folder / SUMS).is_file() or not unfit(folder / SUMS, PAGES)


def build(
    store: Store,
    tasks: Mapping[str, Scorer],
    certificates: Mapping[str, str] | None = None,
    *,
    keys: Collection[str] | None = None,
    axis: str = "",
    libraries: Libraries = PLAIN,
) -> Report:
    """The report of a store.

    Args:
        store: of a run.
        tasks: by name, for their metrics; where one is missing the records' own numbers are averaged.
        certificates: model to parity.
        keys: cells to show; None: all.
        axis: of `Report`.
        libraries: of `Report`.
    """
    boards = collect(store, tasks, keys)
    asked = store.run().get("grid", {}).get("cells", []) if keys is None else []
    if absent := sum(store.record(key) is None for key in asked):
        store.warn(f"{absent} of {len(asked)} cells that were asked for have no result (yet).")
    name = store.folder.resolve().name
    return Report(tuple(boards), dict(certificates or {}), tuple(store.warnings), name, axis, store.run(), libraries)
