"""What can go wrong, as types: the CLI prints the first two as sentences and everything else as a bug."""

import difflib
from collections.abc import Iterable

LONGEST = 200  # characters of a name in a message


class UserError(Exception):
    """A mistake the user can mend: one or two sentences, no traceback, exit code 2."""


class DataError(UserError):
    """Data or weights that cannot be had, read, or trusted (missing, corrupt, refused)."""


class MachineError(UserError):
    """The machine is in the way: a full disk, a folder that cannot be written to, a lost file, a killed process.

    Never a cell's result: the cell stays to be done, and the same command goes on when the trouble is gone.
    """


class Unavailable(DataError, MachineError):
    """Something cannot be had now: the network, a package, a cache that cannot be written to."""


class NotFinite(UserError):
    """A score, a memory, a loss or a sample is not a number, or infinite: whatever is computed from it would be wrong.

    A cell in which this happens fails, with the place where it began.
    """


def unknown(kind: str, name: str, known: Iterable[str], hint: str = "") -> UserError:
    """The error for a name that does not exist, with the nearest one that does.

    Args:
        kind: what the name should have been, for example ``model``.
        name: what was asked for.
        known: every valid name.
        hint: a command that shows the valid names.
    """
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.4)
    guess = f" Did you mean {near[0]}?" if near else f" Valid: {', '.join(names) or 'none'}."
    name = name if len(name) <= LONGEST else f"{name[:LONGEST]}…"
    return UserError(f"Unknown {kind} '{name}'.{guess}{f' {hint}' if hint else ''}")
