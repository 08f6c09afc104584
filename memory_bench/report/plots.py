"""Which plots a board has numbers for, and their files.

Figures are made without pyplot (no global state) and written without dates or random ids, so files repeat to the byte.
"""

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from memory_bench.cell import digest
from memory_bench.report.board import Board
from memory_bench.report.cut_panels import CUT, shown_cuts
from memory_bench.report.drawing import STYLE
from memory_bench.report.looks import looks
from memory_bench.report.panels import curves, forest, slices
from memory_bench.report.retention_panels import by_delay, delays, depth_by_length, depths, half_lives, retention
from memory_bench.report.rows import OVER
from memory_bench.report.sweeps import Sweep
from memory_bench.report.sweeps import draw as draw_sweep
from memory_bench.report.tables import short
from memory_bench.report.trade_offs import PRICES, prices, trade_off
from memory_bench.report.words import is_retention

if TYPE_CHECKING:
    from matplotlib.figure import Figure

RETENTION = {"retention": retention, "half_life": half_lives, "depth": depth_by_length, "delay": by_delay,
             **CUT}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Plot:
    """A plot of a board: ``kind`` says which, ``name`` is its file without ending."""

    kind: str
    caption: str
    name: str


@dataclass(frozen=True, slots=True)
class Drawn:
    """A plot's files."""

    plot: Plot
    png: bytes
    svg: bytes


def plots(board: Board) -> list[Plot]:
    """The plots of a board, without drawing them."""
    metric = short(board.metric)
    shown = {"headline": metric} if any(row.headline or row.status == OVER for row in board.rows) else {}
    if slices(board, "position"):
        shown["position"] = "loss by position"
    if len({at for _, points in slices(board, "distance") for at, _ in points}) > 1:
        shown["retention" if is_retention(board) else "distance"] = f"{metric} by distance"
    if is_retention(board):
        shown["half_life"] = "half-life"
    if any(depths(row, board.metric) for row in board.rows):
        shown["depth"] = f"{metric} by depth and length"
    delayed = delays(board)
    if len({at for _, points in delayed[1] for at, _ in points}) > 1:
        shown["delay"] = f"{short(delayed[0])} by delay"
    shown.update(shown_cuts(board))
    for kind, price in PRICES.items():
        if prices(board, kind):
            shown[kind] = f"{metric} against {price.caption}"
    return [Plot(kind, caption, f"{stem(board)}-{kind.replace('_', '-')}") for kind, caption in shown.items()]


def stem(board: Board) -> str:
    """How the files and the anchors of a board begin: names for a person, and what tells boards of one name apart."""
    names = re.sub(r"[^A-Za-z0-9_.-]+", "_", "-".join([board.task, board.backbone, board.budget.name]))
    rest = digest([board.data, board.cell.task.config, board.cell.limit, *filter(None, board.apart)])
    return f"{names}-{rest[:4]}"


def draw(board: Board, plot: Plot, labels: Sequence[str] = ()) -> "Figure":
    """One of the board's plots.

    Args:
        board: with the numbers.
        plot: of `plots`.
        labels: of all rows of the report, so that no two of them look the same; empty: the board's own.
    """
    import matplotlib as mpl

    look = looks(board, labels)
    with mpl.rc_context(STYLE):
        if plot.kind == "headline":
            return forest(board, look)
        if plot.kind in ("position", "distance"):
            return curves(board, look, plot.kind)
        if plot.kind in RETENTION:
            return RETENTION[plot.kind](board, look)
        return trade_off(board, look, plot.kind)


def render_sweep(sweep: Sweep, name: str, labels: Sequence[str] = ()) -> Drawn:
    """The plot of a sweep as files called `name`; `labels` as of `draw`."""
    import matplotlib as mpl

    with mpl.rc_context(STYLE):
        figure = draw_sweep(sweep, labels)
    return _files(Plot("sweep", sweep.heading, name), figure)


def render(board: Board, labels: Sequence[str] = ()) -> list[Drawn]:
    """All plots of a board as PNG and SVG, without dates and random ids; `labels` as of `draw`."""
    return [_files(plot, draw(board, plot, labels)) for plot in plots(board)]


def _files(plot: Plot, figure: "Figure") -> Drawn:
    return Drawn(plot, _bytes(figure, "png", dpi=130, metadata={"Software": None}),
                 _bytes(figure, "svg", metadata={"Date": None, "Creator": None}))  # fmt: skip


def _bytes(figure: "Figure", form: str, **options: Any) -> bytes:
    import matplotlib as mpl

    out = io.BytesIO()
    with mpl.rc_context(STYLE):
        figure.savefig(out, format=form, bbox_inches="tight", pad_inches=0.12, facecolor="white", **options)
    return out.getvalue()
