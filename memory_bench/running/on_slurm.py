"""Runs cells as jobs of Slurm, through submitit: cells that can start together and need the same are one array.

Where Slurm takes a job away (its time is up, another job comes first, its node is lost) it is queued again by itself,
runs the same cell in the same folder, and its training goes on from its last checkpoint if its recipe keeps any.
Partition, account, time limit and the like are taken from the environment as sbatch takes them (``SBATCH_PARTITION``,
``SBATCH_ACCOUNT``, ``SBATCH_TIMELIMIT`` …).
"""

import os
import secrets
import shutil
import subprocess
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from memory_bench.errors import UserError
from memory_bench.running import node
from memory_bench.running.cluster import Cluster, Needs, Task

PERIOD = 1.0  # seconds between two looks for what jobs have left
ASKED = 10.0  # seconds between two questions to Slurm
GONE = 3  # questions in a row after which a job that left nothing is believed to be gone
REQUEUES = 10  # of a job whose time was up
NOTICE = 30  # seconds before a job's end at which it is told
PATIENCE = 90.0  # seconds for Slurm to end a job whose worker it has ended
OVER = ("BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "TIMEOUT")


class Requeued(node.Call):
    """A call that Slurm may take away and run again; submitit calls `checkpoint` then."""

    def __call__(self) -> dict[str, str]:
        """See `node.Call`."""
        said = node.Call.__call__(self)
        if "lost" in said and self.taken_away():
            time.sleep(PATIENCE)  # the worker was told first; this process is ended here, or somebody killed the worker
        return said

    def checkpoint(self) -> Any:
        """End the worker, and ask for the same call again; None: it was asked for too often."""
        from submitit.helpers import DelayedSubmission

        if self.worker is not None:
            self.worker.kill()
        if int(os.environ.get("SLURM_RESTART_COUNT") or 0) >= REQUEUES:
            return None
        return DelayedSubmission(Requeued(self.job, self.asked, self.prepare, self.command))


class Slurm(Cluster):
    """See the module.

    Args:
        out: the run's folder; what submitit writes is in ``slurm`` in it.
        engine: ``slurm``, or ``local`` for processes of this machine under submitit's own launcher.
        command: see `Cluster`.

    Raises:
        UserError: submitit is not installed, or there is no Slurm here.
    """

    def __init__(self, out: Path, *, engine: str = "slurm", command: Sequence[str] = ()) -> None:
        super().__init__(command)
        self._submitit: Any = load()
        if engine == "slurm" and not (shutil.which("sbatch") and shutil.which("srun")):
            raise UserError("--executor slurm needs Slurm's sbatch on this machine; --executor local needs nothing.")
        self._folder, self._engine = out.resolve() / "slurm" / secrets.token_hex(4), engine
        self._jobs: dict[str, Any] = {}
        self._asked, self._missed = 0.0, dict[str, int]()
        self._telling = False

    def _submit(self, calls: Sequence[node.Call], wanted: Needs) -> list[Task]:
        """See `Cluster._submit`.

        Raises:
            UserError: Slurm refuses the jobs.
        """
        options = {"slurm_max_num_timeout": REQUEUES} if self._engine == "slurm" else {}
        executor = self._submitit.AutoExecutor(folder=self._folder, cluster=self._engine, **options)
        name = "backbone" if calls[0].prepare else "cell"
        asked: dict[str, Any] = {"timeout_min": wanted.minutes, "name": f"memory-bench-{name}"}
        asked |= {"cpus_per_task": wanted.cpus, "mem_gb": wanted.memory // 10**9}
        asked |= {"gpus_per_node": wanted.gpus} if wanted.gpus else {}
        if self._engine == "slurm":
            asked |= {"slurm_signal_delay_s": NOTICE, "slurm_array_parallelism": len(calls)}
            asked |= {"slurm_additional_parameters": {"requeue": True}}
        executor.update_parameters(**asked)
        try:
            jobs = executor.submit_array([Requeued(call.job, call.asked, call.prepare, call.command) for call in calls])
        except Exception as error:  # of many types
            reason = (str(error).strip().splitlines() or [type(error).__name__])[-1].rstrip(".")
            raise UserError(f"Slurm does not take the jobs: {reason}.") from error
        self._jobs |= {job.job_id: job for job in jobs}
        return [job.job_id for job in jobs]

    def _ended(self, tasks: Sequence[Task]) -> dict[Task, dict[str, str]]:
        time.sleep(PERIOD)
        there = set(os.listdir(self._folder))  # one look for all, which also makes a network folder look again
        ended = {task: self._said(task) for task in tasks if self._jobs[task].paths.result_pickle.name in there}
        if time.monotonic() - self._asked >= ASKED:
            self._asked = time.monotonic()
            states = self._states([task for task in tasks if task not in ended])
            for task, state in states.items():
                self._missed[task] = self._missed.get(task, 0) + 1 if state else 0
                if self._missed[task] >= GONE:
                    self._telling = True
                    ended[task] = {"taken": f"Slurm's job {task} ended without a word ({state}), see {self._folder}"}
        return ended

    def _said(self, task: Task) -> dict[str, str]:
        error = self._jobs[task].exception()
        if error is None:
            return dict(self._jobs[task].result())
        self._telling = True
        last = [line for line in str(error).splitlines() if line.strip(" -")]
        return {"taken": f"Slurm's job {task} was given up, see {self._folder} ({' '.join(last[-3:-2]) or error})"}

    def _states(self, tasks: Sequence[Task]) -> dict[Task, str]:
        """Of tasks how they have ended, empty for those that have not; none where Slurm does not answer."""
        if self._engine == "local":
            return {task: "" if self._jobs[task].state == "RUNNING" else "ended" for task in tasks}
        asked = ["squeue", "--noheader", "--array", f"--user={os.getuid()}", "--states=all", "--format=%i|%T"]
        try:
            told = subprocess.run(asked, capture_output=True, text=True, timeout=60, check=True).stdout
        except (OSError, subprocess.SubprocessError):  # it may be down for a while; its jobs are not
            return {}
        states = dict(line.strip().split("|", 1) for line in told.splitlines() if "|" in line)
        return {task: "forgotten" if task not in states else states[task] if states[task] in OVER else ""
                for task in tasks}  # fmt: skip

    def _cancel(self, tasks: Sequence[Task]) -> None:
        if self._engine == "local":
            for task in tasks:
                self._jobs[task].cancel()
            return
        ids = sorted(set(tasks))
        for start in range(0, len(ids), 500):
            with suppress(OSError, subprocess.SubprocessError):
                subprocess.run(["scancel", *ids[start : start + 500]], capture_output=True, timeout=60, check=False)

    def _leave(self) -> None:
        """What submitit wrote goes, unless there is something to be read in it."""
        if not self._telling:
            shutil.rmtree(self._folder, ignore_errors=True)
            with suppress(OSError):
                self._folder.parent.rmdir()


def load() -> Any:
    """Submitit's package.

    Raises:
        UserError: it is not installed.
    """
    try:
        import submitit
    except ImportError as error:
        raise UserError("--executor slurm needs submitit: pip install 'memory-bench[slurm]'.") from error
    return submitit
