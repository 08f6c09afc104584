"""From names to records: the grid, its plan, a process per cell.

- `blame.py`: what a failed cell says: error, line of the plug-in, log
- `building.py`: what a training is made of, and the one way to a model of it
- `calibration.py`: what was measured on this machine of cells like one, kept in the user's cache: a plan need not guess
- `computing.py`: the memory of a cell from shapes alone: its trainer and its reader run on tensors without storage
- `console.py`: what a person sees meanwhile
- `counting.py`: what a cell reads and computes, counted without computing: its own driver, walked by a model that does nothing
- `environment.py`: what environment variables say
- `executors.py`: runs jobs one after the other from here, or a few at a time
- `fence.py`: what the operating system refuses a worker: a cgroup, a limit on data
- `firststep.py`: limits below one optimiser step are refused
- `grid.py`: from names to cells
- `guard.py`: watches a worker from outside and ends it at a limit
- `measuring.py`: a few real steps of a cell, in its own process and as it runs them: what one takes, and how much is held meanwhile
- `naming.py`: names as a user may give them, made whole
- `obituary.py`: the record of a worker that has ended: its own, or one written for it
- `options.py`: what a user may ask of a run: options, suites
- `pace.py`: seconds of a call of a model, fitted to calls that were timed: so many for a call, and so many for its FLOPs
- `planning.py`: what a run would cost
- `preflight.py`: every task gives its episodes once before anything is trained
- `processes.py`: the one way in which a worker process is started
- `recipes.py`: how a model is trained: the recipe chosen, and what its adapters leave
- `refusals.py`: which errors say that memory was refused
- `remaining.py`: how long a run still takes: cells by what was planned of them, corrected by what those that ended took
- `shapes.py`: tensors without storage: how much a model would hold, found by running it on shapes alone
- `starting.py`: what is loaded before the meter starts, the same for all
- `superseded.py`: results of inputs that have changed, set aside
- `worker.py`: one cell in one process: joins model, backbone, task and budget
"""
