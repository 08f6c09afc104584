"""Data that travels with the package: reference cases and certificates under ``results/parity``."""

from pathlib import Path
from typing import Any

from memory_bench.errors import DataError
from memory_bench.files.artefacts import read_json
from memory_bench.files.shapes import CertificatesShape, conform

THIRD_PARTY = "third party"
"""Marks certificates on code that is not the authors', who released none."""


def results_folder() -> Path:
    """The folder of shipped data, in a checkout (editable install) or an installed wheel."""
    beside = Path(__file__).resolve().parent.parent / "results"
    return beside if (beside / "parity").is_dir() else Path(__file__).resolve().parent / "results"


def parity_folder() -> Path:
    """The folder of the shipped reference cases."""
    return results_folder() / "parity"


def read_certificates() -> dict[str, dict[str, Any]]:
    """Certificate of each model, as ``verify --write`` left them; empty where there are none."""
    return _certificates_file()["models"]


def read_measured() -> dict[str, dict[str, Any]]:
    """Measured look-ahead and added parameters of each model, as ``verify --write`` left them."""
    return _certificates_file()["measured"]


def _certificates_file() -> dict[str, dict[str, dict[str, Any]]]:
    """``certificates.json``, without entries where there is none.

    Raises:
        DataError: it is not what was written; nothing may then be said of any model's parity.
    """
    path = parity_folder() / "certificates.json"
    try:
        found = read_json(path)
        conform(CertificatesShape, found)
    except FileNotFoundError:
        return {"models": {}, "measured": {}}
    except ValueError as error:
        raise DataError(
            f"{path} is not used: {error}. `memory-bench verify --write` makes it again; an installed package is to be "
            "installed again."
        ) from error
    return found


def parity_text(certificate: dict[str, Any] | None) -> str:
    """For the leaderboard's column: ``exact``, ``max|Δ|=…``, or ``none``; marked where no case is of official code."""
    if not certificate or certificate.get("agree") != certificate.get("cases"):
        return "none"
    worst, sources = float(certificate["max_abs"]), certificate.get("sources") or [""]
    mark = f" ({THIRD_PARTY})" if all(str(source).endswith(f"({THIRD_PARTY})") for source in sources) else ""
    return ("exact" if worst == 0 else f"max|Δ|={worst:.0e}") + mark
