"""What the product writes and reads again: written whole, with a checksum that is checked when it is read.

There are three kinds, and each carries its checksum so that a kill between two writes leaves what is right or what is
noticed, never something else that passes:

- A JSON file has it inside, under ``sha256``: of its other entries, however they are laid out.
- A folder has a file ``SHA256SUMS`` that lists all others, a single file has ``NAME.sha256`` beside it. Their first
  line says what was to be kept, so that another's files are told apart; ``sha256sum --check`` reads both.
- A cell's samples are vouched for by its record (`memory_bench.store`).

What does not fit is never used: whoever reads it makes it again and says so.
"""

import errno
import hashlib
import json
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

from filelock import FileLock

from memory_bench.errors import MachineError
from memory_bench.files.plain import json_value

CHECKSUM = "sha256"
"""The entry of a JSON file that holds the checksum of the others."""
SUMS = "SHA256SUMS"
UNWRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT)
"""Where no lock can be made, as in a read-only cache or a full one, whatever is complete can still be used."""
RECENT = 2_000_000_000  # nanoseconds in which a file system's clock may not tell two changes apart

Notice = Callable[[str], None]
"""Told a sentence about something that did not fit and is made again."""

_REASONS = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "a file may not become so large",
    errno.EIO: "the disk could not be written",
    errno.ESTALE: "the network folder went away",
    errno.EMFILE: "too many files are open",
    errno.ENFILE: "too many files are open",
    errno.EACCES: "writing there is not permitted",
    errno.EPERM: "writing there is not permitted",
    errno.EROFS: "it is on a read-only file system",
    errno.ENOTDIR: "part of the path is a file",
    errno.EEXIST: "a file of that name is in the way",
    errno.EISDIR: "a folder of that name is in the way",
    errno.ENAMETOOLONG: "the path is too long",
    errno.ENOENT: "no folder can be made there",
    errno.ENODEV: "no folder can be made there",
    errno.ENXIO: "no folder can be made there",
    errno.EINVAL: "no file can have that name there",
    errno.ELOOP: "its links go round in a circle",
    errno.EOPNOTSUPP: "nothing can be written there",
}


class Damaged(ValueError):
    """A file does not hold what was written into it; the text says how, as the end of a sentence."""


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turn the operating system's refusals to write at `path` into a sentence.

    Raises:
        MachineError: full disk, no permission, read-only file system, a file where a folder should be, or a place
            in which nothing can be made.
    """
    try:
        yield
    except OSError as error:
        reason = _REASONS.get(error.errno or 0)
        if reason is None:
            raise
        raise MachineError(f"Cannot write to {path}: {reason}. Choose another folder with --out.") from error


def write_atomically(path: Path, content: bytes | str) -> None:
    """Write a file so that a reader sees the old content or the new one, never a part; makes its folder.

    Raises:
        MachineError: as of `explained`.
    """
    data = content.encode() if isinstance(content, str) else content
    with explained(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
        try:
            with temporary.open("xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def checked_json(value: dict[str, Any]) -> str:
    """Indented JSON of `value` with its checksum; NaN is an error."""
    plain = json.loads(json.dumps(value, allow_nan=False))  # keys that are numbers become text before they are summed
    return json.dumps({**plain, CHECKSUM: checksum_of(plain)}, indent=1, ensure_ascii=False) + "\n"


def write_json(path: Path, value: dict[str, Any]) -> None:
    """As of `checked_json`, written atomically.

    Raises:
        MachineError: as of `explained`.
    """
    write_atomically(path, checked_json(value))


def read_json(path: Path) -> dict[str, Any]:
    """What `write_json` wrote, with the checksum; a file without one (an older version wrote it) is taken as it is.

    Raises:
        FileNotFoundError: there is none.
        Damaged: it cannot be read, is no JSON object, or not what was written.
    """
    try:
        value = json_value(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or (error.args[0] if error.args else type(error).__name__)
        raise Damaged(f"it cannot be read ({reason})") from error
    if not isinstance(value, dict):
        raise Damaged("it holds no JSON object")
    if CHECKSUM in value and value[CHECKSUM] != checksum_of({k: v for k, v in value.items() if k != CHECKSUM}):
        raise Damaged("it is not what was written there (its checksum differs)")
    return value


def checksum_of(value: Mapping[str, Any]) -> str:
    """SHA-256 of JSON data, however they are laid out in a file."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def sha256(path: Path) -> str:
    """SHA-256 of a file's content, 64 hexadecimal digits, read once per process as long as the file stays the same."""
    status = path.stat()
    if not settled(status):
        return _read_sum(path)
    return _known_sum(path, status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)


def settled(status: os.stat_result) -> bool:
    """The last change is so long ago that another one would show in the file's times."""
    return time.time_ns() - max(status.st_mtime_ns, status.st_ctime_ns) >= RECENT


@lru_cache(maxsize=4096)
def _known_sum(path: Path, *status: int) -> str:
    del status  # there so that a changed file is read again
    return _read_sum(path)


def _read_sum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def damage(path: Path, of: str) -> str:
    """Why the folder or file at `path` is not as `replacing` left it, as the end of a sentence; empty if it is.

    Args:
        path: of the folder or file.
        of: what is to be kept there, in one line; another's content does not fit.
    """
    return unfit(_sums_path(path), of, _files(path)) if path.exists() else "is missing"


def unfit(sums: Path, of: str, files: Mapping[str, Path] | None = None) -> str:
    """Why files are not those of the checksums that `vouch` wrote to `sums`, as the end of a sentence; empty if so.

    Without `files`, those that it lists, beside it.
    """
    try:
        told, listed = _read_sums(sums)
        files = {name: sums.parent / name for name in listed} if files is None else files
        if told != of:
            return f"belongs to another ({told[:80]})"
        if strange := sorted(set(files) ^ set(listed)):
            return f"lacks {strange[0]}" if strange[0] in listed else f"holds {strange[0]}, which was not written there"
        for name, expected in listed.items():
            if sha256(files[name]) != expected:
                what = "is" if sums == _beside(files[name]) else f"holds a {name} that is"
                return f"{what} not what was written there (its checksum differs)"
    except FileNotFoundError:
        return "has no checksums"
    except (OSError, ValueError) as error:
        return f"cannot be checked ({getattr(error, 'strerror', None) or error})"
    return ""


def vouch(sums: Path, of: str, files: Mapping[str, Path]) -> None:
    """Write the checksums of files, by name, to `sums`; `of` is what they are, in one line."""
    found = {name: _synced_sum(file) for name, file in files.items()}
    lines = [f"# {of}\n", *(f"{digits}  {name}\n" for name, digits in sorted(found.items()))]
    if sums.is_dir():
        remove(sums)
    with sums.open("w", encoding="utf-8") as file:
        file.write("".join(lines))
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def replacing(path: Path, of: str) -> Iterator[Path]:
    """Gives a free place beside `path` for a new file or folder, which then replaces `path` whole, with its checksums.

    Callers hold a lock. If the block fails, `path` stays as it was.

    Args:
        path: of the folder or file; the folder around it is made.
        of: as of `damage`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    remove(part)
    try:
        yield part
        vouch(part / SUMS if part.is_dir() else _beside(path), of, _files(part, path.name))
        if part.is_dir() or path.is_dir():
            remove(path)
        os.replace(part, path)
        _sync_folder(path.parent)
    except BaseException:
        remove(part)
        raise


@contextmanager
def held(lock: Path) -> Iterator[bool]:
    """Hold a lock in a cache that processes share; its folder is made. Gives whether the cache can be written to.

    Where nobody can write, nobody has to wait.
    """
    locked = FileLock(lock)
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        if lock.is_dir():
            remove(lock)
        locked.acquire()
    except OSError as error:
        if error.errno not in UNWRITABLE:
            raise
        yield False
        return
    try:
        yield True
    finally:
        locked.release()


def kept(path: Path, of: str, make: Callable[[Path], None], notice: Notice) -> Path:
    """`path` with what `make` once wrote there; made now where it is missing, and again where it is damaged.

    Args:
        path: of a folder or file in a cache that processes share.
        of: as of `damage`.
        make: writes it to the path it is given, which is free.
        notice: told of damage.

    Raises:
        MachineError: it is missing or damaged, and the cache cannot be written to.
    """
    with held(path.with_suffix(".lock")) as writable:
        problem = damage(path, of)
        if problem and not writable:
            raise MachineError(
                f"{path.parent.name}/{path.name} in the cache {problem}, and {path.parent} is read-only or full: name "
                "another with MEMORY_BENCH_CACHE."
            )
        if problem and path.exists():
            notice(f"{path.parent.name}/{path.name} in the cache {problem}: it is made again.")
        if problem:
            with replacing(path, of) as part:
                make(part)
    return path


def _sums_path(path: Path) -> Path:
    return path / SUMS if path.is_dir() else _beside(path)


def _beside(path: Path) -> Path:
    return path.with_name(f"{path.name}.sha256")


def _read_sums(path: Path) -> tuple[str, dict[str, str]]:
    """The first line's text and the checksums by name."""
    first, *lines = path.read_text(encoding="utf-8").split("\n")
    entries = [line.split("  ", 1) for line in lines if line]
    if not first.startswith("# ") or any(len(entry) != 2 for entry in entries):
        raise Damaged(f"{path.name} is not what was written there")
    return first[2:], {name: found for found, name in entries}


def _files(path: Path, name: str = "") -> dict[str, Path]:
    """All files of a folder by their place in it, or the one file by its name; hidden ones do not count."""
    if not path.is_dir():
        return {name or path.name: path}
    found = {p.relative_to(path).as_posix(): p for p in path.rglob("*") if not p.is_dir()}
    return {n: p for n, p in found.items() if n != SUMS and not any(part.startswith(".") for part in n.split("/"))}


def _synced_sum(path: Path) -> str:
    """A checksum of what is on the disk, not only on its way there."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
    return sha256(path)


def _sync_folder(path: Path) -> None:
    """A new name is on the disk too, where the system can say so."""
    with suppress(OSError):
        folder = os.open(path, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def remove(path: Path) -> None:
    """Take away a file or a folder, whatever it is; nothing where there is none."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
