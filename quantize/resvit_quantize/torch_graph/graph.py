"""An ONNX graph as a differentiable torch module, with a say in what its matrix products read and write.

Sensitivity, learned rounding and recovery all need gradients of the very graph that is quantised, under its own
names; PyTorch's program has others, and a model that came as ONNX has none.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor, nn

from resvit_calibrate.images.image_set import Batch
from resvit_engines.errors import ExitCode, ResvitError
from resvit_quantize.graph.network import constant
from resvit_quantize.torch_graph.operators import OPERATORS

Reading: TypeAlias = Callable[[ir.Node, int, Tensor], Tensor]
"""Called for every float input (by index) of a product or an Add; what it returns is read instead."""
Writing: TypeAlias = Callable[[ir.Node, Tensor], Tensor]
"""Called for the first output of the same nodes; what it returns is passed on instead."""

_HEARD = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul", "Add"})


class TorchGraph(nn.Module):
    """A float ONNX graph as a module; values keep their names.

    Float constants become parameters where ``trainable``, else buffers (see :meth:`tensor`). Raises
    :class:`ResvitError` (IMPOSSIBLE) for a graph with an operator that has no torch form here, naming it.
    """

    def __init__(self, model: ir.Model, *, trainable: bool = False) -> None:
        super().__init__()
        if missing := unsupported_operators(model):
            raise ResvitError(
                f"The graph holds {', '.join(missing)}, through which no gradient can be taken here.",
                "Use --effort fast, and 'sensitivity --method brute-force': both need no gradients.",
                ExitCode.IMPOSSIBLE,
            )
        self.nodes = list(model.graph)
        self.inputs = [str(value.name) for value in model.graph.inputs if value.name not in model.graph.initializers]
        self.outputs = [str(value.name) for value in model.graph.outputs]
        self.slots: dict[str, str] = {}
        """Where the constant of each name lives in this module."""
        for index, (name, value) in enumerate(model.graph.initializers.items()):
            array = constant(value)
            assert array is not None
            tensor = torch.from_numpy(np.array(array))
            self.slots[name] = f"constant_{index}"
            if trainable and tensor.is_floating_point():
                self.register_parameter(self.slots[name], nn.Parameter(tensor))
            else:
                self.register_buffer(self.slots[name], tensor)
        self.attributes = {node: attributes_of(node) for node in self.nodes}
        self.last_use = _last_uses(model)

    def tensor(self, name: str) -> Tensor:
        """The constant of this name: a parameter or a buffer."""
        found: Tensor = getattr(self, self.slots[name])
        return found

    def feeds(self, batch: Batch) -> dict[str, Tensor]:
        """What the graph reads of a batch, by the names of its inputs; the images are its first."""
        arrays = batch.feeds(self.inputs[0])
        if missing := [name for name in self.inputs if name not in arrays]:
            raise ResvitError(
                f"The network reads {', '.join(missing)} beside its images, and the data does not give it.",
                "Give it in the batches' `inputs`, by name.",
            )
        return {name: torch.from_numpy(np.ascontiguousarray(arrays[name])) for name in self.inputs}

    def forward(
        self, feeds: Mapping[str, Tensor], reading: Reading | None = None, writing: Writing | None = None
    ) -> dict[str, Tensor]:
        """Compute the graph's outputs by name from what its inputs are fed, as :meth:`feeds` gives it."""
        values: dict[str, Tensor] = {name: self.tensor(name) for name in self.slots}
        values.update(feeds)
        for node in self.nodes:
            inputs: list[Any] = [None if v is None else values[str(v.name)] for v in node.inputs]
            heard = node.op_type in _HEARD
            if heard and reading is not None:
                inputs = [
                    reading(node, index, value) if value is not None and value.is_floating_point() else value
                    for index, value in enumerate(inputs)
                ]
            result = self.evaluate(node, inputs)
            results = list(result) if isinstance(result, tuple) else [result]
            _require_all(node, len(results))
            if heard and writing is not None and results[0].is_floating_point():
                results[0] = writing(node, results[0])
            values.update({str(v.name): r for v, r in zip(node.outputs, results, strict=False)})
            for name in self.last_use[node]:
                values.pop(name, None)
        return {name: values[name] for name in self.outputs}

    def evaluate(self, node: ir.Node, inputs: list[Any]) -> Tensor | tuple[Tensor, ...]:
        """Compute one node from inputs given in order, ``None`` where one is left out.

        Raises :class:`ResvitError` (IMPOSSIBLE) for attributes that have no torch form here.
        """
        try:
            return OPERATORS[node.op_type](inputs, self.attributes[node])
        except (NotImplementedError, KeyError) as error:
            raise _refusal(node, str(error)) from error


def _refusal(node: ir.Node, why: str) -> ResvitError:
    return ResvitError(
        f"{node.name} is a {node.op_type} of a kind that has no gradient here: {why}.",
        "Use --effort fast, and 'sensitivity --method brute-force': both need no gradients.",
        ExitCode.IMPOSSIBLE,
    )


def _require_all(node: ir.Node, count: int) -> None:
    """Refuse a node of whose outputs only the first ``count`` can be computed, and a later one is read."""
    for value in node.outputs[count:]:
        if value.is_graph_output() or any(True for _ in value.uses()):
            raise _refusal(node, f"its output {value.name} is read")


def filled(feeds: Mapping[str, Tensor], count: int) -> dict[str, Tensor]:
    """``count`` entries of each, for a fixed batch: what is missing is the last one again, what is beyond is left."""
    found = {}
    for name, value in feeds.items():
        kept = value[:count]
        found[name] = torch.cat([kept, kept[-1:].expand(count - len(kept), *kept.shape[1:])])
    return found


def unsupported_operators(model: ir.Model) -> tuple[str, ...]:
    """The operators of a graph that have no torch form here, each once, in the graph's order."""
    unknown = (node for node in model.graph if node.domain not in ("", "ai.onnx") or node.op_type not in OPERATORS)
    return tuple(dict.fromkeys(f"{node.domain}::{node.op_type}".removeprefix("::") for node in unknown))


def attributes_of(node: ir.Node) -> dict[str, Any]:
    """Attributes as plain Python values (tensors as torch's), and how many outputs the node has."""
    found: dict[str, Any] = {"outputs": len(node.outputs)}
    for name, attribute in node.attributes.items():
        if attribute.type == ir.AttributeType.TENSOR:
            found[name] = torch.from_numpy(np.array(attribute.as_tensor().numpy()))
        else:
            found[name] = list(attribute.value) if isinstance(attribute.value, tuple) else attribute.value
    return found


def _last_uses(model: ir.Model) -> dict[ir.Node, list[str]]:
    """The computed values that nothing needs behind each node, so that they can be let go."""
    kept = {value.name for value in model.graph.outputs} | set(model.graph.initializers)
    last: dict[str, ir.Node] = {}
    for node in model.graph:
        for value in (*node.inputs, *node.outputs):
            if value is not None and value.name not in kept:
                last[str(value.name)] = node
    found: dict[ir.Node, list[str]] = {node: [] for node in model.graph}
    for name, node in last.items():
        found[node].append(name)
    return found
