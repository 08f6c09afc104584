"""What papers report and claim, as data.

- `claims.py`: published claims as data: tests, tiers, what they need
- `comparable.py`: may a number of ours be compared with a published one, and does it agree
- `reported.py`: published numbers: read, found, listed
"""
