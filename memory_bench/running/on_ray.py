"""Runs cells as tasks of a Ray cluster: the one that is there, or one on this machine that is started for the run.

Ray chooses the node by the cores, graphics processors and memory that a cell needs. A task whose node is lost is run
again on another one, as often as `RETRIES`; then its cell stays to be done.
"""

import os
import signal
import socket
import threading
from collections.abc import Sequence
from typing import Any

from memory_bench.errors import UserError
from memory_bench.running import cluster, node
from memory_bench.running.cluster import Cluster, Needs, Task

RETRIES = 3  # of a task whose node was lost
PERIOD = 1.0  # seconds until tasks that were handed in meanwhile are looked at too
STORE_BYTES = 100_000_000  # for objects of a cluster of our own: only sentences are passed
ADDRESS = "RAY_ADDRESS"
PATIENCE = 10.0  # seconds until a cluster answers


class Ray(Cluster):
    """See the module.

    Args:
        address: of a running cluster (``HOST:PORT``, or ``auto`` for the one that this machine is part of); empty: that
            in ``RAY_ADDRESS``, else one is started here.
        command: see `Cluster`.

    Raises:
        UserError: Ray is not installed.
    """

    def __init__(self, address: str = "", *, command: Sequence[str] = ()) -> None:
        super().__init__(command)
        self._ray: Any = load()
        self._address = address or os.environ.get(ADDRESS, "")
        self._own = False

    def _enter(self, jobs: Sequence[Any]) -> None:
        """Join the cluster; every node sees what it must and runs this code, and some node has what each cell needs.

        Raises:
            UserError: one of these is not so, or there is no cluster at the address.
        """
        if not self._ray.is_initialized():
            self._join()
        nodes = [found for found in self._ray.nodes() if found["Alive"]]
        self._ask(nodes)
        wanted = {cluster.needs(job, prepare=prepare): job for prepare in (True, False) for job in jobs}
        for asked, job in wanted.items():
            amounts = {"CPU": asked.cpus, "GPU": asked.gpus, "memory": asked.memory}
            if not any(all(one["Resources"].get(k, 0) >= v for k, v in amounts.items()) for one in nodes):
                raise UserError(
                    f"No node of the Ray cluster has {asked.cpus} cores, {asked.gpus} GPUs and "
                    f"{asked.memory / 1e9:.0f} GB of memory, as {job.cell.title} needs; `memory-bench plan` finds out "
                    "what a cell takes that nobody has measured yet."
                )

    def _join(self) -> None:
        _refuse_unreachable(self._address)
        given: dict[str, Any] = {"address": self._address or "local", "log_to_driver": False}
        given |= {"configure_logging": False, "logging_level": "error", "include_dashboard": False}
        if not self._address:
            given |= {"object_store_memory": STORE_BYTES}
        before = signal.getsignal(signal.SIGTERM)
        try:
            self._ray.init(**{k: v for k, v in given.items() if not self._address or k != "include_dashboard"})
            self._own = True
        except Exception as error:  # of many types; what is not there is a sentence
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
            where = f"There is no Ray cluster at {self._address}" if self._address else "Ray cannot be started here"
            raise UserError(f"{where}: {reason}.") from error
        finally:
            if threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGTERM, before)  # Ray has one of its own, which leaves in another way

    def _ask(self, nodes: Sequence[dict[str, Any]]) -> None:
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy as On

        ask = self._ray.remote(node.refusal)
        given = {"num_cpus": 0, "max_retries": 0}
        places = [On(found["NodeID"], soft=False) for found in nodes]
        answers = [ask.options(**given, scheduling_strategy=place).remote(self._wanted) for place in places]
        for found, answer in zip(nodes, answers, strict=True):
            try:
                sentence = self._ray.get(answer)
            except self._ray.exceptions.RayError as error:
                host, last = found["NodeManagerHostname"], str(error).strip().splitlines()[-1].rstrip(".")
                raise UserError(f"The machine {host} cannot run memory-bench: {last}.") from error
            if sentence:
                raise UserError(sentence)

    def _submit(self, calls: Sequence[node.Call], wanted: Needs) -> list[Task]:
        given = {"num_cpus": wanted.cpus, "num_gpus": wanted.gpus, "memory": wanted.memory, "max_retries": RETRIES}
        run = self._ray.remote(_run).options(**given)
        return [run.remote(call) for call in calls]

    def _ended(self, tasks: Sequence[Task]) -> dict[Task, dict[str, str]]:
        ended, _ = self._ray.wait(list(tasks), num_returns=1, timeout=PERIOD)
        return {task: self._said(task) for task in ended}

    def _said(self, task: Task) -> dict[str, str]:
        try:
            return dict(self._ray.get(task))
        except self._ray.exceptions.RayTaskError as error:  # the code there raised
            return {"taken": str(error).strip().splitlines()[-1]}
        except self._ray.exceptions.RayError as error:
            return {"taken": f"Ray lost it ({type(error).__name__})"}

    def _cancel(self, tasks: Sequence[Task]) -> None:
        for task in tasks:
            self._ray.cancel(task, force=True)

    def _leave(self) -> None:
        if self._own:
            self._ray.shutdown()
            self._own = False


def _refuse_unreachable(address: str) -> None:
    """Raise for an address at which nobody listens, of which Ray itself says so after minutes.

    Raises:
        UserError: so, or it is no address of this kind.
    """
    if address in ("", "auto", "local"):
        return
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=PATIENCE).close()
    except (OSError, ValueError, OverflowError) as error:
        where = "give HOST:PORT, or auto on a machine of the cluster"
        raise UserError(f"There is no Ray cluster at {address}: {error}; {where}.") from error


def load() -> Any:
    """Ray's package.

    Raises:
        UserError: it is not installed.
    """
    try:
        import ray
    except ImportError as error:
        raise UserError("--executor ray needs Ray: pip install 'memory-bench[ray]'.") from error
    return ray


def _run(call: node.Call) -> dict[str, str]:
    """On a node."""
    return call()
