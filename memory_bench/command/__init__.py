"""What the commands do.

- `commands.py`: what the commands do
- `listing.py`: `list`, without importing torch or a plug-in
- `machine.py`: `doctor`
"""
