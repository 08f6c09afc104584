"""The regression gate: a run as lines, against a reference.

- `command.py`: `check`
- `judge.py`: the regression gate: a run against a reference
- `lines.py`: a run as lines, with the tolerances
- `reference.py`: reference files: read, and written from clean trees only
- `report.py`: its findings as table, Markdown, JUnit, JSON
"""
