"""Released weights: files found and hashed, tensors matched strictly."""
