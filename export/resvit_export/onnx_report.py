"""What an ONNX export measured of itself, and how the file is written."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from resvit_calibrate.runtime import Arrays, Runner
from resvit_engines.errors import ExitCode, ResvitError
from resvit_engines.files import atomic_file
from resvit_engines.run.rows import paired_rows

PARITY_TOLERANCE = 1e-4
"""Largest difference allowed, relative to the largest output. Two float32 runtimes differ by some 1e-6."""

EXTERNAL_ABOVE = int(1.8e9)
"""Bytes of weights above which they go into a second file: protobuf ends at 2 GiB."""


@dataclass(frozen=True)
class ExportReport:
    """The float ONNX in figures. Shapes hold ``"batch"`` where the batch is dynamic."""

    opset: int
    nodes: int
    operators: dict[str, int]
    parity_max_abs: float
    parity_max_rel: float
    """Largest difference over the largest absolute output."""
    parity_batches: tuple[int, ...]
    input: tuple[str, tuple[int | str, ...]]
    outputs: tuple[tuple[str, tuple[int | str, ...]], ...]
    parameters: int
    bytes: int
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "opset": self.opset,
            "nodes": self.nodes,
            "operators": self.operators,
            "parity_max_abs": self.parity_max_abs,
            "parity_max_rel": self.parity_max_rel,
            "parity_batches": list(self.parity_batches),
            "input": {"name": self.input[0], "shape": list(self.input[1])},
            "outputs": [{"name": name, "shape": list(shape)} for name, shape in self.outputs],
            "parameters": self.parameters,
            "bytes": self.bytes,
            "notes": list(self.notes),
        }


def report_of(
    model: ir.Model,
    path: Path,
    parity: tuple[float, float],
    batches: Sequence[int],
    notes: Sequence[str] = (),
) -> ExportReport:
    """Count what is in ``model``, written at ``path``."""
    operators: dict[str, int] = {}
    for node in model.graph:
        operators[node.op_type] = operators.get(node.op_type, 0) + 1
    floats = [v.const_value for v in model.graph.initializers.values() if v.const_value is not None]
    files = [path, path.with_name(f"{path.name}.data")]
    return ExportReport(
        opset=model.opset_imports[""],
        nodes=len(model.graph),
        operators=dict(sorted(operators.items())),
        parity_max_abs=parity[0],
        parity_max_rel=parity[1],
        parity_batches=tuple(batches),
        input=(str(model.graph.inputs[0].name), shape_of(model.graph.inputs[0])),
        outputs=tuple((str(value.name), shape_of(value)) for value in model.graph.outputs),
        parameters=sum(t.size for t in floats if t.dtype.is_floating_point()),
        bytes=sum(file.stat().st_size for file in files if file.exists()),
        notes=tuple(notes),
    )


def shape_of(value: ir.Value) -> tuple[int | str, ...]:
    """A value's shape, free sizes by name."""
    assert value.shape is not None
    return tuple(size if isinstance(size, int) else str(size.value) for size in value.shape)


def write_model(model: ir.Model, path: Path, external_above: int = EXTERNAL_ABOVE) -> None:
    """Check and write ``model``: the same graph gives the same bytes; a whole file or none.

    Weights above ``external_above`` bytes go into ``<name>.data`` beside it. Raises ``ResvitError`` where the
    ONNX checker finds fault.
    """
    import onnx

    weights = sum(v.const_value.nbytes for v in model.graph.initializers.values() if v.const_value is not None)
    if weights > external_above:
        data = path.with_name(f"{path.name}.data")
        # Shapes and other small constants stay in the model, where shape inference can read them.
        large = [
            v for v in model.graph.initializers.values() if v.const_value is not None and v.const_value.nbytes > 256
        ]
        with atomic_file(data) as partial:
            # The bytes go into the partial file, and the model refers to the final name.
            written = ir.external_data.convert_tensors_to_external(
                [value.const_value for value in large if value.const_value is not None],
                base_dir=partial.parent,
                relative_path=partial.name,
            )
        for value, tensor in zip(large, written, strict=True):
            value.const_value = ir.ExternalTensor(
                data.name,
                tensor.offset,
                tensor.length,
                tensor.dtype,
                shape=tensor.shape,
                name=str(value.name),
                base_dir=path.parent,
            )
    proto = ir.serde.serialize_model(model)
    with atomic_file(path) as partial:
        partial.write_bytes(proto.SerializeToString(deterministic=True))
    try:
        onnx.checker.check_model(str(path))
    except onnx.checker.ValidationError as error:
        path.unlink()
        raise ResvitError(
            f"The exported ONNX is not valid: {str(error).splitlines()[0]}",
            "This is a fault of the export; please report it with the model's name.",
            ExitCode.BUG,
        ) from error


_ROUNDINGS = 4.0
_MOST_MOVED = 0.01
"""A network that rounding moves by more than this share cannot be told from a wrong translation."""


def measure_parity(
    reference: Runner,
    candidate: Runner,
    shape: tuple[int, ...],
    batches: Sequence[int],
    *,
    what: str,
    sets: bool = False,
    seed: int = 0,
) -> tuple[float, float]:
    """Compare on random images [b, C, H, W] for every b of ``batches``: largest (absolute, relative) difference.

    Where ``sets`` says so, the outputs' rows are paired first (``resvit_engines.run.rows``). Above
    ``PARITY_TOLERANCE``, what rounding the images to float32 once more moves in the reference itself is allowed
    for, fourfold: an attention that is sharp enough turns 1e-7 into 1e-4 on either side.

    Raises ``ResvitError`` above both, and for outputs that are not finite.
    """
    random = np.random.default_rng(seed)
    absolute = relative = 0.0
    for batch in batches:
        images = {"input": random.standard_normal((batch, *shape), dtype=np.float32)}
        expected, actual = reference(images), candidate(images)
        if sets:
            actual = paired_rows(expected, dict(zip(expected, actual.values(), strict=True)))
        moved: dict[str, float] | None = None
        for one, (name, other) in zip(expected.values(), actual.items(), strict=True):
            largest = float(np.abs(one).max())
            if one.shape != other.shape or not math.isfinite(largest):
                raise ResvitError(
                    f"{what}: output {name} is {list(other.shape)} for {list(one.shape)} in the original, whose "
                    f"largest value on random images is {largest}.",
                    "A network that overflows on normal images cannot be exported; otherwise please report this.",
                )
            error = float(np.abs(one.astype(np.float64) - other).max())
            allowed = PARITY_TOLERANCE * max(largest, 1e-6)
            if not error <= allowed:
                moved = moved or _moved_by_rounding(reference, images, expected, sets)
                allowed = min(_ROUNDINGS * moved[name], _MOST_MOVED * largest)
            if not error <= allowed:
                raise ResvitError(
                    f"{what}: output {name} differs by {error:.3g} from the original (batch {batch}, largest "
                    f"value {largest:.3g}).",
                    "An operator was translated wrongly; please report this with the model's name.",
                    ExitCode.BUG,
                )
            absolute, relative = max(absolute, error), max(relative, error / max(largest, 1e-6))
    return absolute, relative


def _moved_by_rounding(reference: Runner, images: Arrays, expected: Arrays, sets: bool) -> dict[str, float]:
    """How far each output moves when every pixel is rounded otherwise, by half a unit in its last place or less."""
    random = np.random.default_rng(1)
    moved = dict.fromkeys(expected, 0.0)
    for _ in range(3):
        shaken = {
            name: value * (1.0 + 6e-8 * random.choice([-1.0, 1.0], value.shape)).astype(np.float32)
            for name, value in images.items()
        }
        answers = reference(shaken)
        answers = paired_rows(expected, answers) if sets else answers
        for name, value in expected.items():
            moved[name] = max(moved[name], float(np.abs(answers[name].astype(np.float64) - value).max()))
    return moved


def selects_rows(model: ir.Model) -> bool:
    """Whether the graph picks rows by score, so that their order hangs on rounding."""
    return any(node.op_type == "TopK" for node in model.graph)
