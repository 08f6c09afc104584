"""Reference cases of the official implementations, replayed.

- `cases.py`: reference cases, comparison, verdicts, certificates
- `measured.py`: look-ahead and added parameters for the certificates
- `replaying.py`: what replays share
"""
