"""Training and evaluation on any device, members grouped into PyTorch tensor operations."""
