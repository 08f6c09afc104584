"""From names to records: the grid, its plan, a process per cell."""
