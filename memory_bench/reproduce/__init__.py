"""Published claims, tested here.

- `command.py`: `reproduce`: published claims, tested here
- `probes.py`: what claims count on a model itself
- `verdicts.py`: what came of claims, and the page that says it
"""
