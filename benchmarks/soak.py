"""Runs that are disturbed at random points, and continued: is anything lost, doubled or different?

    python benchmarks/soak.py [--points 200] [--seed 0] [--executor inline] [--json OUT]

One small run (a model, two tasks, one shared training) is made undisturbed for reference. Then, point by point, in a
fresh folder: the same command with one fault, and the same command again without it until it ends with 0 (three times
at most). What stands in the folder must then be what the reference holds: the same cells, once each, with the same
status, metrics and tokens, and no temporary files. Faults are drawn from a seeded generator:

- clock: KILL, TERM or HUP at a random moment, to the command, to one worker, or to its whole group;
- write: KILL of the very process that is about to make the n-th change to the disk (files opened for writing, renamed,
  made, removed), n drawn from all changes of the reference;
- full: a disk with room for a part of what the run writes (a small tmpfs; where mounting is not allowed, a limit on the
  size of files), and the same folder with room again;
- two: the same command twice at once;
- damage: a finished run, one of whose files was cut, emptied, flipped in one bit, or removed.

With the executor `inline` commands are forks of this process, which has loaded what they load and computed nothing: a
point takes seconds. With `local` each is a fresh process, and so are its workers.

Ends with 1 if any point is not `same`. Everything happens in a temporary folder.
"""

import argparse
import importlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import psutil

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
TRIES = 3
KINDS = ("clock", "write", "full", "two", "damage")
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGHUP)
LOADED = ("transformers.models.llama.modeling_llama", "memory_bench.command.preparing", "memory_bench.report.page",
          "memory_bench.report.plots", "memory_bench.running.worker")  # fmt: skip
# Counts changes to the disk in all processes of a run, and ends the one that is about to make number SOAK_AT.
HOOK = """
import os, signal, sys
_FOLDER, _AT = os.environ.get("SOAK_FOLDER", ""), int(os.environ.get("SOAK_AT", "0"))
if _FOLDER:
    _COUNTER = os.open(os.environ["SOAK_COUNTER"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    _CHANGES = {"os.rename": 2, "os.mkdir": 1, "os.remove": 1, "os.rmdir": 1, "os.symlink": 2, "os.truncate": 1}
    def _hook(event, args):
        if event == "open":
            if not isinstance(args[2], int) or not args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
                return
            paths = args[:1]
        elif event in _CHANGES:
            paths = args[:_CHANGES[event]]
        else:
            return
        if any(str(path).startswith(_FOLDER) for path in paths):
            os.write(_COUNTER, b".")
            if os.fstat(_COUNTER).st_size == _AT:
                os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(_hook)
"""


class Command(Protocol):
    """A running command: what is used of `subprocess.Popen`."""

    pid: int

    def wait(self) -> int:
        """The exit code, negative for a signal."""

    def poll(self) -> int | None:
        """As `wait`; None while it runs."""


class Forked:
    """`work` in a fork of this process, in a session of its own; what it returns is its exit code."""

    def __init__(self, work: Callable[[], int]) -> None:
        self._code: int | None = None
        self.pid = os.fork()
        if self.pid == 0:
            code = 1
            try:
                os.setsid()
                code = work()
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)

    def wait(self) -> int:
        """See `Command`."""
        if self._code is None:
            self._code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return self._code

    def poll(self) -> int | None:
        """See `Command`."""
        if self._code is None and (found := os.waitpid(self.pid, os.WNOHANG))[0]:
            self._code = os.waitstatus_to_exitcode(found[1])
        return self._code


@dataclass(frozen=True)
class Point:
    """A fault: its kind, and what was drawn for it."""

    kind: str
    what: str
    at: float = 0.0


@dataclass(frozen=True)
class Outcome:
    """What came of a point: ``same``, or what is wrong, and the exit codes on the way."""

    point: Point
    verdict: str
    codes: tuple[int, ...]
    seconds: float


class Soak:
    """One reference and any number of disturbed runs.

    Args:
        place: a temporary folder.
        executor: of the runs.
        say: told of each outcome.
    """

    def __init__(self, place: Path, executor: str, say: Callable[[str], None]) -> None:
        from tests.world import World, make_world

        self.place, self.executor, self.say = place, executor, say
        (place / "hook").mkdir()
        (place / "hook" / "sitecustomize.py").write_text(HOOK, encoding="utf-8")
        (place / "world").mkdir()
        root = place / "world"
        # In a child: what has computed may have threads, and cannot be forked.
        if Forked(lambda: 0 * len(str(make_world(root)))).wait():
            raise SystemExit("The data and the backbone of the runs could not be made.")
        self.world = World(root / "tiny-llama", root / "data", root / "little.toml", root / "cache")
        if executor == "inline":
            load()
        reference = place / "reference"
        started = time.monotonic()
        counter = place / "changes"
        hooked = self._environment(reference, counter, at=0)
        code = self._start(reference, hooked).wait()
        if code:
            raise SystemExit(f"The undisturbed run ended with {code}: {(place / 'said.log').read_text()[-2000:]}")
        self.seconds = time.monotonic() - started
        self.changes = counter.stat().st_size
        self.bytes = sum(path.stat().st_size for path in reference.rglob("*") if path.is_file())
        self.reference = results(reference)

    def _environment(self, out: Path, counter: Path | None = None, at: int = 0) -> dict[str, str]:
        own = {**os.environ, **self.world.environment(), "OMP_NUM_THREADS": "1"}
        if counter is not None:
            path = os.pathsep.join(filter(None, (str(self.place / "hook"), own.get("PYTHONPATH", ""))))
            own |= {"PYTHONPATH": path, "SOAK_FOLDER": str(out), "SOAK_COUNTER": str(counter), "SOAK_AT": str(at)}
        return own

    def _start(self, out: Path, environment: dict[str, str], room: int | None = None) -> Command:
        asked = ["run", "--models", "rmt", "--tasks", "pg19,pubmedqa", "--seeds", "1", "--no-controls", "--quiet"]
        asked += ["--out", str(out), *self.world.arguments("--executor", self.executor)]

        def limit() -> None:
            if room is not None:
                resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))

        with (self.place / "said.log").open("ab") as log:
            if self.executor == "inline":
                return Forked(lambda: self._inside(asked, environment, log.fileno(), limit))
            return subprocess.Popen(
                [sys.executable, "-m", "memory_bench", *asked], env=environment, stdout=log, stderr=log,
                start_new_session=True, cwd=self.place, preexec_fn=limit,
            )  # fmt: skip

    def _inside(self, asked: list[str], environment: dict[str, str], log: int, limit: Callable[[], None]) -> int:
        """A command in a fork: everything of a fresh process but its imports."""
        from memory_bench.cli import main as command

        os.chdir(self.place)
        os.environ.clear()
        os.environ.update(environment)
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
            os.dup2(log, stream.fileno())
        limit()
        exec(HOOK, {})
        try:
            command(asked)
        except SystemExit as end:
            return int(end.code or 0)
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
        return 0

    def draw(self, rng: random.Random, kind: str) -> Point:
        """A fault of a kind."""
        if kind == "clock":
            target = rng.choice(("command", "worker", "group"))
            return Point(kind, f"{rng.choice(SIGNALS).name} to the {target}", rng.uniform(0.05, 1.0))
        if kind == "write":
            return Point(kind, "", rng.randint(1, self.changes))
        if kind == "full":
            return Point(kind, "", rng.uniform(0.05, 0.95))
        if kind == "damage":
            return Point(kind, rng.choice(("cut", "emptied", "flipped", "removed")), rng.random())
        return Point(kind, "", rng.uniform(0.0, 0.5))

    def try_point(self, point: Point, number: int) -> Outcome:
        """The run with the fault, continued until it ends well; see the module."""
        out, started = self.place / f"point-{number}", time.monotonic()
        codes = list(getattr(self, f"_{point.kind}")(point, out))
        while len(codes) < TRIES + 1 and (len(codes) < 2 or codes[-1] != 0):
            codes.append(self._start(out, self._environment(out)).wait())
        verdict = self._judge(out, codes[-1])
        outcome = Outcome(point, verdict, tuple(codes), round(time.monotonic() - started, 1))
        self._forget(out)
        self.say(f"{number}: {point.kind} {point.what} {point.at:.3g}: {verdict}, exit codes {codes}")
        return outcome

    def _judge(self, out: Path, code: int) -> str:
        if code:
            return f"stuck: ends with {code} after {TRIES} more tries"
        found = results(out)
        if found.keys() - self.reference.keys():
            return "doubled: cells that the reference has not"
        if lost := self.reference.keys() - found.keys():
            return f"lost: {sorted(lost)}"
        if different := [key for key, value in found.items() if value != self.reference[key]]:
            return f"different: {different}"
        left = [p.name for p in out.rglob("*") if p.is_file() and (p.name.startswith(".tmp") or p.suffix == ".tmp")]
        return f"left behind: {left}" if left else "same"

    def _clock(self, point: Point, out: Path) -> list[int]:
        name, _, target = point.what.partition(" to the ")
        process = self._start(out, self._environment(out))
        time.sleep(point.at * self.seconds)
        children = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
        chosen = {"command": [process.pid], "worker": [c.pid for c in children[:1]]}.get(
            target, [process.pid, *(c.pid for c in children)]
        )
        for pid in chosen:
            try:
                os.kill(pid, signal.Signals[name])
            except ProcessLookupError:
                continue
        return [process.wait()]

    def _write(self, point: Point, out: Path) -> list[int]:
        counter = self.place / "counter"
        counter.unlink(missing_ok=True)
        return [self._start(out, self._environment(out, counter, int(point.at))).wait()]

    def _full(self, point: Point, out: Path) -> list[int]:
        out.mkdir()
        size = max(4096, int(point.at * self.bytes))
        mounted = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={size}", "soak", str(out)], capture_output=True, check=False
        )
        if mounted.returncode:
            return [self._start(out, self._environment(out), room=size).wait()]
        code = self._start(out, self._environment(out)).wait()
        subprocess.run(["mount", "-o", f"remount,size={10 * self.bytes + 10**7}", str(out)], check=True)
        return [code]

    def _two(self, point: Point, out: Path) -> list[int]:
        first = self._start(out, self._environment(out))
        time.sleep(point.at * self.seconds)
        second = self._start(out, self._environment(out))
        return [first.wait(), second.wait()]

    def _damage(self, point: Point, out: Path) -> list[int]:
        shutil.copytree(self.place / "reference", out, symlinks=True)
        files = sorted(path for path in out.rglob("*") if path.is_file() and path.stat().st_size)
        path = files[int(point.at * len(files))]
        content = bytearray(path.read_bytes())
        content[int(point.at * len(content))] ^= 1 << int(8 * point.at)
        damaged = {"cut": content[: len(content) // 2], "emptied": b"", "flipped": content}
        path.unlink()
        if point.what != "removed":
            path.write_bytes(damaged[point.what])
        return []

    def _forget(self, out: Path) -> None:
        subprocess.run(["umount", str(out)], capture_output=True, check=False)
        shutil.rmtree(out, ignore_errors=True)


def load() -> None:
    """Import what a run imports."""
    from memory_bench import plugins

    for name in LOADED:
        importlib.import_module(name)
    for kind, name in (("models", "rmt"), ("tasks", "pg19"), ("tasks", "pubmedqa")):
        plugins.load(kind, name)


def results(out: Path) -> dict[str, Any]:
    """What a folder holds, by cell: all that must not depend on how often a run was interrupted."""
    from memory_bench.store import Store

    found = {}
    for record in Store.open(out).records():
        plain = record.to_json()
        used = {name: plain["usage"][name] for name in ("train_tokens", "train_steps", "eval_tokens", "scored_tokens")}
        found[record.key] = [plain["status"], plain["metrics"], plain["learned"], used]
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """See the module."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--points", type=int, default=200, help="faults to try")
    parser.add_argument("--seed", type=int, default=0, help="of what is drawn")
    parser.add_argument("--kinds", default=",".join(KINDS), help="of faults, in turn")
    parser.add_argument("--executor", default="inline", help="of the runs")
    parser.add_argument("--json", type=Path, help="file for the outcomes")
    chosen = parser.parse_args(arguments)
    rng, kinds = random.Random(chosen.seed), chosen.kinds.split(",")
    with tempfile.TemporaryDirectory() as place:
        soak = Soak(Path(place), chosen.executor, lambda text: print(text, flush=True))
        print(f"reference: {soak.seconds:.1f} s, {soak.changes} changes to the disk, {len(soak.reference)} cells")
        points = [soak.draw(rng, kinds[i % len(kinds)]) for i in range(chosen.points)]
        outcomes = [soak.try_point(point, number) for number, point in enumerate(points)]
    bad = [o for o in outcomes if o.verdict != "same"]
    counted = Counter(o.point.kind for o in outcomes)
    print(f"{len(outcomes)} points ({', '.join(f'{n} {k}' for k, n in counted.items())}): {len(bad)} not the same")
    if chosen.json:
        chosen.json.write_text(json.dumps([asdict(o) for o in outcomes], indent=1) + "\n", encoding="utf-8")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
