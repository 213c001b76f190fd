from __future__ import annotations

import json
from pathlib import Path

import pytest

from resvit_engines.errors import ExitCode, ResvitError
from resvit_engines.records import Record
from resvit_engines.targets.choice import rtx_in_place, tensorrts_of, with_builder, with_tensorrt
from resvit_engines.targets.software import CUDA_OF_TENSORRT, JETPACKS, NEWEST_TENSORRT, PTX_OF_CUDA, version_of
from resvit_engines.targets.table import (
    RTX_SMS,
    TARGETS,
    TENSOR_CORES,
    Builder,
    Kind,
    Precision,
    Target,
    find_target,
    require_precision,
)

# (name, SM, FP8, builder) as in NVIDIA's list of compute capabilities.
KNOWN = [
    ("jetson-orin", 87, False, Builder.TENSORRT),
    ("jetson-orin-nx", 87, False, Builder.TENSORRT),
    ("jetson-orin-nano", 87, False, Builder.TENSORRT),
    ("jetson-thor", 110, True, Builder.TENSORRT),
    ("a100", 80, False, Builder.TENSORRT),
    ("a10", 86, False, Builder.TENSORRT),
    ("l4", 89, True, Builder.TENSORRT),
    ("l40s", 89, True, Builder.TENSORRT),
    ("h100", 90, True, Builder.TENSORRT),
    ("h200", 90, True, Builder.TENSORRT),
    ("b200", 100, True, Builder.TENSORRT),
    ("rtx-4090", 89, True, Builder.RTX),
    ("rtx-5090", 120, True, Builder.RTX),
    ("dgx-spark", 121, True, Builder.TENSORRT),
    ("cpu", 0, False, Builder.ONNXRUNTIME),
]


def test_the_table_holds_exactly_the_known_targets() -> None:
    rows = [(t.name, t.sm, Precision.FP8 in t.precisions, t.builder) for t in TARGETS]
    assert rows == KNOWN


GPUS = [target for target in TARGETS if not target.on_cpu]


@pytest.mark.parametrize("target", GPUS, ids=lambda target: target.name)
def test_each_target_is_whole(target) -> None:
    assert find_target(target.name) == target
    assert {Precision.FP16, Precision.INT8} <= target.precisions
    assert target.sparsity
    assert (target.builder is Builder.RTX) == (target.kind is Kind.RTX)
    assert target.sm in RTX_SMS or target.builder is Builder.TENSORRT
    assert (target.kind is Kind.JETSON) == (target.jetpack is not None)
    if target.builder is Builder.TENSORRT:
        assert target.tensorrt in tensorrts_of(target)
    assert 0 < target.workspace_mib < target.memory_mib
    assert target.title in target.describe
    json.dumps(target.to_json(), allow_nan=False)


def test_json_holds_plain_values() -> None:
    plain = find_target("jetson-orin").to_json()
    assert plain["sm"] == 87
    assert plain["jetpack"] == "6.2"
    assert plain["tensorrt"] == "10.3"
    assert plain["builder"] == "tensorrt"
    assert plain["precisions"] == ["fp16", "int8"]
    assert plain["opset"] == 20


@pytest.mark.parametrize(
    ("name", "jetpack", "tensorrt", "cuda", "opset"),
    [
        ("jetson-orin", None, "10.3", "12.6", 20),
        ("jetson-orin", "6.1", "10.3", "12.6", 20),
        ("jetson-orin", "6.2.1", "10.3", "12.6", 20),
        ("jetson-orin", "7.2", "10.16", "13.2", 23),
        ("jetson-orin-nano", "7.2", "10.16", "13.2", 23),
        ("jetson-thor", None, "10.13", "13.0", 20),
        ("jetson-thor", "7.2.1", "10.16", "13.2", 23),
        ("h100", None, "11.4", "13", 23),
        ("l4", None, "11.4", "13", 23),
        ("rtx-4090", None, "1.7", "13", 23),
    ],
)
def test_software_on_the_target(name, jetpack, tensorrt, cuda, opset) -> None:
    target = find_target(name, jetpack)
    assert (target.tensorrt, target.cuda, target.opset) == (tensorrt, cuda, opset)


@pytest.mark.parametrize(
    ("name", "jetpack", "says"),
    [
        ("jetson-orin", "5.1.2", ["TensorRT 8.5", "6.1, 6.2, 7.2"]),
        ("jetson-orin", "5.0", ["6.1, 6.2, 7.2"]),
        ("jetson-orin", "4.6", ["6.1, 6.2, 7.2"]),
        ("jetson-orin", "6.0", ["TensorRT 8.6", "6.1, 6.2, 7.2"]),
        ("jetson-orin", "6.9", ["not in the table", "6.1, 6.2, 7.2"]),
        ("jetson-orin", "newest", ["not in the table"]),
        ("jetson-orin", "", ["not in the table"]),
        ("jetson-orin", "7.1", ["does not run on Jetson AGX Orin", "6.1, 6.2, 7.2"]),
        ("jetson-thor", "6.2", ["does not run on Jetson Thor", "7.1, 7.2"]),
        ("l4", "6.2", ["L4 is not a Jetson"]),
    ],
)
def test_impossible_jetpacks_are_refused_with_what_to_use(name, jetpack, says) -> None:
    with pytest.raises(ResvitError) as caught:
        find_target(name, jetpack)
    assert caught.value.code is ExitCode.IMPOSSIBLE
    assert all(words in str(caught.value) for words in says)


@pytest.mark.parametrize(
    ("asked", "near"),
    [("orin", "jetson-orin"), ("jetson-orinn", "jetson-orin"), ("rtx4090", "rtx-4090"), ("thor", "jetson-thor")],
)
def test_an_unknown_name_gets_the_nearest(asked, near) -> None:
    with pytest.raises(ResvitError) as caught:
        find_target(asked)
    assert caught.value.code is ExitCode.IMPOSSIBLE
    assert near in caught.value.fix.partition("?")[0]


@pytest.mark.parametrize("asked", ["", "tpu", "xavier"])
def test_a_foreign_name_gets_the_whole_list(asked) -> None:
    with pytest.raises(ResvitError) as caught:
        find_target(asked)
    assert all(target.name in caught.value.fix for target in TARGETS)


def test_names_forgive_case_and_underscores() -> None:
    assert find_target(" Jetson_Orin ").name == "jetson-orin"


@pytest.mark.parametrize("name", ["jetson-orin", "a100", "a10"])
def test_fp8_below_compute_capability_8_9_is_refused_and_int8_named(name) -> None:
    with pytest.raises(ResvitError) as caught:
        require_precision(find_target(name), Precision.FP8)
    assert caught.value.code is ExitCode.IMPOSSIBLE
    assert "8.9" in caught.value.problem
    assert "int8" in caught.value.fix


def test_possible_precisions_pass() -> None:
    for target in TARGETS:
        for precision in target.precisions:
            require_precision(target, precision)


def test_jetpack_versions_are_unique_and_versions_compare_as_numbers() -> None:
    assert len({row.version for row in JETPACKS}) == len(JETPACKS)
    assert version_of("10.14") > version_of("10.3")
    assert version_of("1.7.1.116")[:2] == (1, 7)
    assert version_of("r36") == ()


def test_tensorrts_rise_and_the_newest_is_the_last() -> None:
    versions = [version_of(version) for version in CUDA_OF_TENSORRT]
    assert versions == sorted(set(versions))
    assert next(reversed(CUDA_OF_TENSORRT)) == NEWEST_TENSORRT
    assert set(CUDA_OF_TENSORRT.values()) <= set(PTX_OF_CUDA)


@pytest.mark.parametrize(
    ("name", "first", "last"),
    [("a100", "10.3", "11.4"), ("l4", "10.3", "11.4"), ("b200", "10.8", "11.4"), ("dgx-spark", "10.16", "11.4")],
)
def test_a_datacenter_gpu_takes_every_tensorrt_with_kernels_for_it(name, first, last) -> None:
    choices = tensorrts_of(find_target(name))
    assert (choices[0], choices[-1]) == (first, last)


@pytest.mark.parametrize(
    ("name", "version", "became", "cuda", "opset"),
    [
        ("l4", "10.13", "10.13", "13", 20),
        ("l4", "10.13.3.9", "10.13", "13", 20),
        ("l4", "10.3", "10.3", "12.6", 20),
        ("l4", "10.14", "10.14", "13", 23),
        ("l4", "11.1", "11.1", "13", 23),
        ("jetson-orin", "10.7", "10.7", "12.6", 20),
        ("jetson-orin@7.2", "11.4", "11.4", "13.2", 23),
        ("jetson-thor@7.2", "11.4.1", "11.4", "13.2", 23),
    ],
)
def test_another_tensorrt_on_the_target(name, version, became, cuda, opset) -> None:
    target = with_tensorrt(find_target(name), version)
    assert (target.tensorrt, target.cuda, target.opset) == (became, cuda, opset)
    assert target.ptx == PTX_OF_CUDA[cuda]


@pytest.mark.parametrize(
    ("name", "version", "says"),
    [
        ("l4", "10.2", ["TensorRT 10.2 is not served on L4", "10.3, 10.4"]),
        ("l4", "12.0", ["not served", "11.4"]),
        ("l4", "newest", ["not served"]),
        ("l4", "", ["not served"]),
        ("l4", "10", ["not served"]),
        ("b200", "10.7", ["not served on B200", "10.8, "]),
        ("jetson-orin", "10.13", ["Jetson AGX Orin with JetPack 6.2", "10.3, 10.7"]),
        ("jetson-orin-nano@7.2", "11.4", ["with one of: 10.16."]),
        ("rtx-4090", "10.13", ["TensorRT for RTX 1.7 builds for GeForce RTX 4090", "--builder tensorrt"]),
    ],
)
def test_a_tensorrt_that_is_not_served_there_is_refused_with_those_that_are(name, version, says) -> None:
    with pytest.raises(ResvitError) as caught:
        with_tensorrt(find_target(name), version)
    assert caught.value.code is ExitCode.IMPOSSIBLE
    assert all(words in str(caught.value) for words in says)


@pytest.mark.parametrize("target", GPUS, ids=lambda target: target.name)
def test_either_builder_can_be_chosen_where_it_has_kernels(target: Target) -> None:
    by_tensorrt = with_builder(target, Builder.TENSORRT)
    assert (by_tensorrt.builder, by_tensorrt.tensorrt in tensorrts_of(by_tensorrt)) == (Builder.TENSORRT, True)
    assert with_builder(target, None) is target
    if target.sm in RTX_SMS:
        by_rtx = with_builder(target, Builder.RTX)
        assert (by_rtx.builder, by_rtx.tensorrt, by_rtx.kind) == (Builder.RTX, "1.7", target.kind)
        assert bool(rtx_in_place(by_rtx, Precision.INT8)) is (target.kind is not Kind.RTX)
        assert not rtx_in_place(by_rtx, Precision.FP16)
        return
    with pytest.raises(ResvitError, match=f"TensorRT for RTX builds no engine for {target.title}") as caught:
        with_builder(target, Builder.RTX)
    assert caught.value.code is ExitCode.IMPOSSIBLE
    assert "Leave --builder out" in caught.value.fix


@pytest.mark.parametrize("target", GPUS, ids=lambda target: target.name)
def test_peaks_match_the_precisions(target) -> None:
    for precision in TENSOR_CORES:
        assert (target.peak(precision) is not None) == (precision in target.precisions)
    speed = target.speed
    assert speed.source
    # 8-bit tensor cores run at twice the rate of FP16 on every one of these GPUs (data sheets round).
    assert speed.int8 / speed.fp16 == pytest.approx(2.0, rel=0.02)
    assert speed.fp8 is None or speed.fp8 == speed.int8
    assert 10 < speed.bandwidth < 10_000
    assert speed.kernel_us > 0


def test_a_processor_is_asked_nothing_about_gpus() -> None:
    cpu = find_target("cpu")
    assert cpu.precisions == {Precision.FP32, Precision.INT8}
    assert not any(cpu.peak(precision) for precision in Precision)
    assert (cpu.ptx, cpu.sparsity, cpu.float_precision) == ("", False, Precision.FP32)
    assert cpu.describe == "Processor (x86-64, aarch64) (ONNX Runtime 1.23 or newer; fp32, int8)"
    assert Target.from_json(Record(json.loads(json.dumps(cpu.to_json())), "target")) == cpu


@pytest.mark.parametrize(
    ("ask", "says"),
    [
        (lambda cpu: require_precision(cpu, Precision.FP8), "no fp8 kernels"),
        (lambda cpu: require_precision(cpu, Precision.FP16), "computes in FP32 and INT8"),
        (lambda cpu: require_precision(find_target("l4"), Precision.FP32), "FP32 is for processors"),
        (lambda cpu: with_builder(cpu, Builder.TENSORRT), "TensorRT's are for GPUs"),
        (lambda cpu: with_builder(find_target("l4"), Builder.ONNXRUNTIME), "L4 is a GPU"),
        (lambda cpu: with_tensorrt(cpu, "10.13"), "TensorRT 10.13 has no part in it"),
    ],
)
def test_what_is_not_for_processors_is_refused(ask, says: str) -> None:
    with pytest.raises(ResvitError, match=says) as caught:
        ask(find_target("cpu"))
    assert caught.value.code is ExitCode.IMPOSSIBLE


def test_known_peaks_are_dense() -> None:
    assert find_target("a100").peak(Precision.INT8) == 624
    assert find_target("l4").peak(Precision.FP16) == 121
    assert find_target("h100").speed.bandwidth == 3350


def test_the_table_in_the_docs_is_this_one() -> None:
    text = (Path(__file__).parent.parent / "docs" / "targets.md").read_text()
    rows = text.partition("<!-- table -->")[2].partition("<!-- end -->")[0].split("\n")
    assert [row for row in rows if row][2:] == [documented(target) for target in TARGETS]


def documented(target: Target) -> str:
    """The row of docs/targets.md."""
    where = {Builder.RTX: "here", Builder.TENSORRT: "where that GPU is", Builder.ONNXRUNTIME: "here or there"}
    others = ", ".join(version for version in tensorrts_of(target) if version != target.tensorrt)
    choices = others if target.builder is Builder.TENSORRT and target.jetpack else ""
    if target.builder is Builder.TENSORRT and not choices and not target.jetpack:
        choices = f"{tensorrts_of(target)[0]} to {tensorrts_of(target)[-1]}"
    cells = (
        f"`{target.name}`",
        "" if target.on_cpu else f"{target.sm / 10:.1f}",
        "" if target.on_cpu else f"{target.memory_mib / 1024:g} GiB, {target.speed.bandwidth:g} GB/s",
        target.software,
        choices,
        target.ptx,
        "yes" if Precision.FP8 in target.precisions else "no",
        where[target.builder],
        "yes" if target.builder is Builder.TENSORRT and target.sm in RTX_SMS else "",
    )
    return f"| {' | '.join(cells)} |"
