"""Which executor runs the jobs of a command, by its name."""

from pathlib import Path

from memory_bench.errors import UserError, unknown
from memory_bench.running.executors import Executor, Inline, Local
from memory_bench.running.options import Options

NAMES = ("inline", "local", "ray", "slurm")
CLUSTERS = ("ray", "slurm")


def engine(options: Options, workers: int, out: Path) -> Executor:
    """The executor that is asked for; nothing is started yet.

    Args:
        options: of the command.
        workers: cells side by side on this machine.
        out: the run's folder.

    Raises:
        UserError: there is none of that name, what it needs is not installed, or an option of another one is given.
    """
    if options.executor not in NAMES:
        raise unknown("executor", options.executor, NAMES)
    if options.ray_address and options.executor != "ray":
        raise UserError(f"--ray-address {options.ray_address} is of --executor ray; this is {options.executor}.")
    if options.executor == "ray":
        from memory_bench.running.on_ray import Ray

        return Ray(options.ray_address)
    if options.executor == "slurm":
        from memory_bench.running.on_slurm import Slurm

        return Slurm(out)
    return Inline() if options.executor == "inline" else Local(workers)
