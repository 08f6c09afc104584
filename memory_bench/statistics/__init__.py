"""Intervals, pairs, half-lives, effects, and whether anything was learned.

- `decay.py`: a falling curve fitted to all bootstrap samples at once
- `effects.py`: effects with intervals over documents and over seeds, and whether a test holds
- `growth.py`: how a state grows with the tokens read
- `halflife.py`: how long a memory lasts: its interval, its verdicts
- `learned.py`: did training teach the memory anything?
- `pairing.py`: what may be compared with what
- `retention.py`: half-life, lift and differences by distance, from samples
- `shared.py`: what the pairs of a table share, worked out once
- `stats.py`: bootstrap intervals, paired differences, Holm, letters
"""
