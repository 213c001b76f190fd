"""Kernels launched and timed on a GPU, and the table of results."""
