"""From names to records: the grid, its plan, a process per cell.

- `blame.py`: what a failed cell says: error, line of the plug-in, log
- `building.py`: what a training is made of, and the one way to a model of it
- `console.py`: what a person sees meanwhile
- `environment.py`: what environment variables say
- `executors.py`: runs jobs here, or in a process each
- `firststep.py`: limits below one optimiser step are refused
- `grid.py`: from names to cells
- `naming.py`: names as a user may give them, made whole
- `options.py`: what a user may ask of a run: options, suites
- `planning.py`: what a run would cost
- `preflight.py`: every task gives its episodes once before anything is trained
- `recipes.py`: how a model is trained: the recipe chosen, and what its adapters leave
- `superseded.py`: results of inputs that have changed, set aside
- `worker.py`: one cell in one process: joins model, backbone, task and budget
"""
