"""Kernels of our own: what they compute, how they are tiled, and how they are launched.

For each kernel there is a module of plain Python (its configuration, a naive reference in float64, the tiles for each
GPU, memory traffic and operations) and beside it ``*_triton``, the only modules here that import Triton. Kernels are
compiled ahead of time on the host; a device gets PTX and never needs Triton.
"""
