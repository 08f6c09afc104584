"""Released weights: files found and hashed, tensors matched strictly.

- `released.py`: a released checkpoint as files: found, listed, hashed, read
- `transfer.py`: official weights into our models, strictly
"""
