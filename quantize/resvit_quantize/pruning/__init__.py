"""Structured pruning of PyTorch modules: what can go, what it is worth, which of it goes, and training afterwards."""
