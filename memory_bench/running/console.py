"""What a person sees while a run goes on: a bar per cell and an ETA of the grid, or plain lines without a terminal."""

import sys
from collections.abc import Iterable
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from memory_bench.record import Record
from memory_bench.running.apart import Event
from memory_bench.running.remaining import Remaining

PHASES = {
    "start": "starting",
    "backbone": "preparing backbone",
    "data": "encoding",
    "train": "training",
    "eval": "evaluating",
}


class Display:
    """Follows the events of an executor.

    Args:
        total: cells to run.
        quiet: say nothing.
        remaining: how long they take; without, all are taken to be alike.
    """

    def __init__(self, total: int, *, quiet: bool = False, remaining: Remaining | None = None) -> None:
        self.total, self.done, self.quiet = total, 0, quiet
        self.remaining = remaining or Remaining({})
        self._console = Console(stderr=True, highlight=False)
        self._bars: Progress | None = None
        self._tasks: dict[str, TaskID] = {}
        self._troubles: set[str] = set()

    def follow(self, events: Iterable[Event]) -> list[Record]:
        """All records, in the order they came."""
        records: list[Record] = []
        columns = [
            TextColumn("{task.description:<42}"),
            BarColumn(24),
            TextColumn("{task.fields[phase]:<20}"),
            TimeElapsedColumn(),
        ]
        live = self._console.is_terminal and not self.quiet
        self._bars = Progress(*columns, console=self._console, transient=False) if live else None
        if self._bars:
            self._bars.start()
        try:
            for event in events:
                if event.record is not None:
                    records.append(event.record)
                if event.ends:
                    self.remaining.end(event.cell.key)
                elif event.phase not in ("backbone", "prepared", "notice"):
                    self.remaining.begin(event.cell.key)
                self._show(event)
        finally:
            if self._bars:
                self._bars.stop()
        return records

    def _show(self, event: Event) -> None:
        if event.phase == "lost":
            self._lose(event)
            return
        if event.notice:  # also where all is quiet: something is not as it was
            self._line(f"Note: {event.notice}")
            return
        if self.quiet:
            return
        if event.record is not None:
            self.done += 1
            self._end(event.record)
            return
        if self._bars is None:
            if event.phase == "backbone":
                self._line(f"preparing backbone {event.cell.training.backbone.name}")
            return
        key, phase = event.cell.key, PHASES.get(event.phase, event.phase)
        if event.phase == "backbone":
            self._bars.console.print(f"preparing backbone {event.cell.training.backbone.name} …")
        elif key not in self._tasks:
            self._tasks[key] = self._bars.add_task(event.cell.title, total=1, phase=phase)
        else:
            self._bars.update(self._tasks[key], total=event.total, completed=event.done, phase=phase)

    def _lose(self, event: Event) -> None:
        """Say, of many cells once, why they have no result."""
        self.done += 1
        self._forget(event.cell.key)
        why = event.notice.removeprefix(event.cell.title)
        if why not in self._troubles:
            self._line(f"Note: {event.notice}")
        self._troubles.add(why)

    def _forget(self, key: str) -> None:
        if self._bars is not None and key in self._tasks:
            self._bars.remove_task(self._tasks.pop(key))

    def _end(self, record: Record) -> None:
        self._forget(record.key)
        headline = next((m for m in record.metrics), None)
        shown = f"{headline.metric} {headline.value:.4g}" if headline else record.detail
        text = f"{record.cell.title}: {record.status}, {shown}"
        self._line(f"[{self.done}/{self.total}, {self._eta()} left] {text}")

    def _line(self, text: str) -> None:
        if self._bars is not None:
            self._bars.console.print(text, markup=False)
        else:
            sys.stderr.write(text + "\n")
            sys.stderr.flush()

    def _eta(self) -> str:
        """Time left for the grid."""
        left = self.remaining.left()
        if left is None:
            return "unknown time"
        return f"{left / 60:.0f} min" if left >= 90 else f"{left:.0f} s"


def error(sentence: str) -> None:
    """A sentence on standard error."""
    Console(stderr=True, highlight=False, soft_wrap=True).print(sentence, markup=False)


def show(text: Any) -> None:
    """The result, on standard output."""
    sys.stdout.write(f"{text}\n")
