"""Released weights: files found and hashed, tensors matched strictly.

- `complete.py`: checkpoints loaded whole, or refused by name
- `quiet.py`: transformers without its progress bars and warnings
- `released.py`: a released checkpoint as files: found, listed, hashed, read
- `transfer.py`: official weights into our models, strictly
"""
