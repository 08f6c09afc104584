"""Processes that train one model together, each with some rows of every batch: what they say to each other.

Every process draws the same whole batches, reads its own rows of them, and makes the same optimiser step with the sum
of all gradients; so all hold the same weights, and nothing but the order of sums differs from one process that reads
the whole batch. The first one (rank 0) alone looks at limits and decides; an error of any is everybody's.

They speak in rounds, to which each brings one message (`_round`). Some only want what all have brought under one name;
one whose rows have ended meets the others, who still read, there. Rounds go over gloo, gradients of a GPU over nccl.
"""

import os
import pickle
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import psutil
import torch
import torch.distributed as dist
from torch import Tensor, nn

from memory_bench.corpus import Line

PATIENCE = 600.0  # seconds after which one that the others wait for is given up
BUCKET = 1 << 22  # numbers of gradients that are summed at once
LOOPBACK = {"linux": "lo", "darwin": "lo0"}
ERROR, ROWS = "error", "rows"
Found = TypeVar("Found")


class Gone(Exception):
    """Another process of the training has ended or does not answer."""


class Peers:
    """The processes of one training, as one of them sees them.

    Args:
        store: of `torch.distributed`, where they find each other.
        rank: of this process, from 0.
        size: how many there are.
        device: on which this one computes.
        patience: seconds to wait for the others.

    Attributes:
        mine: the error of this process that the others were told of; None: none.
        lending: rows are shown to the others; else nobody looks at a loss for which that is done.
    """

    def __init__(self, store: Any, rank: int, size: int, device: torch.device, *, patience: float = PATIENCE) -> None:
        self.rank, self.size, self.device = rank, size, device
        self.lending = False
        self.mine: Exception | None = None
        self._told: Exception | None = None  # the last one that all know of
        self._shown: dict[int, tuple[Sequence[Tensor], list[Sequence[Tensor]]]] = {}
        if (name := LOOPBACK.get(sys.platform, "")) in psutil.net_if_addrs():  # all are on one machine
            os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
        waiting = timedelta(seconds=patience)
        with _answering():
            dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=waiting)
            if on_gpu := device.type == "cuda":
                os.environ.setdefault("TORCH_NCCL_BLOCKING_WAIT", "1")  # one that is gone is an error, and no abort
            self._sums = dist.new_group(backend="nccl", timeout=waiting) if on_gpu else dist.group.WORLD

    def close(self) -> None:
        """Leave them."""
        if dist.is_initialized():
            dist.destroy_process_group()

    # Rounds

    def _round(self, name: str, brought: Any = None) -> list[tuple[str, Any]]:
        """What each has brought to this round, and under which name.

        Raises:
            Gone: one does not come.
            Exception: that of the first process that has brought one.
        """
        found: list[tuple[str, Any]] = [("", None)] * self.size
        try:
            with _answering():
                dist.all_gather_object(found, (name, brought))
        except Gone as error:
            self._told = error
            raise
        for rank, (kind, what) in enumerate(found):
            if kind == ERROR:
                own = self.mine if rank == self.rank else None
                content, text = what
                self._told = own or _unpacked(content, text, rank)
                raise self._told
        return found

    def met(self, name: str, brought: Any = None) -> list[Any]:
        """What all have brought under `name`, by rank; those who show rows meanwhile are waited for.

        Raises:
            Gone, Exception: as of `_round`.
        """
        while True:
            found = self._round(name, brought)
            if all(kind == name for kind, _ in found):
                return [what for _, what in found]
            if strange := [kind for kind, _ in found if kind not in (name, ROWS)]:
                raise RuntimeError(f"processes of a training are not at the same place: {name} and {strange[0]}")

    def decided(self, decide: Callable[[], Found]) -> Found:
        """What the first process decides; the others take it over."""
        found: Found = self.met("decided", decide() if self.rank == 0 else None)[0]
        return found

    @contextmanager
    def together(self) -> Iterator[None]:
        """An error of this process inside is raised by all.

        Raises:
            Gone, Exception: as of `_round`.
        """
        try:
            yield
        except Exception as error:
            if error is self._told:
                raise
            self.mine = error
            try:
                self._round(ERROR, _packed(error))
            except Gone:
                self._told = error
                raise error from None
            raise

    # Rows

    def own(self, lines: Sequence[Line]) -> list[Line]:
        """This process's lines of a batch: of unequal lengths each gets some; the first process has the longest."""
        order = sorted(range(len(lines)), key=lambda i: -len(lines[i]))
        return [lines[i] for i in order[self.rank :: self.size]]

    def gathered(self, tensors: Sequence[Tensor]) -> list[Sequence[Tensor]]:
        """See `memory_bench.protocol.Batch.gathered`.

        A step that is computed again in the backward pass gets what it got before.
        """
        if not self.lending:
            return []
        known = self._shown.get(id(tensors[0]))
        if known is None:
            shown = [t.detach().cpu() for t in tensors]
            found = self._round(ROWS, shown)
            others = [what for rank, (kind, what) in enumerate(found) if kind == ROWS and rank != self.rank]
            places = [t.device for t in tensors]
            known = tensors, [[t.to(p) for t, p in zip(one, places, strict=True)] for one in others]
            self._shown[id(tensors[0])] = known  # as long as they are kept, no other tensor is taken for them
        return known[1]

    def forget(self) -> None:
        """A batch is over."""
        self._shown.clear()

    # Weights and gradients

    def same(self, model: nn.Module) -> None:
        """Every process has the first one's weights and buffers."""
        self.met("weights")
        for tensor in (t for t in (*model.parameters(), *model.buffers()) if t.numel()):
            whole = tensor.detach().contiguous()
            with _answering():
                group = self._sums if tensor.is_cuda else dist.group.WORLD
                dist.broadcast(whole.reshape(-1).view(torch.uint8), 0, group=group)
            if self.rank and whole.data_ptr() != tensor.data_ptr():
                tensor.detach().copy_(whole)

    def add_up(self, parameters: Sequence[nn.Parameter], where: Sequence[Sequence[bool]]) -> None:
        """Gradients of all processes, added: `where` says of each process which parameters have one.

        Parameters for which none has one keep none.
        """
        anywhere = [any(has) for has in zip(*where, strict=True)]
        chosen = [p for p, some in zip(parameters, anywhere, strict=True) if some]
        for p in chosen:
            if p.grad is None:
                p.grad = torch.zeros_like(p)
        for bucket in _buckets(chosen):
            self._add_up_bucket([p.grad for p in bucket if p.grad is not None])

    def _add_up_bucket(self, gradients: Sequence[Tensor]) -> None:
        exact = gradients[0].dtype if gradients[0].dtype == torch.float64 else torch.float32
        flat = torch.cat([g.reshape(-1).to(exact) for g in gradients])
        with _answering():
            dist.all_reduce(flat, group=self._sums)
        for gradient, summed in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(summed.view(gradient.shape))


def _buckets(parameters: Sequence[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """Parameters of one type, as many as are summed at once."""
    bucket: list[nn.Parameter] = []
    for p in parameters:
        if bucket and (p.dtype != bucket[0].dtype or sum(b.numel() for b in bucket) + p.numel() > BUCKET):
            yield bucket
            bucket = []
        bucket.append(p)
    if bucket:
        yield bucket


@contextmanager
def _answering() -> Iterator[None]:
    """Errors of the connection are those of a process that does not answer.

    Raises:
        Gone: so.
    """
    try:
        yield
    except (RuntimeError, EOFError, pickle.UnpicklingError) as error:  # dist's own errors are RuntimeErrors
        raise Gone(str(error).strip().split("\n")[0]) from error


def _packed(error: Exception) -> tuple[bytes, str]:
    """An error on its way, and its text where it cannot be sent."""
    told = f"{type(error).__name__}: {error}"
    try:
        return pickle.dumps(error), told
    except Exception:
        return b"", told


def _unpacked(content: bytes, told: str, rank: int) -> Exception:
    """Inverse of `_packed`."""
    try:
        error = pickle.loads(content)
        if isinstance(error, Exception):
            return error
    except Exception:
        pass
    return RuntimeError(f"in process {rank} of the training: {told}")
