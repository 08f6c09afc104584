"""What is read and written: strictly, and with checksums.

- `artefacts.py`: what the product writes and reads again, whole and with a checksum
- `inputs.py`: JSON, JSON lines and plain lines of others, read strictly
- `shapes.py`: what files of ours must hold, as types
"""
