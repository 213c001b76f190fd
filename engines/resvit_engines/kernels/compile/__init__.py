"""Kernels compiled ahead of time, on any machine, and what they came to."""
