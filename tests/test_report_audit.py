"""The report's section on what fused."""

from __future__ import annotations

import dataclasses

from engine_reports import engine_report
from resvit_calibrate.gate.gate import Verdict, VerdictKind
from resvit_engines.audit.audit import audit_engine
from resvit_engines.audit.expectation import Attention, Consumer, Expectation, QdqPair
from resvit_engines.audit.findings import Subject
from resvit_engines.audit.kernels import Kernel
from resvit_engines.audit.record import AuditRecord, SkippedAudit, audit_from_json, record_of
from resvit_engines.bench.bench import BenchReport
from resvit_engines.bench.clocks import Conditions
from resvit_engines.machine import Machine
from resvit_engines.remote.job_result import Answers, DeviceBundle, JobResult, Skipped
from resvit_engines.run.golden import GoldenReport
from resvit_export.records.device import DeviceResult
from resvit_export.report.layout.data import ReportData
from resvit_export.report.page import html_from_run
from resvit_export.report.sections.audit import fusion_from_audit
from resvit_export.report.sections.device import facts_from_device

CONV = Kernel("conv_1", "correlation", ("Int8",), ("Half",), ((1, 64),), ((1, 64),), ("conv", "x/DQ"))
HALF = Kernel("gemm_2", "gemm", ("Half",), ("Half",), ((1, 64),), ((1, 64),), ("a/MatMul",))
PAIRS = (
    QdqPair("x<y>", "x/Q", "x/DQ", "int8", False, (Consumer("conv", "Conv", True),)),
    QdqPair("z", "z/Q", "z/DQ", "int8", False, (Consumer("a/MatMul", "MatMul", True),)),
    QdqPair("w", None, "w/DQ", "int8", True, (Consumer("conv", "Conv", True),)),
)
BLOCK = Attention("a", ("a/MatMul", "a/Softmax", "a/MatMul_1"), 12, 50, 60, "fp16", "constant", False)


def audit(stands_in: str = "", fp16: tuple[Kernel, ...] | None = (HALF,)) -> AuditRecord:
    subject = Subject("rtx-4090", 89, "TensorRT for RTX", "1.7", 1, stands_in)
    return record_of(audit_engine(subject, Expectation(PAIRS, (BLOCK,), ()), (CONV, HALF), (), fp16))


def test_figures_stand_beside_those_of_fp16_and_trouble_comes_first() -> None:
    shown = fusion_from_audit(audit())
    assert shown.engine == "TensorRT for RTX 1.7, SM 8.9"
    assert ("Kernels", "2", "1") in shown.rows
    assert ("Convolutions in 8 bits", "1 of 1", "0 of 0") in shown.rows
    assert shown.pairs == [
        ("z", "the product runs in a higher precision"),
        ("x<y>", "consumed by an 8-bit kernel"),
    ]
    assert shown.attention == [("a", "12", "50, 60", "constant", "1 kernel")]


def test_the_page_has_the_section_and_names_the_stand_in() -> None:
    page = html_from_run(ReportData("x", audit=audit("SM 8.6 stands in for Jetson AGX Orin (SM 8.7).")))
    assert "What fused" in page
    assert "SM 8.6 stands in" in page
    assert "x&lt;y&gt;" in page
    assert "FP16 engine" in page
    assert "FP16 engine</th>" not in html_from_run(ReportData("x", audit=audit(fp16=None)))


def test_an_audit_that_was_skipped_says_why() -> None:
    skipped = audit_from_json(SkippedAudit("jetson-orin", "why").to_json(), "audit.json")
    assert "Not audited: why" in html_from_run(ReportData("x", audit=skipped))
    assert "What fused" not in html_from_run(ReportData("x"))


def test_what_the_device_said_is_laid_out() -> None:
    orin = Machine(87, "Jetson AGX Orin", "10.3.0", "6.2", "aarch64", 1, 1, "3.10", power_mode="MAXN", host="orin")
    quiet = Conditions()
    times = BenchReport("x", "tensorrt", 1, 1, False, 9, {"p50": 1.234, "p99": 2.0}, None, 1.0, None, 1, quiet, quiet)
    job = JobResult(
        engine=engine_report(seconds=61.25, bytes=3 << 20),
        rehearsal=False,
        machine=orin,
        golden=GoldenReport(4, 0.1, 31.06, 1.0, 20.0, "TensorRT"),
        outputs=Answers(1000, "TensorRT 10.3.0"),
        bench=times,
        bundle=DeviceBundle("x.resvit", "0" * 64, "key", "id"),
    )
    verdict = Verdict(VerdictKind.ACCEPTED, "within the limit", 1.0, 0.95, 1000, (0.0, 0.5))
    device = DeviceResult(job, 1000, verdict, "TensorRT 10.3.0")
    rows = dict(facts_from_device(device))
    assert rows["Software"] == "JetPack 6.2, TensorRT 10.3.0"
    assert rows["Power mode, clocks"] == "MAXN, not reported"
    assert rows["Verdict on 1,000 images"] == "within the limit"
    assert rows["Time at batch 1"] == "median 1.23 ms, 99% below 2.00 ms"
    assert rows["Golden outputs"] == "31.1 dB from those that were validated"
    nobody = dataclasses.replace(orin, gpu=None, tensorrt=None, jetpack=None, power_mode=None)
    unknown = dataclasses.replace(job, machine=nobody, golden=Skipped("none"), bench=Skipped("none"))
    bare = DeviceResult(unknown, 1000, None, None)
    rows = dict(facts_from_device(bare))
    assert rows["Device"] == "orin"
    assert not any(term.startswith(("Verdict", "Time", "Golden")) for term in rows)
