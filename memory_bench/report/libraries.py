"""The JavaScript that makes a page sortable and its charts alive: out of installed packages, packed into the page.

Charts are Vega-Lite's, as vl-convert-python brings it; the table is DataTables, as itables brings it. Nothing of them
is in this repository. Packed (gzip, base64) the three files are 0.66 MB instead of 1.6 MB; every browser since 2023
unpacks them. The page's policy names the hash of each script, so it runs these and nothing else.
"""

import base64
import gzip
import hashlib
import importlib.metadata
import importlib.resources
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from memory_bench.errors import MachineError
from memory_bench.files.artefacts import Notice, kept

PACKAGES = ("vl-convert-python", "itables")
EXPORT = re.compile(r"export\s*\{([^{}]*)\}\s*;?(?=\s*(/\*|//|$))")
"""What a module ends with; a script inside a page exports nothing, and puts the same under a name of the window."""


@dataclass(frozen=True, slots=True)
class Libraries:
    """What a page can be made with.

    Attributes:
        scripts: name to source, in the order in which they are started.
        style: of the table.
        said: which they are, with versions; where there are none, why, and what to do.
    """

    scripts: tuple[tuple[str, str], ...] = ()
    style: str = ""
    said: str = ""

    def __bool__(self) -> bool:
        return bool(self.scripts)


def missing(why: str) -> Libraries:
    """None, with the sentence that stands on the page instead."""
    return Libraries(said=f"This page has plain tables: {why}. `pip install memory-bench[page]` adds sorting, filters, "
                     "charts and details of every number to the next report.")  # fmt: skip


def find_libraries(folder: Path | None = None, notice: Notice = lambda sentence: None) -> Libraries:
    """The libraries of the packages that are installed here.

    Args:
        folder: where the bundle of Vega is kept, which takes two seconds to make; None: it is made.
        notice: told what was wrong with a kept one.
    """
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            return missing(f"the package {name} is not installed")
    try:
        charts = _kept_vega(folder, versions[PACKAGES[0]], notice) if folder else _vega()
        table, style = _table()
    except (ImportError, AttributeError, OSError, ValueError) as error:
        return missing(f"{' or '.join(PACKAGES)} is another than this version knows ({error})")
    said = f"Charts: {_chart_versions()} (vl-convert-python {versions[PACKAGES[0]]}); table: DataTables (itables "
    return Libraries((("charts", charts), ("table", table)), style, f"{said}{versions[PACKAGES[1]]}).")


def packed(text: str) -> str:
    """A text as it stands in the page: the same for the same text, without a date."""
    return base64.b64encode(gzip.compress(text.encode(), 9, mtime=0)).decode()


def source_hash(script: str) -> str:
    """How a policy names a script."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"


def as_script(module: str, names: dict[str, str]) -> str:
    """A module whose exports are put into the window: `names` maps what it exports to what the window calls it.

    Raises:
        ValueError: it does not export them.
    """
    found = list(EXPORT.finditer(module))
    if len(found) != 1:
        raise ValueError("its JavaScript is no module")
    pairs = [part.split(" as ") for part in found[0][1].split(",")]
    exported = {pair[-1].strip(): pair[0].strip() for pair in pairs}
    if absent := names.keys() - exported.keys():
        raise ValueError(f"its JavaScript does not export {', '.join(sorted(absent))}")
    said = "".join(f"window.{ours}={exported[theirs]};" for theirs, ours in names.items())
    return module[: found[0].start()] + said + module[found[0].end() :]


@cache
def _vega() -> str:
    import vl_convert

    return vl_convert.javascript_bundle("window.vegaEmbed=vegaEmbed;")


def _kept_vega(folder: Path, version: str, notice: Notice) -> str:
    path = folder / "page" / f"vega-embed-{version}.js"
    try:
        return kept(path, "the JavaScript of Vega", lambda to: _write(to, _vega()), notice).read_text(encoding="utf-8")
    except MachineError:  # a cache that cannot be written to costs two seconds, not the report
        return _vega()


@cache
def _table() -> tuple[str, str]:
    folder = importlib.resources.files("itables") / "html"
    script, style = ((folder / f"dt_bundle.{end}").read_text(encoding="utf-8") for end in ("js", "css"))
    return as_script(script, {"default": "DataTable"}), style


def _chart_versions() -> str:
    import vl_convert

    return f"Vega {vl_convert.get_vega_version()}, Vega-Lite {vl_convert.get_vegalite_versions()[-1]}"


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
