"""Kernels of our own: what they compute, how they are tiled, and how they are launched.

For each kernel there is a module of plain Python (its configuration, a naive reference in float64, the tiles for each
GPU, memory traffic and operations) and one of the same name in ``triton``, the only folder that imports Triton. Kernels
are compiled ahead of time on the host; a device gets PTX and never needs Triton.
"""
