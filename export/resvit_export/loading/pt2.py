"""Read an exported program (``.pt2``) without running anything that the file might bring along.

``torch.export.load`` **can run code from the file**, in many ways: pickles, shared libraries, objects of custom
classes, size expressions that sympy evaluates as Python, guards that are Python source, operators looked up by name
anywhere below ``torch``, and structures of inputs and outputs that name what to import
(``torch/export/pt2_archive/_package.py``, ``torch/_export/serde/serialize.py`` and ``torch/utils/_pytree.py`` of
torch 2.13). No option turns these off.

So torch sees no byte of the file. ``loading/exported`` parses all of it against what ``torch.export.save`` writes for
networks of tensors and ATen operators; torch's deserialiser gets records made anew from what was understood.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch.export import ExportedProgram

from resvit_engines.errors import ResvitError
from resvit_export.loading.exported import operators
from resvit_export.loading.exported.archive import MODEL, Archive, open_archive
from resvit_export.loading.exported.errors import NotAllowedError, quoted
from resvit_export.loading.exported.flow import check_graph
from resvit_export.loading.exported.records import program_record
from resvit_export.loading.exported.samples import require_plain_samples
from resvit_export.loading.exported.tensors import tensors_in


def program_from_pt2(path: Path) -> ExportedProgram:
    """Load a program saved by ``torch.export.save``; it is on the CPU, and without its sample inputs and guards.

    Raises:
        ResvitError: INPUT where the file is missing, damaged, from another torch, or holds anything else than a graph
            of tensors, ATen operators and arithmetic on sizes.
    """
    if not path.is_file():
        raise ResvitError(f"The model {path} does not exist.", "Check the path given to --model.")
    try:
        with open_archive(path) as archive:
            archive.require_known_members()
            require_plain_samples(archive.sample_inputs())
            return _program(archive)
    except NotAllowedError as refused:
        raise ResvitError(
            f"{path} ({path.stat().st_size:,} bytes) is refused as an exported program: {refused}.",
            f"Export the network again, of plain tensors and PyTorch's own operators, with torch.export.save of torch "
            f"{torch.__version__.partition('+')[0]}; or give the module itself: --model file.py:factory.",
        ) from refused


def _program(archive: Archive) -> ExportedProgram:
    from torch._export.serde.serialize import ExportedProgramDeserializer

    record = program_record(archive.json(MODEL))
    check_graph(record.graph_module.graph)
    weights, constants = tensors_in(archive, "weights"), tensors_in(archive, "constants")
    try:
        program = ExportedProgramDeserializer().deserialize(record, weights, constants, None)
    except Exception as error:  # torch raises whatever its assertions and lookups raise
        raise NotAllowedError(f"torch cannot make a graph of it: {quoted(_first_line(error))}") from error
    for module in program.graph_module.modules():
        for node in module.graph.nodes if isinstance(module, torch.fx.GraphModule) else ():
            if node.op == "call_function" and not operators.is_allowed(node.target):
                raise NotAllowedError(f"it calls {quoted(str(node.target))}")
    # Guards are Python source that calling the program would execute; sizes are checked by the runner.
    program._guards_code = []
    return program


def _first_line(error: Exception) -> str:
    """The innermost reason: torch wraps it in the node that it was found in."""
    lines = [line for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return lines[-1] if "Original exception" in str(error) else lines[0]
