"""A program as a function from arrays to arrays, and as a file."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch.export import ExportedProgram

from resvit_calibrate.runtime.runner import Runner, pieces
from resvit_calibrate.runtime.sessions import Arrays
from resvit_engines.files import write_atomic
from resvit_export.loading.inputs import IMAGE
from resvit_export.loading.program.facts import fixed_batch_of, input_names, inputs_of, output_names


def runner_from_program(program: ExportedProgram) -> Runner:
    """Run a program in PyTorch: {"input": float32 [B, C, H, W]} → {"logits": float32 [B, K]}, for example.

    A program of fixed batch size takes any number of images: it runs in pieces, the last one padded.
    """
    call, names, batch = program.module(), output_names(program), fixed_batch_of(program)
    inputs = {item.name: np.dtype(item.dtype) for item in inputs_of(program)}
    order, structure = input_names(program), program.call_spec.in_spec

    def run(arrays: Arrays) -> Arrays:
        whole = {name: np.ascontiguousarray(arrays[name], dtype) for name, dtype in inputs.items()}
        outputs = []
        with torch.inference_mode(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for piece, size in pieces(whole, batch or len(whole[IMAGE])):
                leaves = [torch.from_numpy(piece[name]) for name in order]
                positional, keywords = torch.utils._pytree.tree_unflatten(leaves, structure)
                answer = torch.utils._pytree.tree_leaves(call(*positional, **keywords))
                outputs.append([leaf.detach().float().numpy()[:size] for leaf in answer])
        return {name: np.concatenate([part[i] for part in outputs]) for i, name in enumerate(names)}

    return run


def write_by_memory(path: Path, save: Callable[[io.BytesIO], None]) -> None:
    """Write a file that PyTorch makes by way of memory: its own writer aborts the process on a full disk."""
    buffer = io.BytesIO()
    save(buffer)
    write_atomic(path, bytes(buffer.getbuffer()))
