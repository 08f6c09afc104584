"""``leaderboard.html``: one file to send around, which loads nothing and runs only the scripts whose hashes it names.

Without its libraries (`libraries.py`), without scripts and on paper it is complete: the table of all rows and every
board's tables are plain HTML. The script sorts and filters the first, draws charts of what is shown, and opens the
details of a number.
"""

import importlib.resources
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from memory_bench.report import page_data, page_sections, words
from memory_bench.report.commands import run_command
from memory_bench.report.libraries import Libraries, packed, source_hash
from memory_bench.report.page_sections import text
from memory_bench.report.page_table import table

SCRIPTS = ("start.js", "numbers.js", "charts.js", "details.js", "table.js", "page.js")
"""Of the folder `assets`, in the order in which they make up the page's own script."""


class Shown(page_data.Source, page_sections.Shown, Protocol):
    """What a page needs of a report."""

    @property
    def name(self) -> str:
        """Of the run."""

    @property
    def warnings(self) -> Sequence[str]:
        """Sentences about files that could not be used."""


def page(report: Shown, libraries: Libraries) -> str:
    """The whole page.

    Args:
        report: to show.
        libraries: to be put into it; none: the tables alone.
    """
    name = f"Leaderboard{f': {report.name}' if report.name else ''}"
    out = [f"<h1>{text(name)}</h1>", *_made(report)]
    out += [f'<p class="warning">{text(warning)}</p>' for warning in report.warnings]
    links = [f'<a href="#board-{i}">{text(words.title(board))}</a>' for i, board in enumerate(report.boards)]
    links += ['<a href="#legend">How to read this</a>'] if links else []
    out.append(f"<nav>{' '.join(links)}</nav>" if links else "<p>No results yet.</p>")
    if report.boards:
        out += ['<section id="all" aria-label="All results"><h2>All results</h2>', '<div id="tools"></div>',
                f'<div class="scroll wide">{table(report)}</div>', '<div id="charts"></div></section>']  # fmt: skip
    out += page_sections.boards(report)
    out += page_sections.legend(report)
    out.append(f"<footer><p>{text(libraries.said)}</p></footer>")
    out.append('<dialog id="details" aria-label="Details"></dialog>')
    scripts = _scripts(report, libraries) if report.boards and libraries else ""
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_policy(libraries)}">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta name="color-scheme" content="light dark">\n<title>{text(name)}</title>\n'
        f"<style>{_asset('page.css')}</style>\n</head>\n<body>\n" + "\n".join(out) + f"\n{scripts}</body>\n</html>\n"
    )


def _made(report: Shown) -> list[str]:
    """With which command, by which versions, when and from which code the run was made."""
    records = [record for board in report.boards for row in board.everything for record in row.records]
    told = [record.provenance for record in records]
    days = sorted(str(facts[end])[:10] for facts in told for end in ("started", "finished") if facts.get(end))
    commits = sorted({f"{str(f['commit'])[:12]}{' with changes' if f.get('dirty') else ''}"
                      for f in told if f.get("commit")})  # fmt: skip
    versions = sorted({f"{name} {value}" for f in told for name, value in (f.get("versions") or {}).items()})
    command = run_command(report.run, report.boards)
    when = f"Run {days[0]}{f' to {days[-1]}' if days[-1] != days[0] else ''}" if days else ""
    parts = [when, ", ".join(versions), f"commit {', '.join(commits)}" if commits else ""]
    said = " · ".join(part for part in parts if part)
    return [
        *([f'<p class="command"><code>{text(command)}</code></p>'] if command else []),
        *([f'<p class="scope">{text(said)}</p>'] if said else []),
    ]


def _policy(libraries: Libraries) -> str:
    """Nothing is loaded, and no script runs that is not named."""
    sources = [_own(), *(ready(name, source) for name, source in libraries.scripts)] if libraries else []
    scripts = " ".join(map(source_hash, sources)) or "'none'"
    return (
        f"default-src 'none'; script-src {scripts}; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; "
        "form-action 'none'"
    )


def _scripts(report: Shown, libraries: Libraries) -> str:
    """The data, the packed libraries, and the script that reads both."""
    stored: Mapping[str, str] = {
        **{f"library-{name}": packed(ready(name, source)) for name, source in libraries.scripts},
        "library-style": packed(libraries.style),
    }
    data: dict[str, Any] = page_data.content(report)
    return (
        f'<script type="application/json" id="data">{page_data.as_json(data)}</script>\n'
        + "".join(f'<script type="text/plain" id="{name}">{content}</script>\n' for name, content in stored.items())
        + f'<script type="module">{_own()}</script>\n'
    )


def ready(name: str, source: str) -> str:
    """A library that tells when it has been started."""
    return f'{source}\nwindow.dispatchEvent(new Event("ready-{name}"));\n'


def _own() -> str:
    return "".join(_asset(name) for name in SCRIPTS)


def _asset(name: str) -> str:
    return (importlib.resources.files("memory_bench.report") / "assets" / name).read_text(encoding="utf-8")
