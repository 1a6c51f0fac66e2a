"""Training and evaluation on any device in grouped PyTorch tensor operations."""
