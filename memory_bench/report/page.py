"""``leaderboard.html``: one file with tables and plots inside; it loads nothing and needs no script."""

import html
import re
from collections.abc import Mapping, Sequence
from typing import Protocol

from memory_bench.report import cuts, distances, planned, sweeps, words
from memory_bench.report.beside import TITLE, Beside
from memory_bench.report.board import Board
from memory_bench.report.layout import NONE, Table
from memory_bench.report.plots import Drawn
from memory_bench.report.tables import held, look_ahead, pretrained, quality, spend

STYLE = """
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, sans-serif; color: #1b1b1b; background: #fff; max-width: 1180px; margin: 2rem auto;
       padding: 0 1.2rem; }
h1 { font-size: 1.7rem; margin-bottom: .3rem; } h2 { margin-top: 2.4rem; border-bottom: 2px solid #0072b2; }
h3 { margin: 1.8rem 0 .2rem; } p { margin: .3rem 0 .8rem; } .scope { color: #555; }
.warning { background: #fff4e5; border-left: 4px solid #e69f00; padding: .4rem .8rem; }
.scroll { overflow-x: auto; margin: .6rem 0 1rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .9rem; }
th, td { padding: .32rem .7rem; text-align: right; white-space: nowrap; border-bottom: 1px solid #e6e6e6; }
th { background: #f5f7f9; font-weight: 600; } th:first-child, td:first-child { text-align: left; font-weight: 600; }
th.text, td.text { text-align: left; } td.text { white-space: normal; min-width: 7rem; }
tr:hover td { background: #f8fbfd; }
td.none { color: #aaa; } figure { margin: 1rem 0; } figure svg { max-width: 100%; height: auto; }
dt { font-weight: 600; margin-top: .4rem; } dd { margin-left: 1.2rem; } nav a { margin-right: 1rem; }
summary { cursor: pointer; color: #0072b2; }
"""
TEXT = ("checkpoint", "tie", "learned?", "notes", "parity", "reported for", "verdict", "where", "plan")


class Shown(Protocol):
    """What a page needs of a report."""

    @property
    def name(self) -> str:
        """Of the run."""

    @property
    def boards(self) -> Sequence[Board]:
        """In the order they are shown."""

    @property
    def certificates(self) -> Mapping[str, str]:
        """Model to parity."""

    @property
    def axis(self) -> str:
        """By which rows are put together; empty: by their numbers alone."""

    @property
    def sweeps(self) -> "Sequence[sweeps.Sweep]":
        """Boards that differ in one limit of their budgets."""

    @property
    def warnings(self) -> Sequence[str]:
        """Sentences about files that could not be used."""

    def sections(self) -> list[tuple[str, list[Board], str]]:
        """(heading, boards, sentence where there is none)."""

    def beside(self, board: Board) -> Beside:
        """Published numbers beside a board's."""

    def legend(self) -> list[tuple[str, str]]:
        """What the columns mean."""


def page(report: Shown, drawn: Sequence[Sequence[Drawn]], swept: Sequence[Drawn] = ()) -> str:
    """The whole page.

    Args:
        report: to show.
        drawn: the plots of each of its boards.
        swept: the plots of its sweeps.
    """
    name = f"Leaderboard{f': {report.name}' if report.name else ''}"
    out = [f"<h1>{_text(name)}</h1>"]
    out += [f'<p class="warning">{_text(warning)}</p>' for warning in report.warnings]
    places = {id(board): i for i, board in enumerate(report.boards)}
    links = [f'<a href="#board-{i}">{_text(words.title(board))}</a>' for i, board in enumerate(report.boards)]
    out.append(f"<nav>{' '.join(links)}</nav>" if links else "<p>No results yet.</p>")
    for heading, boards, sentence in report.sections():
        out.append(f"<h2>{_text(heading)}</h2>")
        out += [f"<p>{_code(sentence)}</p>"] if sentence else []
        for board in boards:
            place = places[id(board)]
            out += _board(board, place, report.certificates, drawn[place], report.axis)
            out += _beside(report.beside(board))
    for number, (sweep, plot) in enumerate(zip(report.sweeps, swept, strict=True)):
        image = _inline(plot.svg.decode(), f"s{number}-")
        out += [f"<h2>{sweeps.TITLE}</h2><p>{_text(sweep.heading)}. Budgets are not paired.</p>", _table(sweep.table())]
        out.append(f'<figure role="img" aria-label="{_text(sweep.heading)}">{image}</figure>')
    if report.boards:
        terms = [f"<dt>{_text(term)}</dt><dd>{_code(meaning)}.</dd>" for term, meaning in report.legend()]
        out.append(f"<h2>How to read this</h2><dl>{''.join(terms)}</dl>")
        if note := words.percent_note(report.boards):
            out.append(f"<p>{_text(note)}</p>")
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<title>{_text(name)}</title>\n'
        f"<style>{STYLE}</style>\n</head>\n<body>\n" + "\n".join(out) + "\n</body>\n</html>\n"
    )


def _board(board: Board, place: int, certificates: Mapping[str, str], drawn: Sequence[Drawn], axis: str) -> list[str]:
    said = " ".join(s for s in (words.direction(board), words.levels(board), words.winners(board)) if s)
    out = [
        f'<h3 id="board-{place}">{_text(words.title(board))}</h3>',
        f'<p class="scope">{_text(words.scope(board))}</p>',
        *([f"<p>{_text(equal)}</p>"] if (equal := words.equal(board)) else []),
        *([f"<p>{_text(said)}</p>"] if said else []),
        *(f'<p class="warning">{_text(warning)}</p>' for warning in words.known_already(board)),
        _table(quality(board, axis)),
    ]
    if far := distances.table(board):
        said = distances.other_order(board)
        out += [f"<p>{_text(distances.heading(board))}</p>", _table(far), *([f"<p>{_text(said)}</p>"] if said else [])]
    for heading, cut in cuts.tables(board):
        out += [f"<p>{_text(heading)}</p>", _table(cut)]
    if board.ahead:
        out += ["<p>Look-ahead: these predictions could see text they predict, so they are not ranked.</p>"]
        out += [_table(look_ahead(board))]
    if board.pretrained:
        out += [f"<p>{_text(words.PRETRAINED)}</p>", _table(pretrained(board))]
    more = held(board)
    memory = f"<p>{words.HELD}</p>{_table(more)}" if len(more.columns) > 1 else ""
    out += [f"<details><summary>Cost</summary>{_table(spend(board, certificates))}{memory}</details>"]
    if plan := planned.table(board):
        out += [f"<details><summary>{planned.TITLE}</summary>{_table(plan)}</details>"]
    for number, plot in enumerate(drawn):
        image = _inline(plot.svg.decode(), f"b{place}p{number}-")
        caption = _text(f"{plot.plot.caption}: {words.title(board)}")
        out.append(f'<figure role="img" aria-label="{caption}">{image}</figure>')
    return out


def _beside(found: Beside) -> list[str]:
    """Published numbers, folded away like the costs; why there are none is said openly."""
    if found.refused:
        return [f"<p>{TITLE}: {_text(found.refused)}</p>"]
    more = f"<p>{_code(found.more)}</p>" if found.more else ""
    opened = " open" if any(pair.verdict.kind != "not comparable" for pair in found.pairs) else ""
    return (
        [f"<details{opened}><summary>{TITLE}</summary>{_table(found.table())}{more}</details>"] if found.pairs else []
    )


def _table(table: Table) -> str:
    def cell(tag: str, column: str, text: str) -> str:
        kinds = [kind for kind, holds in (("text", column in TEXT), ("none", text == NONE)) if holds]
        mark = f' class="{" ".join(kinds)}"' if kinds else ""
        return f"<{tag}{mark}>{_text(text)}</{tag}>"

    head = "".join(cell("th", column, column) for column in table.columns)
    rows = ["".join(cell("td", c, t) for c, t in zip(table.columns, row, strict=True)) for row in table.rows]
    body = "".join(f"<tr>{row}</tr>\n" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody></table></div>'


def _inline(image: str, prefix: str) -> str:
    """An SVG's element without its preamble, its ids made unique on the page."""
    image = image[image.index("<svg") :]
    image = re.sub(r"<metadata>.*?</metadata>", "", image, flags=re.S)
    image = re.sub(r'\bid="', f'id="{prefix}', image)
    image = re.sub(r'(xlink:href="#|url\(#)', rf"\g<1>{prefix}", image)
    return image.strip()


def _text(value: str) -> str:
    return html.escape(value, quote=True)


def _code(value: str) -> str:
    """Text whose parts in backticks are code."""
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", _text(value))
