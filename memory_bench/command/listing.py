"""What `memory-bench list` shows. Facts come from sources; only other packages' plug-ins are imported."""

import json
import tomllib
from dataclasses import asdict, fields
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

from memory_bench import plugins
from memory_bench.axes import in_words
from memory_bench.budget import PRESETS, Budget, amount, preset_files
from memory_bench.card import NAMED
from memory_bench.errors import unknown
from memory_bench.published import reported
from memory_bench.shipped import parity_text, read_certificates, read_measured
from memory_bench.summaries import summarise

KINDS = ("models", "tasks", "backbones", "budgets", "suites", "reported")


def rows(what: str, data: Path | None, cache: Path) -> list[dict[str, Any]]:
    """The entries of one kind.

    Args:
        what: one of `KINDS`.
        data: folder of real data, or None.
        cache: the user's cache folder.

    Raises:
        UserError: no such kind.
    """
    if what == "models":
        return _models()
    if what == "tasks":
        return _tasks(data)
    if what == "backbones":
        return _backbones(cache)
    if what == "budgets":
        return [_budget(budget, file) for budget, file in zip(PRESETS.values(), preset_files().values(), strict=True)]
    if what == "suites":
        return _suites()
    if what == "reported":
        return reported.listed()
    raise unknown("list", what, KINDS)


def _models() -> list[dict[str, Any]]:
    certificates, measured = read_certificates(), read_measured()
    found: list[dict[str, Any]] = []
    for name, entry in plugins.installed("models").items():
        s = summarise(entry, name)
        why = plugins.broken("models", name, s.broken)
        certificate, facts = certificates.get(s.name), measured.get(s.name, {})
        found.append(
            {
                "name": s.name,
                "status": f"broken: {why}" if why else "installed",
                "summary": s.text,
                "families": list(s.constants.get("families", ("llama", "gpt2", "opt"))),
                "parity": parity_text(certificate),
                "certificate": certificate,
                "look_ahead": facts.get("look_ahead"),
                "axes": s.axes,
                "added_parameters": facts.get("added_parameters"),
                "source": s.constants.get("source", ""),
                "package": s.origin,
            }
        )
    return found


def _tasks(data: Path | None) -> list[dict[str, Any]]:
    from memory_bench.data.folder import FILES
    from memory_bench.data.library import MADE

    found: list[dict[str, Any]] = []
    for name, entry in plugins.installed("tasks").items():
        s = summarise(entry, name)
        need = str(s.constants.get("needs", ""))
        files = [f for f in _files(FILES, need) if data is not None and (data / f).is_file()]
        where = (
            "made by a program"
            if need in MADE
            else "real data in the folder"
            if files
            else "no stand-in: needs --data or the hub"
            if need == "wikitext103"
            else "stand-in, unless --data or the hub has it"
        )
        why = plugins.broken("tasks", name, s.broken)
        status = f"broken: {why}" if why else where
        found.append(
            {
                "name": s.name,
                "status": status,
                "summary": s.text,
                "headline": s.constants.get("headline", ""),
                "package": s.origin,
            }
        )
    return found + _families()


def _families() -> list[dict[str, Any]]:
    """Tasks that are named behind a colon; their docstring describes them all."""
    found = []
    for name, entry in plugins.installed("tasks.families").items():
        s = summarise(entry, name)
        status = f"broken: {s.broken}" if s.broken else "each has its own data"
        origin = {"headline": "", "package": s.origin}
        found.append({"name": f"{s.name}:<task>", "status": status, "summary": s.text, **origin})
    return found


def _files(table: Any, need: str) -> list[str]:
    """The file names the data folder has for a need, whatever the shape of the table."""
    value = table.get(need, ())
    if isinstance(value, str):
        return [value]
    values = value.values() if isinstance(value, dict) else value
    return [v for v in values if isinstance(v, str)]


def _backbones(cache: Path) -> list[dict[str, Any]]:
    folder, compared = cache / "backbones", _compared(cache)
    found = []
    for name, summary in NAMED.items():
        ready = any(p.is_dir() and p.suffix != ".part" for p in folder.glob(f"{name}*")) if folder.is_dir() else False
        parts = ["cached" if ready else "made or fetched when needed", *compared.pop(name, [])]
        found.append({"name": name, "status": "; ".join(parts), "summary": summary})
    found += [{"name": name, "status": "; ".join(said), "summary": ""} for name, said in sorted(compared.items())]
    kinds = "any Llama, Mistral, Qwen, SmolLM, Granite, GPT-2 or OPT causal LM that computes as its own forward pass"
    found.append({"name": "DIR or HUB_ID", "status": "", "summary": kinds})
    return found


def _compared(cache: Path) -> dict[str, list[str]]:
    """What comparisons with models' own forward passes found last, by backbone (`memory_bench.zoo.compared`)."""
    found: dict[tuple[str, str], str] = {}
    for file in sorted((cache / "agreement").glob("*.json"), key=lambda file: file.stat().st_mtime):
        try:
            r = json.loads(file.read_text(encoding="utf-8"))
            fine = f"as its own forward pass in {r['dtype']} up to {r['tokens']:,} tokens"
            found[r["name"], r["dtype"]] = f"refused in {r['dtype']}: {r['fault']}" if r["fault"] else fine
        except (OSError, ValueError, KeyError, TypeError):
            continue  # it will be made again
    by_name: dict[str, list[str]] = {}
    for (name, _), said in found.items():
        by_name.setdefault(name, []).append(said)
    return by_name


def _budget(budget: Budget, file: Traversable) -> dict[str, Any]:
    names = (f.name for f in fields(budget) if f.name not in ("name", "tasks", "own_curriculum"))
    limits = {name: getattr(budget, name) for name in names}
    shown = ", ".join(f"{k} {amount(k, v)}" for k, v in limits.items() if v is not None)
    text = f"{shown}. {_first_line(file.read_text(encoding='utf-8'))}"
    return {"name": budget.name, "status": "preset", "summary": text, "limits": asdict(budget)}


def _first_line(text: str) -> str:
    """What a TOML file says of itself in its first line; empty where that is no comment."""
    return text.splitlines()[0].lstrip("# ") if text.startswith("#") else ""


def _suites() -> list[dict[str, Any]]:
    found = []
    for file in sorted(resources.files("memory_bench.suites").iterdir(), key=lambda f: f.name):
        if file.name.endswith(".toml"):
            text = file.read_text(encoding="utf-8")
            found.append(
                {
                    "name": file.name.removesuffix(".toml"),
                    "status": "suite",
                    "summary": _first_line(text),
                    "options": tomllib.loads(text),
                }
            )
    return found


def text(entries: list[dict[str, Any]]) -> str:
    """One line per entry."""
    if not entries:
        return "Nothing to list."
    if "confidence" in entries[0]:
        return reported.text(entries)
    lines = []
    width = max((len(_cases(e)) for e in entries if "parity" in e), default=0)
    for e in entries:
        parts = [f"{e['name']:<18}"]
        if "parity" in e:
            look = e["look_ahead"]
            added = e["added_parameters"] or {}
            parts.append(f"parity {_cases(e):<{max(width, 21)}} look-ahead {'?' if look is None else look!s:<3}")
            parts.append(f"adds {added.get('tiny', 0):>7,} (tiny)" if added else f"{'':>19}")
        status = "" if e["status"] == "installed" else f"[{e['status']}] "
        if "axes" in e:
            parts.append(f"{in_words(e['axes'])}.")
        official = (e.get("certificate") or {}).get("sources")
        agrees = f" [{', '.join(official)}]" if official else ""
        lines.append("  ".join(parts) + f"  {status}{e['summary']}{agrees}")
    return "\n".join(lines)


def _cases(entry: dict[str, Any]) -> str:
    """How many reference cases of a model agree, and how closely."""
    certificate = entry["certificate"]
    return f"{certificate['agree']}/{certificate['cases']} {entry['parity']}" if certificate else str(entry["parity"])
