"""A worker that computes nothing: it files a record for its cell at once. Its command line is that of the real one."""

import json
import sys
from pathlib import Path

from memory_bench.budget import Usage
from memory_bench.record import Record, provenance
from memory_bench.running.job import Job
from memory_bench.store import Store


def main(arguments: list[str]) -> None:
    """The last argument is a job file; what has to be prepared is there."""
    if "--prepare" in arguments:
        return
    job = Job.from_json(json.loads(Path(arguments[-1]).read_text(encoding="utf-8")))
    facts = provenance(device=job.device, threads=job.threads, started="2026-01-01T00:00:00+00:00")
    Store(job.out).write_record(Record(job.cell, "ok", "", (), Usage(), facts, None, {}), None)


if __name__ == "__main__":
    main(sys.argv[1:])
