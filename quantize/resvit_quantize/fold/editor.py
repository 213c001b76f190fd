"""Edit an exported program in place: its constants by graph node, new constants, and back to a valid program."""

from __future__ import annotations

import copy
from typing import Any, TypeGuard

import torch
from torch import fx
from torch.export import ExportedProgram
from torch.export.graph_signature import (
    ConstantArgument,
    ExportGraphSignature,
    InputKind,
    InputSpec,
    OutputSpec,
    TensorArgument,
)

_CONSTANT_KINDS = (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR)


class GraphEditor:
    """A functional ATen graph together with the tensors that its placeholders stand for.

    ``program`` must come from ``run_decompositions``: without in-place operations, so that a node's users see
    the value it returned. The program given is left as it was.
    """

    def __init__(self, program: ExportedProgram) -> None:
        self.program = program
        self.graph = copy.deepcopy(program.graph)
        signature = program.graph_signature
        # By position: copying may rename a placeholder that is called like one of Python's builtins.
        placeholders = [node for node in self.graph.nodes if node.op == "placeholder"]
        self._specs: dict[fx.Node, InputSpec] = dict(zip(placeholders, signature.input_specs, strict=True))
        self._added: dict[fx.Node, torch.Tensor] = {}
        self._wanted: dict[fx.Node, str] = {}

    def is_constant(self, node: object) -> TypeGuard[fx.Node]:
        """Whether ``node`` is a placeholder of a parameter, buffer or constant."""
        if not isinstance(node, fx.Node) or node.op != "placeholder":
            return False
        if node in self._added:
            return True
        spec = self._specs.get(node)
        return spec is not None and spec.kind in _CONSTANT_KINDS

    def value(self, node: fx.Node) -> torch.Tensor:
        """The tensor behind a constant placeholder, floats in float64: what was folded is not rounded yet."""
        tensor = self._added[node] if node in self._added else self._tensor(self._specs[node])
        return tensor.detach().to(torch.float64) if tensor.is_floating_point() else tensor.detach()

    def path(self, node: fx.Node) -> str:
        """The dotted name of a constant in the user's module, ``blocks.0.attn.qkv.weight``."""
        return self._wanted[node] if node in self._wanted else str(self._specs[node].target)

    def add_constant(self, value: torch.Tensor, path: str, dtype: torch.dtype) -> fx.Node:
        """A placeholder for a new parameter. It takes over the name ``path`` if nothing else uses that."""
        first: fx.Node = next(node for node in self.graph.nodes if not self._is_parameter(node))
        with self.graph.inserting_before(first):
            node: fx.Node = self.graph.placeholder("p_" + path.replace(".", "_"))
        node.target = node.name  # the name is unique, and the target becomes an argument of the generated code
        node.meta["val"] = self._fake_mode().from_tensor(value.to(dtype), static_shapes=True)
        self._added[node] = value
        self._wanted[node] = path
        return node

    def finish(self) -> ExportedProgram:
        """Drop what is unused, then rebuild and verify the program."""
        self.graph.eliminate_dead_code()
        kept: list[tuple[fx.Node, InputSpec]] = []
        for node in [node for node in self.graph.nodes if node.op == "placeholder"]:
            if self.is_constant(node) and not node.users:
                self.graph.erase_node(node)
            elif node not in self._added:
                kept.append((node, self._specs[node]))
        taken = {str(spec.target) for _, spec in kept if spec.target}
        state: dict[str, torch.Tensor | torch.nn.Parameter] = {}
        constants = {str(key): value for key, value in self.program.constants.items() if key in taken}
        for _, spec in kept:
            if spec.target in self.program.state_dict:
                state[str(spec.target)] = self.program.state_dict[str(spec.target)]
        by_node = dict(kept)
        for node in [node for node in self.graph.nodes if node in self._added]:
            path = _unused(self._wanted[node], taken)
            taken.add(path)
            dtype = node.meta["val"].dtype
            tensor = self._added[node].to(dtype).contiguous()
            state[path] = torch.nn.Parameter(tensor, requires_grad=False)
            by_node[node] = InputSpec(InputKind.PARAMETER, TensorArgument(node.name), path)
        specs = []
        for node in [node for node in self.graph.nodes if node.op == "placeholder"]:
            spec = by_node[node]
            arg = TensorArgument(node.name) if isinstance(spec.arg, TensorArgument) else spec.arg
            specs.append(InputSpec(spec.kind, arg, spec.target, spec.persistent))
        self._forget_source_lines()
        self.graph.lint()
        return ExportedProgram(
            root=torch.nn.Module(),
            graph=self.graph,
            graph_signature=ExportGraphSignature(specs, self._output_specs()),
            state_dict=state,
            range_constraints=self._range_constraints(),
            module_call_graph=copy.deepcopy(self.program.module_call_graph),
            example_inputs=self.program.example_inputs,
            constants=constants,
            verifiers=self.program.verifiers,
        )

    def _range_constraints(self) -> dict[Any, Any]:
        """The bounds of those free sizes that still stand in the graph: what only a check read is gone with it."""
        free: set[Any] = set()
        for node in self.graph.nodes:
            for value in torch.utils._pytree.tree_leaves(node.meta.get("val")):
                sizes = value.shape if isinstance(value, torch.Tensor) else (value,)
                free |= {s for size in sizes if isinstance(size, torch.SymInt) for s in size.node.expr.free_symbols}
        return {symbol: bounds for symbol, bounds in self.program.range_constraints.items() if symbol in free}

    def _tensor(self, spec: InputSpec) -> torch.Tensor:
        target = str(spec.target)
        tensors = self.program.state_dict if target in self.program.state_dict else self.program.constants
        tensor = tensors[target]
        assert isinstance(tensor, torch.Tensor)
        return tensor

    def _is_parameter(self, node: fx.Node) -> bool:
        if node.op != "placeholder":
            return False
        return node in self._added or self._specs[node].kind is InputKind.PARAMETER

    def _fake_mode(self) -> torch._subclasses.FakeTensorMode:
        for node in self.graph.nodes:
            value = node.meta.get("val")
            if isinstance(value, torch._subclasses.FakeTensor):
                return value.fake_mode
        raise AssertionError("an exported graph holds tensors")

    def _output_specs(self) -> list[OutputSpec]:
        outputs = self.graph.output_node().args[0]
        assert isinstance(outputs, (tuple, list))
        specs = []
        for spec, output in zip(self.program.graph_signature.output_specs, outputs, strict=True):
            named = isinstance(output, fx.Node) and not isinstance(spec.arg, ConstantArgument)
            arg = TensorArgument(output.name) if named and isinstance(output, fx.Node) else spec.arg
            specs.append(OutputSpec(spec.kind, arg, spec.target))
        return specs

    def _forget_source_lines(self) -> None:
        """Source paths would leak the user's folders and make the file depend on where it was made."""
        for node in self.graph.nodes:
            for key in ("stack_trace", "from_node", "source_fn_stack", "seq_nr"):
                node.meta.pop(key, None)


def _unused(path: str, taken: set[str]) -> str:
    if path not in taken:
        return path
    numbers = (f"{path}_folded{suffix}" for suffix in ["", *(f"_{i}" for i in range(1, len(taken) + 2))])
    return next(name for name in numbers if name not in taken)


def module_path(node: fx.Node) -> str:
    """Dotted path of the module whose forward made ``node``; empty for the outermost."""
    stack = node.meta.get("nn_module_stack") or {}
    path = ""
    for key, entry in stack.items():
        if not str(key).startswith("_empty"):
            path = str(entry[0])
    return path.removeprefix("L__self__.").removeprefix("L['self'].")
