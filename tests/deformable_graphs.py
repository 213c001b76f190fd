"""Deformable attention of two levels as a graph: two heads of 8, five queries, three points of each level."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from fusion_graphs import graph_of, half

SHAPES = "float16[N, 19, 16] value, float16[N, 5, 2, 2, 3, 2] places, float16[N, 5, 2, 6] weights"
LINES = """
 value4 = Reshape (value, v4)
 turned = Transpose <perm = [0, 2, 3, 1]> (value4)
 flat = Reshape (turned, v3)
 one, two = Split <axis = -1> (flat, areas)
 image1 = Reshape (one, size1)
 image2 = Reshape (two, size2)
 twice = Mul (places, factor)
 grids = Sub (twice, shift)
 heads = Transpose <perm = [0, 2, 1, 3, 4, 5]> (grids)
 grids1 = Gather <axis = 3> (heads, level1)
 grids2 = Gather <axis = 3> (heads, level2)
 grid1 = Reshape (grids1, grid)
 grid2 = Reshape (grids2, grid)
 samples1 = GridSample <align_corners = 0, mode = "linear", padding_mode = "zeros"> (image1, grid1)
 samples2 = GridSample <align_corners = 0, mode = "linear", padding_mode = "zeros"> (image2, grid2)
 joined = Concat <axis = -1> (samples1, samples2)
 shares0 = Transpose <perm = [0, 2, 1, 3]> (weights)
 shares = Reshape (shares0, share)
 weighted = Mul (joined, shares)
 summed = ReduceSum <keepdims = 0> (weighted, last)
 rows = Reshape (summed, row)
 out = Transpose <perm = [0, 2, 1]> (rows)
"""
CONSTANTS: dict[str, Any] = {
    "v4": [0, 19, 2, 8], "v3": [-1, 8, 19], "areas": [15, 4], "size1": [-1, 8, 5, 3], "size2": [-1, 8, 2, 2],
    "factor": np.float16(2), "shift": np.float16(1), "level1": np.int64(0), "level2": np.int64(1),
    "grid": [-1, 5, 3, 2], "share": [-1, 1, 5, 6], "last": [-1], "row": [-1, 16, 5],
}  # fmt: skip


def graph(lines: str = LINES, outputs: str = "float16[N, 5, 16] out", **changed: Any) -> ir.Model:
    return graph_of(lines, SHAPES, outputs, **{**CONSTANTS, **changed})


def given() -> dict[str, np.ndarray]:
    places = np.random.default_rng(1).uniform(-0.2, 1.2, (3, 5, 2, 2, 3, 2)).astype(np.float16)
    return {"value": half((3, 19, 16)), "places": places, "weights": np.abs(half((3, 5, 2, 6), 2)) / 3}


def layer(sides: Sequence[tuple[int, int]], points: Sequence[int], queries: int) -> ir.Model:
    """A layer of eight heads of 32 at batch 1, as RT-DETRv2 and D-FINE cut and join it."""
    positions, samples, levels = sum(height * width for height, width in sides), sum(points), range(len(sides))
    constants: dict[str, Any] = {
        "v4": [0, positions, 8, 32], "v3": [-1, 32, positions], "areas": [height * width for height, width in sides],
        "factor": np.float16(2), "shift": np.float16(1), "grid": [-1, queries, samples, 2], "counts": list(points),
        "share": [-1, 1, queries, samples], "last": [-1], "row": [-1, 256, queries],
        **{f"size{level}": [-1, 32, *sides[level]] for level in levels},
    }  # fmt: skip
    sampling = '<align_corners = 0, mode = "linear", padding_mode = "zeros">'
    lines = [
        "value4 = Reshape (value, v4)",
        "turned = Transpose <perm = [0, 2, 3, 1]> (value4)",
        "flat = Reshape (turned, v3)",
        f"{', '.join(f'flat{level}' for level in levels)} = Split <axis = -1> (flat, areas)",
        "twice = Mul (places, factor)",
        "grids = Sub (twice, shift)",
        "heads = Transpose <perm = [0, 2, 1, 3, 4]> (grids)",
        "flat_grids = Reshape (heads, grid)",
        f"{', '.join(f'grid{level}' for level in levels)} = Split <axis = 2> (flat_grids, counts)",
        *(f"image{level} = Reshape (flat{level}, size{level})" for level in levels),
        *(f"samples{level} = GridSample {sampling} (image{level}, grid{level})" for level in levels),
        f"joined = Concat <axis = -1> ({', '.join(f'samples{level}' for level in levels)})",
        "shares0 = Transpose <perm = [0, 2, 1, 3]> (weights)",
        "shares = Reshape (shares0, share)",
        "weighted = Mul (joined, shares)",
        "summed = ReduceSum <keepdims = 0> (weighted, last)",
        "rows = Reshape (summed, row)",
        "out = Transpose <perm = [0, 2, 1]> (rows)",
    ]
    inputs = f"float16[1, {positions}, 256] value, float16[1, {queries}, 8, {samples}, 2] places"
    inputs += f", float16[1, {queries}, 8, {samples}] weights"
    return graph_of("\n".join(lines), inputs, f"float16[1, {queries}, 256] out", **constants)
