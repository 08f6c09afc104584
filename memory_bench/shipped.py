"""Data that travels with the package: reference cases and certificates under ``results/parity``."""

import json
from pathlib import Path
from typing import Any


def results_folder() -> Path:
    """The folder of shipped data, in a checkout (editable install) or an installed wheel."""
    beside = Path(__file__).resolve().parent.parent / "results"
    return beside if (beside / "parity").is_dir() else Path(__file__).resolve().parent / "results"


def parity_folder() -> Path:
    """The folder of the shipped reference cases."""
    return results_folder() / "parity"


def read_certificates() -> dict[str, dict[str, Any]]:
    """Certificate of each model, as ``verify --write`` left them; empty where there are none."""
    path = parity_folder() / "certificates.json"
    if not path.is_file():
        return {}
    found: dict[str, dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["models"]
    return found


def read_measured() -> dict[str, dict[str, Any]]:
    """Measured look-ahead and added parameters of each model, as ``verify --write`` left them."""
    path = parity_folder() / "certificates.json"
    found: dict[str, dict[str, Any]] = (
        json.loads(path.read_text(encoding="utf-8"))["measured"] if path.is_file() else {}
    )
    return found


def parity_text(certificate: dict[str, Any] | None) -> str:
    """For the leaderboard's column: ``exact``, ``max|Δ|=…``, or ``none``."""
    if not certificate or certificate.get("agree") != certificate.get("cases"):
        return "none"
    worst = float(certificate["max_abs"])
    return "exact" if worst == 0 else f"max|Δ|={worst:.0e}"
