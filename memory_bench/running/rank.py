"""A process of a training beside the first: it makes the same steps with its own rows of every batch, and nothing else.

It is told what to train on its standard input, line by line (`memory_bench.running.ranks`), until that is closed. It
reads no checkpoint, takes no lock and writes no result.
"""

import json
import os
import sys
import traceback
from dataclasses import replace
from typing import Any

import torch
from torch.distributed import DistError, TCPStore  # type: ignore[attr-defined]

from memory_bench.driver.meter import Following
from memory_bench.driver.others import Others
from memory_bench.driver.peers import Gone, Peers
from memory_bench.driver.train import train
from memory_bench.running.beginning import Begun, begin
from memory_bench.running.building import Parts, gather, over, window_training
from memory_bench.running.held import own_bytes
from memory_bench.running.job import Job
from memory_bench.running.ranks import GONE, HOST
from memory_bench.running.starting import settle
from memory_bench.store import Store


def main() -> int:
    """Entry of the process."""
    told = json.loads(sys.stdin.readline())
    job, rank = Job.from_json(told["job"]), int(told["rank"])
    if job.device.startswith("cuda"):
        job = replace(job, device=f"cuda:{rank}")
        torch.cuda.set_device(rank)
    torch.set_num_threads(job.threads)
    begun = begin(job, Store(job.out), lambda phase, done, total: None)
    settle()
    device, held = torch.device(job.device), own_bytes(os.getpid())
    sys.stdout.write(json.dumps({"held": held}) + "\n")
    sys.stdout.flush()
    os.dup2(2, 1)  # nobody reads on
    try:
        store = TCPStore(HOST, int(told["port"]), job.cell.training.processes, is_master=False)
        peers = Peers(store, rank, job.cell.training.processes, device, patience=float(told["patience"]))
        _serve(job, begun, peers, Following(job.cell.training.budget, device, others=Others(own_held=held)))
    except (Gone, DistError):
        return GONE
    return 0


def _serve(job: Job, begun: Begun, peers: Peers, meter: Following) -> None:
    """Train what the first process says, until it says no more."""
    own = gather(job.cell.training, begun.backbones, job.device, begun.encode)
    meters = {job.cell.training.key: meter}
    for line in sys.stdin:
        key = json.loads(line)["train"]
        parts = own if key == own.training.key else _window(own, begun)
        if key not in meters:
            meters[key] = meter.another()
        try:
            _train(parts, begun, peers, meters[key])
        except Gone:
            raise
        except Exception as error:  # the first process has it too
            if error is peers.mine:
                traceback.print_exc()


def _train(parts: Parts, begun: Begun, peers: Peers, meter: Any) -> None:
    with meter.phase("train"):
        with meter.aside():
            drawn = begun.corpus()
        train(parts.build, parts.config, parts.recipe, drawn, meter, seed=parts.training.seed, peers=peers)


def _window(own: Parts, begun: Begun) -> Parts:
    """Of the training of the window alone that `own` needs first."""
    first = window_training(own.training, begun.backbones)
    assert first is not None
    return over(first, own.loaded, begun.backbones, None, own.device)
