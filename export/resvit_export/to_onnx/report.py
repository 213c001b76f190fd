"""What an ONNX export measured of itself, and how the file is written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import onnx_ir as ir

from resvit_calibrate.runtime.parity import Difference, differences, flat_differences, moved_between_runs
from resvit_calibrate.runtime.runner import Runner, onnx_runner
from resvit_calibrate.runtime.sessions import Arrays
from resvit_engines.errors import ExitCode, ResvitError, first_line
from resvit_engines.pictures.sizes import Size
from resvit_export.loading.inputs import NetworkInput, random_feeds
from resvit_quantize.graph.external import EXTERNAL_ABOVE, write_onnx
from resvit_quantize.graph.shapes import HEIGHT, WIDTH, sizes_of_graph

_TYPES = {
    ir.DataType.FLOAT: "float32",
    ir.DataType.INT64: "int64",
    ir.DataType.INT32: "int32",
    ir.DataType.BOOL: "bool",
}

FLAT_IMAGES = (
    ("zeros", 0.0, 0.0),
    ("ones", 1.0, 1.0),
    ("-2", -2.0, -2.0),
    ("3", 3.0, 3.0),
    ("0 on the left and 255 on the right", 0.0, 255.0),
    ("-2 on the left and 3 on the right", -2.0, 3.0),
)
"""What black and white are after the usual preprocessings: title, left half, right half."""


@dataclass(frozen=True)
class Parity:
    """The largest (absolute, relative) difference on random images, and what is to be said of flat ones."""

    absolute: float
    relative: float
    notes: tuple[str, ...] = ()


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
    """The image; ``inputs`` are all that the network reads, where that is more."""
    outputs: tuple[tuple[str, tuple[int | str, ...]], ...]
    parameters: int
    bytes: int
    notes: tuple[str, ...] = ()
    inputs: tuple[NetworkInput, ...] = ()

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
            **({"inputs": [item.to_json() for item in self.inputs]} if self.inputs else {}),
        }

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> ExportReport:
        """Read what ``to_json`` wrote."""
        kept = ("opset", "nodes", "operators", "parity_max_abs", "parity_max_rel", "parameters", "bytes")
        image = document["input"]
        return cls(
            **{name: document[name] for name in kept},
            parity_batches=tuple(document["parity_batches"]),
            input=(image["name"], tuple(image["shape"])),
            outputs=tuple((item["name"], tuple(item["shape"])) for item in document["outputs"]),
            notes=tuple(document["notes"]),
            inputs=tuple(
                NetworkInput(item["name"], tuple(item["shape"]), item["dtype"]) for item in document.get("inputs", ())
            ),
        )

    @property
    def selects_rows(self) -> bool:
        """Whether the graph selects its answers, so that their order means nothing."""
        return "TopK" in self.operators


def report_of(
    model: ir.Model,
    path: Path,
    parity: Parity,
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
        parity_max_abs=parity.absolute,
        parity_max_rel=parity.relative,
        parity_batches=tuple(batches),
        input=(str(model.graph.inputs[0].name), shape_of(model.graph.inputs[0])),
        inputs=inputs_of_graph(model) if len(model.graph.inputs) > 1 else (),
        outputs=tuple((str(value.name), shape_of(value)) for value in model.graph.outputs),
        parameters=sum(t.size for t in floats if t.dtype.is_floating_point()),
        bytes=sum(file.stat().st_size for file in files if file.exists()),
        notes=(*notes, *parity.notes),
    )


def inputs_of_graph(model: ir.Model) -> tuple[NetworkInput, ...]:
    """What a graph reads, in its own order; an image that may have several sizes has the usual one.

    Raises:
        ResvitError: for other types than ``resvit_export.loading.inputs.TYPES``, and for free sizes but the batch.
    """
    found, several = [], sizes_of_graph(model)
    for value in model.graph.inputs:
        sizes = shape_of(value) if value.shape is not None else ()
        if several is not None and len(sizes) == 4:
            usual = dict(zip((HEIGHT, WIDTH), several.usual, strict=True))
            sizes = (*sizes[:2], *(usual.get(str(size), size) for size in sizes[2:]))
        dtype = _TYPES.get(value.dtype) if value.dtype is not None else None
        fixed = tuple(size for size in sizes[1:] if isinstance(size, int))
        if dtype is None:
            kind = value.dtype.name.lower() if value.dtype is not None else "of no type"
            raise ResvitError(
                f"The input {value.name} is {kind} {list(sizes)}; read are {', '.join(_TYPES.values())}, and pixels as "
                "whole numbers.",
                "An image is [B, C, H, W] or [B, H, W, C], with its batch; another input needs one of those types.",
            )
        if not sizes:
            raise ResvitError(
                f"The input {value.name} is a single number, with no entry for each image.",
                "Make it a constant of the network, or give it the batch as its first axis.",
            )
        if len(fixed) != len(sizes) - 1:
            raise ResvitError(
                f"The input {value.name} is {dtype} {list(sizes)}: all sizes but the batch must be fixed.",
                f"Say its size, {_example_of(value, sizes)}, or export the network for one size.",
            )
        found.append(NetworkInput(str(value.name), fixed, dtype))
    return tuple(found)


def _example_of(value: ir.Value, sizes: Sequence[int | str]) -> str:
    """How to say sizes for one image, those that are known among them; of the only image alike in either layout."""
    usual = (1, 3, 224, 224)
    known = [size if isinstance(size, int) else usual[min(axis, 3)] for axis, size in enumerate(sizes)]
    own = "x".join(map(str, known[1:]))
    graph = value.graph
    image = len(known) == 4 and graph is not None and len(graph.inputs) == 1
    return f"for example --input-shape {own}" if image else f"for example --shape {value.name}=1x{own}"


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

    write_onnx(model, path, external_above)
    try:
        onnx.checker.check_model(str(path))
    except onnx.checker.ValidationError as error:
        path.unlink()
        raise ResvitError(
            f"The exported ONNX is not valid: {first_line(error)}",
            "This is a fault of the export; please report it with the model's name.",
            ExitCode.BUG,
        ) from error


def measure_parity(
    reference: Runner,
    candidate: Runner,
    inputs: Sequence[NetworkInput],
    batches: Sequence[int],
    *,
    what: str,
    sets: bool = False,
    seed: int = 0,
    sizes: Sequence[Size] = (),
    graph: Path | None = None,
) -> Parity:
    """Compare on random inputs of b images for every b of ``batches``, and on images without content.

    ``sizes`` are further ones of the image that are compared, where it may have several. ``graph`` is the candidate's
    ONNX file, in which scores that tie in front of a selection are looked for.

    Those are black, white and beyond, and half of each: where an epsilon was lost, they divide by zero.

    Raises ``ResvitError`` for differences beyond rounding (``resvit_calibrate.runtime.parity``), and for outputs of
    random images that are not finite; that of a flat image is a note.
    """
    random = np.random.default_rng(seed)
    absolute = relative = 0.0
    others = [((inputs[0].at_size(size), *inputs[1:]), batches[0]) for size in sizes]
    for shapes, batch in [*((inputs, batch) for batch in batches), *others]:
        feeds = random_feeds(shapes, batch, random)
        for name, found in differences(reference, candidate, feeds, sets=sets).items():
            if found.shapes[0] != found.shapes[1]:
                raise _translated_wrongly(
                    f"{what}: output {name} is {list(found.shapes[1])} for {list(found.shapes[0])} in the original"
                )
            if not found.finite:
                raise ResvitError(
                    f"{what}: the original gives {found.largest} in output {name} on random images.",
                    "Look for a division by zero, a logarithm or root of negative numbers, or weights that overflow.",
                )
            if not found.same:
                if graph is not None and sets and tied_scores(graph, feeds):
                    raise ResvitError(
                        f"{what}: scores in front of a selection (topk) are equal to the last bit on random images, so "
                        "that any rows may be selected: the network's scores do not depend on the image.",
                        "Untrained weights do that: give trained ones (--checkpoint), or a folder without weights, for "
                        "which random ones are drawn that keep signals apart.",
                    )
                _blame(reference, feeds, what, name, found, batch)
            absolute, relative = max(absolute, found.error), max(relative, found.error / max(found.largest, 1e-6))
    return Parity(absolute, relative, _flat_images(reference, candidate, inputs, what, sets))


def tied_scores(graph: Path, feeds: Arrays) -> bool:
    """Whether half of the values that a TopK of ``graph`` selects from ``feeds``, or more, are equal to the next."""
    model = ir.load(graph)
    chosen = [node.outputs[0] for node in model.graph if node.op_type == "TopK"]
    model.graph.outputs.extend(value for value in chosen if not value.is_graph_output())
    answers = onnx_runner(bytes(ir.to_proto(model).SerializeToString()), folder=graph.parent)(feeds)
    values = [answers[str(value.name)] for value in chosen]
    return any(value.shape[-1] > 1 and np.mean(np.diff(value, axis=-1) == 0.0) >= 0.5 for value in values)


def _flat_images(
    reference: Runner, candidate: Runner, inputs: Sequence[NetworkInput], what: str, sets: bool
) -> tuple[str, ...]:
    """Compare on images of one or two values; returns what to say of those for which the original is not finite."""
    feeds = random_feeds(inputs, len(FLAT_IMAGES), np.random.default_rng(0))
    image = feeds[inputs[0].name]
    for row, (_, left, right) in enumerate(FLAT_IMAGES):
        image[row], image[row, ..., image.shape[-1] // 2 :] = left, right
    found = flat_differences(reference, candidate, feeds, sets=sets)
    if found.wrong:
        if moved_between_runs(reference, feeds):
            raise _random(what)
        row, why = min(found.wrong.items())
        raise _translated_wrongly(f"{what}: on an image of {FLAT_IMAGES[row][0]}, {why}")
    said = "the network itself, before any conversion, gives NaN or infinity on an image of"
    return (f"{said} {', of '.join(FLAT_IMAGES[row][0] for row in sorted(found.broken))}",) if found.broken else ()


def _blame(reference: Runner, feeds: Arrays, what: str, name: str, found: Difference, batch: int) -> NoReturn:
    """Say whose fault a difference is: the network's, where it differs from itself, or is moved as far by rounding."""
    if moved_between_runs(reference, feeds):
        raise _random(what)
    told = f"{what}: output {name} differs by {found.error:.3g} from the original (batch {batch}, largest value "
    if found.chaotic:
        raise ResvitError(
            f"{told}{found.largest:.3g}), and rounding the image alone moves the original by {found.moved:.3g}.",
            "A network that rounding moves so far cannot be converted and checked: look for a division by nearly "
            "nothing, or scores that are all but equal in front of a selection.",
        )
    raise _translated_wrongly(f"{told}{found.largest:.3g})")


def _random(what: str) -> ResvitError:
    return ResvitError(
        f"{what}: the original is random: two runs on one image differ.",
        "Leave out what draws random numbers when it answers, such as a dropout in training mode.",
    )


def _translated_wrongly(told: str) -> ResvitError:
    return ResvitError(
        f"{told}.", "An operator was translated wrongly; please report this with the model's name.", ExitCode.BUG
    )


def selects_rows(model: ir.Model) -> bool:
    """Whether the graph picks rows by score, so that their order hangs on rounding."""
    return any(node.op_type == "TopK" for node in model.graph)
