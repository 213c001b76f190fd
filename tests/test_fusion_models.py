"""Whole networks, masks, windows, keys of other tokens: as many nodes as blocks, and the outputs that runners give."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnx
import onnx_ir as ir
import pytest

import fusion_large_models as models
from fusion_models import Built, plain_names, values_of
from quantize_graphs import sqnr
from resvit_calibrate.runtime.runner import onnx_runner
from resvit_engines.targets.table import Precision
from resvit_quantize.fusion.fuse import fuse, our_nodes
from resvit_quantize.fusion.match import FusionReport, Kind

pytestmark = pytest.mark.whole

BOTH = frozenset({Kind.ATTENTION, Kind.BRIDGE})


class Expected(NamedTuple):
    opset: int
    attention: dict[str, int]
    """Nodes by op type, without the Q of one that writes 8 bits."""
    bridges: int = 0
    refused: tuple[str, ...] = ()


# Both opsets of small ones are in ``test_fusion_families``.
NETWORKS = {
    "levit_128s": Expected(
        23, {"ResvitAttentionBias": 9, "ResvitAttentionSplitBias": 2}, refused=("its filter is 3x3",)
    ),
    "botnet26t": Expected(20, {"ResvitAttentionBias": 3}),
    "vit_of_two_blocks": Expected(23, {"ResvitAttention": 2}, refused=("its filter is 16x16",)),
    "cross": Expected(20, {"ResvitAttentionSplit": 2}, 1),
    "masked": Expected(23, {"ResvitAttentionBias": 1}, 1),
    "dense": Expected(20, {"ResvitAttentionSplit": 2}, refused=("its filter is 8x8",)),
    "windows": Expected(23, {"ResvitAttentionBias": 1}, 1),
}
ALIKE = {Precision.FP16: 45.0, Precision.INT8: 30.0}
"""dB between outputs: see ``test_fusion_families``; an output stands behind a mean, or a sum over many tokens. Values
in between, which do not, may be five less in INT8."""


class Case(NamedTuple):
    built: Built
    expected: Expected
    precision: Precision
    path: Path
    report: FusionReport


@pytest.fixture(scope="module")
def networks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Built]:
    """What was built so far."""
    return {}


LARGE = ("levit_128s", "botnet26t", "cross", "windows", "dense")
CASES = [
    pytest.param(
        (name, precision),
        id=f"{name}-{precision.value}",
        marks=pytest.mark.slow if name in LARGE else (),
    )
    for name in NETWORKS
    for precision in ALIKE
]


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest, networks: dict[str, Built], tmp_path_factory: pytest.TempPathFactory) -> Case:
    name, precision = request.param
    if name not in networks:
        spec = f"{Path(models.__file__)}:{name}"
        networks[name] = Built(tmp_path_factory.mktemp(name), spec, NETWORKS[name].opset)
    built = networks[name]
    path = built.folder / f"{precision.value}-fused.onnx"
    model = ir.load(built.path(precision))
    report = fuse(model, BOTH)
    ir.save(model, path)
    return Case(built, NETWORKS[name], precision, path, report)


@pytest.mark.slow
def test_there_are_as_many_nodes_as_blocks_and_the_outputs_stay(case: Case) -> None:
    onnx.checker.check_model(onnx.load(case.path), full_check=True)
    model = ir.load(case.path)
    found = Counter(node.op_type.removesuffix("Q") for node in our_nodes(model))
    bridges = sum(count for name, count in found.items() if "Bridge" in name)
    attention = {name: count for name, count in found.items() if "Attention" in name}
    assert (attention, bridges) == (case.expected.attention, case.expected.bridges)
    assert found.total() == len(case.report.matches)
    assert tuple(one.reason.partition(",")[0] for one in case.report.refusals) == case.expected.refused
    names = [str(node.name) for node in our_nodes(model)]
    assert sorted(names) == sorted({match.name for match in case.report.matches})

    plain, images = case.built.path(case.precision), case.built.images
    # As they are written, and as the project's own runner scores them: with what ONNX Runtime fuses and inlines.
    names = [plain_names(ir.load(path)) for path in (plain, case.path)]
    written = [values_of(ir.load(path), images, names[0] & names[1]) for path in (plain, case.path)]
    name = ir.load(plain).graph.inputs[0].name
    run = [onnx_runner(path)({str(name): images}) for path in (plain, case.path)]
    far = {value: sqnr(written[0][value], written[1][value]) for value in written[0] if np.any(written[0][value])}
    assert min(far.values()) >= ALIKE[case.precision] - 5.0 * (case.precision is Precision.INT8)
    for output in run[0]:
        assert np.std(run[0][output]) > 0
        assert sqnr(run[0][output].astype(np.float64), run[1][output].astype(np.float64)) >= ALIKE[case.precision]


@pytest.mark.parametrize("name", NETWORKS)
def test_attention_has_an_influence_that_a_wrong_one_would_show(name: str, networks: dict[str, Built]) -> None:
    """Twice the scale of the logits moves some value by more than is let pass."""
    if name not in networks:
        pytest.skip("its network was not built: the test before was not run")
    plain = ir.load(networks[name].path(Precision.FP16))
    model = plain.clone()
    fuse(model, BOTH)
    for node in our_nodes(model):
        scale = node.attributes.get("logit_scale")
        if scale is not None:
            node.attributes["logit_scale"] = ir.AttrFloat32("logit_scale", 2.0 * float(scale.value))
    both = plain_names(plain) & plain_names(model)
    right, wrong = (values_of(one, networks[name].images, both) for one in (plain, model))
    assert min(sqnr(right[value], wrong[value]) for value in both if np.any(right[value])) < ALIKE[Precision.FP16] - 5.0
