"""`memory-bench run` in a process of its own, with workers that compute nothing: what does the command itself cost?

    python tests/waiting.py RUN-OPTION …

The last line on standard output is JSON: seconds of the processor, most bytes resident, big packages that are loaded,
all of the command's own process.
"""

import json
import re
import sys
import time
from functools import partial
from pathlib import Path

from memory_bench.cli import main
from memory_bench.command import engines
from memory_bench.running.executors import Local

WORKER = (sys.executable, str(Path(__file__).with_name("fake_worker.py")))
BIG = ("torch", "transformers", "pandas", "pyarrow", "matplotlib", "scipy")


def measured(arguments: list[str]) -> dict[str, object]:
    """Of the command with these options."""
    engines.Local = partial(Local, command=WORKER)  # type: ignore[misc, assignment]
    before = time.process_time()
    try:
        main(["run", *arguments])
        code = 0
    except SystemExit as end:
        code = int(end.code or 0)
    seconds = time.process_time() - before
    most = re.search(r"^VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text(), re.M)
    loaded = [name for name in BIG if name in sys.modules]
    return {"code": code, "seconds": seconds, "bytes": 1024 * int(most[1] if most else 0), "loaded": loaded}


if __name__ == "__main__":
    sys.stdout.write(json.dumps(measured(sys.argv[1:])) + "\n")
