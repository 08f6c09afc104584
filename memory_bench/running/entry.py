"""Entry of a worker process: it watches its parent from the first moment, then imports what it computes with."""

import sys

from memory_bench.running.orphans import watch


def main() -> int:
    """See `memory_bench.running.worker.main`."""
    watch()
    if sys.argv[1:] == ["--rank"]:
        from memory_bench.running.rank import main as beside

        return beside()
    from memory_bench.running.worker import main as work

    return work(sys.argv[1:])


if __name__ == "__main__":
    raise SystemExit(main())
