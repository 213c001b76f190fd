"""Read an exported program (``.pt2``) without running anything that the file might bring along.

What torch 2.13 does, read from its sources (``torch/export/pt2_archive/_package.py`` and
``torch/_export/serde/serialize.py``): ``torch.export.load`` **can run code from the file**, in these ways.

- Weights and constants marked ``use_pickle`` go through ``torch.load(weights_only=False)``; constants that are
  objects go through ``pickle.loads``; sample inputs, and the weights of older archives, fall back to
  ``weights_only=False`` when the safe way fails.
- Compiled parts (``data/aotinductor``) are shared libraries, and they are loaded.
- Shape expressions go through ``sympy.sympify``, which evaluates them as Python; guards become Python source
  when the program is called.
- Operators are looked up by name anywhere below ``torch``, ``operator`` and ``math``.
- An archive that fails to load is tried again as the format of torch 2.7, where all of it is pickled.

There is no option that turns these off, so the archive is checked first, through the same reader that torch
uses, and anything but plain tensors, ATen operators and arithmetic on sizes is refused.
"""

from __future__ import annotations

import io
import json
import pickle
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.export import ExportedProgram

from resvit_engines.errors import ResvitError

_MEMBERS = re.compile(
    r"data/(weights|constants)/((weight|tensor)_\d+|model_(weights|constants)_config\.json)"
    r"|models/model\.json|data/sample_inputs/model\.pt|extra/.*"
    r"|archive_format|archive_version|version|byteorder|\.data/.*"
)
_TARGET = re.compile(
    r"torch\.ops\.(aten|prims)\.\w+\.\w+|_operator\.(getitem|add|sub|mul|floordiv|truediv|mod|neg|pow|eq|ne|lt|le|gt|ge)"
    r"|torch\.sym_\w+|math\.(ceil|floor|trunc)|torch\._higher_order_ops\.wrap\.wrap_with_set_grad_enabled"
    r"|torch\.ops\.higher_order\.wrap_with_set_grad_enabled"
)
_WORD = re.compile(r"[A-Za-z_]\w*")
_EXPRESSION = re.compile(r"[\w\s+\-*/%(),<>=!&|~]*")
_FUNCTIONS = frozenset(
    {
        *("FloorDiv", "ModularIndexing", "Where", "PythonMod", "Mod", "CleanDiv", "CeilToInt", "FloorToInt", "CeilDiv"),
        *("LShift", "RShift", "PowByNatural", "FloatPow", "FloatTrueDiv", "IntTrueDiv", "TruncToFloat", "TruncToInt"),
        *("RoundToInt", "ToFloat", "Identity", "Max", "Min", "Eq", "Ne", "Ge", "Gt", "Le", "Lt", "And", "Or", "Not"),
        *("Add", "Mul", "Pow", "Integer", "Rational", "Float", "true", "false"),
    }
)
# Sizes are written as sympy's srepr writes them: Symbol('s77', positive=True, integer=True).
_SREPR_SYMBOL = re.compile(r"Symbol\('([a-z]+\d+)'(?:, \w+=(?:True|False))*\)")
_SYMBOL = re.compile(r"[su]f?\d+|zuf\d+|zf\d+|u\d+")


def program_from_pt2(path: Path) -> ExportedProgram:
    """Load a program saved by ``torch.export.save``, as the module docstring says.

    Raises ``ResvitError`` where the file is missing, damaged, from another torch, or holds anything that
    loading would have to execute.
    """
    if not path.is_file():
        raise ResvitError(f"The model {path} does not exist.", "Check the path given to --model.")
    if not zipfile.is_zipfile(path):
        raise ResvitError(
            f"{path} is not an exported program ({path.stat().st_size:,} bytes; it is truncated, empty or foreign).",
            "Write it again with torch.export.save(program, path).",
        )
    from torch.export.pt2_archive._package import PT2ArchiveReader, load_pt2

    content = io.BytesIO(path.read_bytes())
    try:
        with PT2ArchiveReader(content) as archive:
            reason = next(_objections(archive), None)
        if reason is None:
            content.seek(0)
            program = load_pt2(content).exported_programs["model"]
    except ResvitError:
        raise
    except Exception as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        raise ResvitError(
            f"{path} cannot be read as an exported program: {first}",
            f"Write it again with torch.export.save under torch {torch.__version__.partition('+')[0]}; "
            "programs are not made to be read by other versions.",
        ) from error
    if reason is not None:
        raise ResvitError(
            f"{path} is refused, because loading it could run code from the file: {reason}.",
            "Write it again with torch.export.save from a module of plain tensors and PyTorch's own operators, "
            "or give the module itself: --model file.py:factory.",
        )
    # Guards are Python source that calling the program would execute; sizes are checked by the runner.
    program._guards_code = []
    return program


def _objections(archive: Any) -> Iterator[str]:
    """Why the archive must not be loaded, one reason at a time; none for a harmless one."""
    names = archive.get_file_names()
    if "models/model.json" not in names:
        yield "it has no models/model.json (a format older than torch 2.8 is pickled as a whole)"
        return
    for name in names:
        if not _MEMBERS.fullmatch(name):
            yield f"it holds {name}"
    for kind in ("weights", "constants"):
        config = f"data/{kind}/model_{kind}_config.json"
        if config not in names:
            yield f"its {kind} are not listed"
            continue
        for tensor, payload in json.loads(archive.read_string(config))["config"].items():
            plain = re.fullmatch(r"(weight|tensor)_\d+", str(payload.get("path_name")))
            if payload.get("use_pickle") is not False or not plain:
                yield f"{tensor} is pickled"
    try:
        if inputs := archive.read_bytes("data/sample_inputs/model.pt"):
            torch.load(io.BytesIO(inputs), weights_only=True)
    except pickle.UnpicklingError:
        yield "its sample inputs are pickled objects"
    yield from _objections_in_graph(json.loads(archive.read_string("models/model.json")))


def _objections_in_graph(value: Any, key: str = "") -> Iterator[str]:
    if isinstance(value, dict):
        for name, entry in value.items():
            yield from _objections_in_graph(entry, name)
    elif isinstance(value, list):
        for entry in value:
            yield from _objections_in_graph(entry, key)
    elif isinstance(value, str):
        if key in ("target", "as_operator") and not _TARGET.fullmatch(value):
            yield f"it calls {value[:80]!r}"
        if key == "expr_str" and not _is_arithmetic(value):
            yield f"a size is given as {value[:80]!r}"


def _is_arithmetic(expression: str) -> bool:
    expression = _SREPR_SYMBOL.sub(r"\1", expression)
    if not _EXPRESSION.fullmatch(expression):
        return False
    return all(word in _FUNCTIONS or _SYMBOL.fullmatch(word) for word in _WORD.findall(expression))
