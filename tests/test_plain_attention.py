"""``Attention`` written out: ONNX's reference gives the same, and only what gains by it is touched."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from resvit_export.to_onnx.canonical import infer_shapes
from resvit_export.to_onnx.plain_attention import write_out_attention

SHAPES = {"q": (2, 3, 5, 8), "k": (2, 3, 6, 8), "v": (2, 3, 6, 12)}


def attention(
    shapes: dict[str, tuple[int, ...]], mask: np.ndarray | None = None, hidden: float | None = None, **attributes: Any
) -> onnx.ModelProto:
    """One ``Attention``; where ``hidden`` is a number, ``mask`` is chosen against it by a Where."""
    nodes, inputs = [], ["q", "k", "v"]
    constants = [] if mask is None else [numpy_helper.from_array(mask, "mask")]
    if hidden is not None:
        constants += [numpy_helper.from_array(np.array(value, np.float32), f"{value}") for value in (hidden, 0.0)]
        nodes.append(helper.make_node("Where", ["mask", "0.0", f"{hidden}"], ["chosen"]))
    if mask is not None:
        inputs.append("mask" if hidden is None else "chosen")
    nodes.append(helper.make_node("Attention", inputs, ["output"], name="attn", **attributes))
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in shapes.items()]
    wanted = helper.make_tensor_value_info("output", TensorProto.FLOAT, None)
    graph = helper.make_graph(nodes, "attention", ends, [wanted], constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=11)


def written_out(model: onnx.ModelProto) -> tuple[int, onnx.ModelProto]:
    network = ir.serde.deserialize_model(model)
    infer_shapes(network)
    return write_out_attention(network), ir.serde.serialize_model(network)


RANDOM = np.random.default_rng(0)
ALLOWED = RANDOM.random((5, 6)) < 0.7
ALLOWED[:, 0] = True
PACKED = {"q": (2, 5, 24), "k": (2, 6, 24), "v": (2, 6, 36)}


@pytest.mark.parametrize(
    ("model", "count"),
    [
        (attention(SHAPES), 1),
        (attention(SHAPES, scale=0.3), 1),
        (attention(SHAPES, is_causal=1), 1),
        (attention(SHAPES, ALLOWED), 1),
        (attention(SHAPES, RANDOM.standard_normal((5, 6)).astype(np.float32)), 1),
        (attention(PACKED, q_num_heads=3, kv_num_heads=3), 1),
        (attention({**SHAPES, "v": (2, 3, 6, 8)}, ALLOWED, hidden=-1e9), 1),
        (attention({**SHAPES, "v": (2, 3, 6, 8)}), 0),
        (attention({**SHAPES, "v": (2, 3, 6, 8)}, ALLOWED, hidden=-100.0), 0),
        (attention(SHAPES, softcap=2.0), 0),
        (attention({"q": (2, 6, 5, 8), "k": (2, 3, 6, 8), "v": (2, 3, 6, 12)}), 0),
    ],
    ids=[
        *("widths", "scale", "causal", "boolean mask", "mask", "packed", "guarded", "own operator", "small mask"),
        *("soft cap", "shared heads"),
    ],
)
def test_the_answer_is_that_of_the_operator(model: onnx.ModelProto, count: int) -> None:
    feeds = {
        value.name: RANDOM.standard_normal([size.dim_value for size in value.type.tensor_type.shape.dim]).astype(
            np.float32
        )
        for value in model.graph.input
    }
    expected = ReferenceEvaluator(model).run(None, feeds)[0]
    changed, after = written_out(model)
    assert changed == count
    assert ("Attention" in [node.op_type for node in after.graph.node]) is (count == 0)
    onnx.checker.check_model(after, full_check=True)
    np.testing.assert_allclose(ReferenceEvaluator(after).run(None, feeds)[0], expected, rtol=1e-4, atol=1e-5)
