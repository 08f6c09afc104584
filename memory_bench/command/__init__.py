"""What the commands do.

- `commands.py`: what the commands do
- `engines.py`: which executor runs the jobs, by its name
- `foretelling.py`: what is known of a run beforehand
- `jobs.py`: cells as jobs on this machine
- `listing.py`: `list`, without importing torch or a plug-in
- `machine.py`: `doctor`
- `preparing.py`: before a run's work starts: mistakes, and what is to be done as jobs
"""
