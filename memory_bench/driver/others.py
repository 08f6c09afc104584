"""What the other processes of a training spend and hold, as the first one's meter counts it for all.

Limits are those of the cell as a whole, so seconds and bytes are sums over its processes.
"""

from collections.abc import Sequence
from dataclasses import astuple, dataclass, field

from memory_bench.budget import Usage


@dataclass(frozen=True, slots=True)
class Spending:
    """Of one process in a training; of several the sums.

    Attributes:
        seconds: of its clock.
        device: bytes of device memory at most, above what it held before.
        reserved: bytes that an accelerator's allocator had taken at most.
        host: bytes of main memory at most that are its own.
        gradients, optimizer, activations: bytes, as of `memory_bench.budget.Usage`.
    """

    seconds: float = 0.0
    device: int = 0
    reserved: int = 0
    host: int = 0
    gradients: int = 0
    optimizer: int = 0
    activations: int = 0


@dataclass(slots=True)
class Others:
    """The other processes, summed.

    Attributes:
        held: bytes that they held before anything was charged, and that nobody is charged with.
        own_held: of the process that this meter is of, where it is one of the others.
        most: what they have told last.
        seconds: of theirs that are in the usage.
    """

    held: int = 0
    own_held: int = 0
    most: Spending = field(default_factory=Spending)
    seconds: float = 0.0
    _counted: float = 0.0  # of `most` those that are in the usage

    def another(self) -> "Others":
        """The same processes, of which nothing is counted yet."""
        return Others(self.held, self.own_held)

    def count(self, told: Sequence[Spending]) -> float:
        """Take over what each has spent until now; the seconds that are new."""
        sums = Spending(*(sum(parts) for parts in zip(*map(astuple, told), strict=True))) if told else Spending()
        new = max(0.0, sums.seconds - self._counted)
        self.most, self._counted, self.seconds = sums, sums.seconds, self.seconds + new
        return new

    def add_to(self, usage: Usage, *, wall: bool) -> None:
        """The training is over: bytes of all processes into its `usage`, and joules only where one counter has all.

        Args:
            usage: of the first process.
            wall: every process has a device of its own.
        """
        if self.most == Spending():
            return
        for name, more in (
            ("gradient_bytes", self.most.gradients),
            ("optimizer_bytes", self.most.optimizer),
            ("activation_bytes", self.most.activations),
        ):
            setattr(usage, name, (getattr(usage, name) or 0) + more)
        if wall:
            usage.train_joules = None
        self.most, self._counted = Spending(), 0.0

    def left(self) -> None:
        """They have ended."""
        self.held, self.most, self._counted = 0, Spending(), 0.0
