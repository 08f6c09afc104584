"""What is read and written: strictly, and with checksums.

- `artefacts.py`: what the product writes and reads again, whole and with a checksum
- `content.py`: files by their content: hashes, remembered
- `inputs.py`: JSON, JSON lines and plain lines of others, read strictly
- `plain.py`: JSON and TOML with bounds on what they may hold
- `remembered.py`: what was found in files, as long as they stay the same
- `shapes.py`: what files of ours must hold, as types
"""
