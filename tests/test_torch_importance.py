"""Positions count as much as they matter: their weights, the rows drawn by them, and what is fitted for them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from quantize_graphs import Graph, batches
from resvit_quantize.graph.network import network_from_onnx

torch = pytest.importorskip("torch")

from resvit_quantize.rounding.importance import position_importance  # noqa: E402
from resvit_quantize.rounding.layer_rows import LayerRows  # noqa: E402
from resvit_quantize.torch_graph.graph import TorchGraph  # noqa: E402


def found(path: Path, images: np.ndarray) -> dict[str, np.ndarray]:
    network = network_from_onnx(path)
    graph = TorchGraph(network)
    nodes = [node for node in graph.nodes if node.op_type in ("Conv", "MatMul", "Gemm")]
    return {str(node.name): value.numpy() for node, value in position_importance(graph, nodes, batches(images)).items()}


def test_only_the_class_token_matters_in_front_of_its_head(tmp_path: Path) -> None:
    g = Graph("batch", 17, 24)
    tokens = g.linear("input", 24, 24, "fc")
    first = g.op("Gather", tokens, g.constant("first", np.array(0)), axis=1)
    path = g.save(tmp_path / "m.onnx", g.linear(first, 24, 10, "head"))
    weights = found(path, np.random.default_rng(0).standard_normal((8, 17, 24)).astype(np.float32))
    fc = weights["fc/MatMul"]
    assert fc.shape == (17,)
    assert fc.mean() == pytest.approx(1.0)
    assert fc[0] > 15
    assert (fc[1:] < 0.06).all()
    assert (fc > 0).all()


def test_positions_that_are_averaged_matter_alike(tmp_path: Path) -> None:
    g = Graph(4, 8, 6, 6)
    path = g.save(tmp_path / "m.onnx", g.op("GlobalAveragePool", g.conv("input", 8, 8, size=1, name="conv")))
    weights = found(path, np.random.default_rng(0).standard_normal((4, 8, 6, 6)).astype(np.float32))
    np.testing.assert_allclose(weights["conv"], np.ones(36), rtol=1e-5)


def test_what_reaches_no_output_has_no_weights(tmp_path: Path) -> None:
    g = Graph("batch", 17, 24)
    zero = g.op("Mul", g.linear("input", 24, 24, "fc"), g.constant("zero", np.zeros(1, np.float32)))
    path = g.save(tmp_path / "m.onnx", zero)
    assert not found(path, np.ones((2, 17, 24), np.float32))


def test_rows_drawn_by_importance_are_unbiased() -> None:
    """Weighted sums over the drawn rows come to the weighted sum over all rows."""
    import onnx_ir as ir

    node = ir.node("MatMul", [ir.Value(name="x"), ir.Value(name="w")])
    importance = torch.tensor([16.0] + [0.1] * 49)
    importance = importance / importance.mean()
    values = torch.randn(64, 50, 8, generator=torch.Generator().manual_seed(0)) + torch.arange(50.0)[:, None]
    rows = LayerRows(node, (8, 4), 1, importance)
    rows.each = 400
    drawn = rows.of([values])[0]
    weights = rows.weights()
    assert weights.mean() == pytest.approx(1.0, rel=1e-5)
    assert len(drawn) == pytest.approx(400, rel=0.2)
    # All 64 class tokens are there, once each.
    assert (drawn.round(decimals=4)[:, None] == values[:, 0].round(decimals=4)[None]).all(-1).any(0).all()
    got = (drawn * weights).sum(0) / weights.sum()
    want = (values * importance[:, None]).mean((0, 1))
    torch.testing.assert_close(got, want, rtol=0, atol=1.0)


def test_with_few_rows_all_are_taken_once() -> None:
    import onnx_ir as ir

    node = ir.node("MatMul", [ir.Value(name="x"), ir.Value(name="w")])
    values = torch.randn(3, 5, 8)
    rows = LayerRows(node, (8, 4), 1, torch.tensor([4.0, 0.25, 0.25, 0.25, 0.25]))
    torch.testing.assert_close(rows.of([values])[0], values.reshape(15, 8))
    torch.testing.assert_close(rows.weights()[:5, 0], torch.tensor([4.0, 0.25, 0.25, 0.25, 0.25]))
