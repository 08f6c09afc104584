"""From records to boards, tables, plots and pages; loads no model.

- `beside.py`: a board's numbers beside published ones
- `board.py`: one table: ranked, paired, complete
- `build.py`: all of it, from a run's folder alone
- `by_distance.py`: differences at every distance and of half-lives
- `comparison.py`: `compare`: differences within and between runs
- `costs.py`: what a row spent
- `distances.py`: accuracy by distance, and whether the order changes
- `drawing.py`: marks, curves and canvases of all plots
- `fronts.py`: which rows are dominated at their price, and which are on the front
- `grouping.py`: which records make a board and which a row
- `layout.py`: tables of text in Markdown and LaTeX
- `limits.py`: which limit ended a cell, from its record's detail
- `looks.py`: colours and markers, from labels alone
- `naming.py`: names beside marks where there is room
- `page.py`: `leaderboard.html`
- `panels.py`: the plots themselves
- `planned.py`: what was planned beside what was spent
- `plots.py`: which plots a board has, and their files
- `retention_panels.py`: plots of retention: curves, half-lives, depth by length, delay
- `rows.py`: one model's seeds and their metrics
- `scales.py`: axes of costs
- `scorers.py`: which task computes the metrics of a folder's records again; imports nothing that a record names
- `sweeps.py`: the same models under several budgets
- `tables.py`: boards as tables and as `leaderboard.csv`
- `trade_offs.py`: plots of the headline against what a row cost
- `words.py`: the sentences around tables
"""
