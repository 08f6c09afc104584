"""Which records make a board and which a row: by what was asked, never by a name alone."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import fields, replace

from memory_bench.budget import Budget, Usage, amount
from memory_bench.cell import Cell, Choice, digest, limits
from memory_bench.files.plain import parts
from memory_bench.record import Record
from memory_bench.store import Store

UNSHARED = ("seeds", "tasks")
"""Fields of a budget in which the cells of a board may differ: what they set is in the cells themselves."""


def grouped(store: Store, keys: Collection[str] | None = None) -> list[list[list[Record]]]:
    """The records of a store by board, then by row, then by seed.

    Args:
        store: what it cannot read is added to its warnings.
        keys: cells to show; None: all.
    """
    roles = store.run().get("grid", {}).get("roles", {})
    groups: dict[str, dict[str, dict[int, Record]]] = {}
    for record in store.records():
        if keys is None or record.key in keys:
            record = as_asked(record, roles)
            board, row = _identity(record.cell)
            same = groups.setdefault(board, {}).setdefault(row, {})
            seed = record.cell.training.seed
            # Two records of one seed differ in what changes no number; the later one counts.
            if seed not in same or _finished(record) >= _finished(same[seed]):
                same[seed] = record
    return [[[r for _, r in sorted(seeds.items())] for seeds in rows.values()] for rows in groups.values()]


def _identity(cell: Cell) -> tuple[str, str]:
    """What the cells of a board share, and what those of a row share beyond it."""
    training = cell.training
    board = {"task": parts(cell.task), "limit": cell.limit, "backbone": parts(training.backbone),
             "budget": {k: v for k, v in limits(training).items() if k not in UNSHARED}}  # fmt: skip
    model = {"model": parts(training.model), "recipe": parts(training.recipe), "corpus": parts(training.corpus),
             "controls": cell.controls, "scored_with": cell.scored_with, "processes": training.processes}  # fmt: skip
    return digest(board), digest(model)


def apart(cell: Cell, others: Sequence[Cell]) -> tuple[str, str]:
    """What tells the backbone and the budget of `cell` from those of the same name in `others`; empty where nothing.

    Args:
        cell: of a board.
        others: of all boards of a report.
    """
    own = cell.training
    same = [c.training.backbone for c in others if c.training.backbone.name == own.backbone.name]
    said = []
    if len({choice.revision for choice in same}) > 1:
        said.append(f"revision {own.backbone.revision[:8] or 'unknown'}")
    if len({digest(choice.config) for choice in same}) > 1:
        said.append(", ".join(f"{name} {value}" for name, value in sorted(own.backbone.config.items())) or "no options")
    mine, namesakes = own.budget, [c.training.budget for c in others if c.training.budget.name == own.budget.name]
    names = [f.name for f in fields(Budget) if f.name not in UNSHARED]
    bounds = [(name, getattr(mine, name)) for name in names if len({getattr(b, name) for b in namesakes}) > 1]
    budget = ", ".join(f"no {name}" if bound is None else f"{name} {amount(name, bound)}" for name, bound in bounds)
    return ", ".join(said), budget


def as_asked(record: Record, roles: Mapping[str, Sequence[str]]) -> Record:
    """The record with role and label of the run's last command; they are no part of a cell's identity."""
    if record.key not in roles:
        return record
    role, label = roles[record.key]
    return replace(record, cell=replace(record.cell, role=role, label=label))


def left_out(members: Sequence[Sequence[Record]], pairs: Sequence[Mapping[str, str]]) -> list[list[Record]]:
    """Rows for the pairs of model and task that the run's grid left out, as ``run.json`` lists them."""
    known = {_name(records[0].cell) for records in members}
    cell = members[0][0].cell
    result = []
    for pair in pairs:
        if pair.get("task") == cell.task.name and pair.get("model") not in known:
            name = str(pair["model"])
            training = replace(cell.training, model=Choice(name.split()[0]))
            other = replace(cell, training=training, role="asked", label=name)
            result.append([Record(other, "skipped", str(pair.get("reason", "")), (), Usage(), {}, None, {})])
    return result


def _name(cell: Cell) -> str:
    return cell.label or cell.training.model.name


def _finished(record: Record) -> str:
    return str(record.provenance.get("finished", ""))


def labels(groups: Sequence[Sequence[Record]]) -> list[str]:
    """A name for every row of a board; where two would share one, what follows tells them apart.

    It is how many processes trained them, then the version, then the key.
    """
    names = [_name(records[0].cell) for records in groups]
    shared = [records[0].cell.training.processes for records in groups]
    for name in {name for name in names if names.count(name) > 1}:
        same = [i for i, other in enumerate(names) if other == name]
        if len({shared[i] for i in same}) > 1:
            for i in same:
                names[i] += "" if shared[i] == 1 else f" ({shared[i]} processes)"
    result = []
    for name, records in zip(names, groups, strict=True):
        model = records[0].cell.training.model
        rivals = [g[0].cell.training.model.version for n, g in zip(names, groups, strict=True) if n == name]
        if len(rivals) > 1:
            keys = [g[0].cell.training.key for n, g in zip(names, groups, strict=True) if n == name]
            key = records[0].cell.training.key
            key = key if keys.count(key) == 1 else records[0].key  # scored otherwise, after the same training
            name = f"{name} (version {model.version})" if rivals.count(model.version) == 1 else f"{name} ({key[:4]})"
        result.append(name)
    return result
