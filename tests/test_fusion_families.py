"""Real networks through the rewrites: what becomes a node, and that every value behind it stays what it was."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnx
import onnx_ir as ir
import pytest

import fusion_models
from fusion_models import Built, factory_name, plain_names, values_of
from quantize_graphs import sqnr
from resvit_engines.targets.table import Precision
from resvit_quantize.fusion.fuse import config_of, fuse, our_nodes
from resvit_quantize.fusion.match import Kind

pytestmark = pytest.mark.whole

ALIKE = {Precision.FP16: 45.0, Precision.INT8: 25.0}
"""dB between the plain graph and ours. In FP16 each rounding is 66 dB below its value or better, and up to a hundred
lie one behind another. In INT8 a difference in the last digit can turn a rounding, which is then a whole step."""
IN_8_BITS = 18.0
"""The same where attention is multiplied in 8 bits: steps of 1/127 of the largest, or of 1/16 of the value itself."""
BOTH = frozenset({Kind.ATTENTION, Kind.BRIDGE})


class Family(NamedTuple):
    model: str
    layouts: dict[str, int]
    """Attention blocks by layout; the only ones there are."""
    bridges: int = 0
    refused: str = ""
    """What stands in the reason why another bridge is left, if one is."""
    bias: bool = False


FAMILIES = {
    "embed": Family("resvit:embed-nano", {"packed": 3}, 1),
    "fpn": Family("resvit:fpn-nano", {"packed": 2}, 1, "its filter is 2x2"),
    "dual": Family("resvit:dual-nano", {"packed": 3}, 1, "its filter is 4x4"),
    "vit": Family(factory_name(fusion_models.timm_vit), {"packed": 1}, 0, "its filter is 16x16"),
    "hybrid": Family(factory_name(fusion_models.timm_hybrid), {"packed": 1}, 0, "its filter is 8x8"),
    "resnet_hybrid": Family(factory_name(fusion_models.timm_resnet_hybrid), {"packed": 1}, 1),
    "botnet": Family(factory_name(fusion_models.botnet), {"channels": 2}, bias=True),
    "levit": Family(factory_name(fusion_models.levit), {"per_head": 2, "q_kv": 1}, 0, "its filter is 3x3", bias=True),
    "mobilevit": Family(factory_name(fusion_models.mobilevit), {"packed": 2}),
    "separate": Family(factory_name(fusion_models.separate), {"split": 1}, 1),
    "multihead": Family(factory_name(fusion_models.multihead), {"packed": 1}, 1),
    "batch_second": Family(factory_name(fusion_models.multihead_batch_second), {"packed": 1}, 1),
    "encoder": Family(factory_name(fusion_models.encoder_layer), {"packed": 1}, 1),
}


QUICK = ("embed", "separate", "multihead")
"""One of ours, and the two smallest of others."""
CASES = [
    *(pytest.param(family, 20, marks=() if family in QUICK else pytest.mark.slow) for family in FAMILIES),
    *(pytest.param(family, 23, marks=pytest.mark.slow) for family in ("embed", "separate", "botnet", "levit")),
]


@pytest.mark.slow
@pytest.mark.parametrize(("family", "opset"), CASES)
def test_a_familys_attention_and_bridges_become_nodes(tmp_path: Path, family: str, opset: int) -> None:
    expected, built = FAMILIES[family], Built(tmp_path, FAMILIES[family].model, opset)
    for precision in fusion_models.PRECISIONS:
        plain, model = (ir.load(built.path(precision)) for _ in range(2))
        report = fuse(model, BOTH)
        check(model)
        attention = [match for match in report.matches if match.kind is Kind.ATTENTION]
        assert Counter(match.config.layout for match in attention) == expected.layouts
        assert all((match.config.bias is not None) == expected.bias for match in attention)
        assert len(report.matches) - len(attention) == expected.bridges
        reasons = [refusal.reason.partition(",")[0] for refusal in report.refusals]
        assert reasons == ([expected.refused] if expected.refused else [])
        assert not any(node.op_type in ("Softmax", "Attention") for node in model.graph)
        configs = {node.name: config_of(node) for node in our_nodes(model)}
        assert configs == {match.name: match.config for match in report.matches}
        assert_alike(plain, model, built.images, ALIKE[precision])
    for dtype in ("int8", "fp8"):
        plain, model = (ir.load(built.path(Precision.FP16)) for _ in range(2))
        report = fuse(model, frozenset({Kind.ATTENTION}), operands=built.operands(dtype))
        check(model)
        assert Counter(match.config.layout for match in report.matches) == expected.layouts
        assert all(match.config.dtype == dtype for match in report.matches)
        for node in our_nodes(model):
            read = node.inputs[: -1 if expected.bias else None]
            assert {value.producer().op_type for value in read} == {"QuantizeLinear"}
        assert_alike(plain, model, built.images, IN_8_BITS)


def check(model: ir.Model) -> None:
    onnx.checker.check_model(ir.serde.serialize_model(model), full_check=True)
    # Function and node go by one name.
    assert {name for _, name, _ in model.functions} == {node.op_type for node in our_nodes(model)}


def assert_alike(plain: ir.Model, model: ir.Model, images: np.ndarray, least: float) -> None:
    """Every value that both graphs have, ``least`` dB of signal to noise."""
    kept = plain_names(plain) & plain_names(model)
    right, got = values_of(plain, images, kept), values_of(model, images, kept)
    far = {name: sqnr(right[name], got[name]) for name in right if np.any(right[name])}
    assert len(far) > len(kept) // 2
    assert {name: round(value, 1) for name, value in far.items() if not value >= least} == {}
