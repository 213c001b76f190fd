"""The parts of a day with a GPU, in the order in which they are done: what tells most in the least time first."""

from __future__ import annotations

from gpu_parts.schedule import Part

NETWORKS = ("resvit:embed-nano", "timm:vit_small_r26_s32_224", "timm:vit_base_r50_s16_224")
"""Trained on Fashion-MNIST; and with random weights, which are there for their latency alone."""
_DATA = ("data/fashion-mnist",)
_TRTEXEC = ("trtexec", "/usr/src/tensorrt/bin/trtexec")
_HOST = ("click", "cryptography", "jinja2", "numpy", "onnx", "onnx_ir", "onnxruntime", "rich", "scipy", "timm", "torch")
"""What building takes on any machine."""
_RTX, _TENSORRT = ("tensorrt_rtx_bindings", "cuda.bindings"), ("tensorrt", "cuda.bindings")


def kernels(kind: str, dtype: str, batch: int | None, seconds: float) -> Part:
    """The PTX of one kind of kernel in one type, timed, and kept in ``measured.json``."""
    name = f"kernels-{kind}-{dtype}" + (f"-b{batch}" if batch else "")
    command = ("{python}", "benchmarks/kernels.py", "--kind", kind, "--dtype", dtype, "--record", "--out", "{folder}")
    command += ("--batch", str(batch)) if batch else ()
    return Part(name, command, seconds, ("click", "numpy", "torch", "triton"), result="kernels-sm*.json")


def engines(kind: str, network: str, seconds: float, *options: str) -> Part:
    """Engines of one network, built and timed by ``kind``: rtx, tensorrt or trtexec."""
    command = ("{python}", "-m", "gpu_parts.engines", "--network", network, "--work", "{work}", "--out", "{result}")
    name = "-".join(["tuned"] * ("--tune" in options) + [kind, network.rpartition(":")[2]])
    if kind == "trtexec":
        return Part(name, (*command, "--trtexec", "{program}"), seconds, _HOST, _TRTEXEC, _DATA)
    modules = _RTX if kind == "rtx" else _TENSORRT
    return Part(name, (*command, "--builder", kind, *options), seconds, (*modules, *_HOST), files=_DATA)


PARTS: tuple[Part, ...] = (
    Part("machine", ("{python}", "-m", "gpu_parts.look", "--out", "{result}"), 10),
    Part(
        "gpu-tests", ("{python}", "-m", "gpu_parts.gpu_tests", "--out", "{result}"), 240,
        ("click", "hypothesis", "numpy", "onnx", "pytest", "triton"),
    ),
    Part(
        "rtx-here", ("{python}", "-m", "gpu_parts.rtx_here", "--out", "{result}"), 60,
        ("numpy", "onnx", "tensorrt_rtx_bindings"),
    ),
    *(engines(kind, network, 200) for network in NETWORKS for kind in ("tensorrt", "rtx")),
    *(
        kernels("attention", dtype, batch, 200)
        for batch in (1, 8, 32)
        for dtype in ("int8", "fp16", "fp8")
    ),
    *(kernels(kind, dtype, None, 200) for kind in ("bridge", "deformable") for dtype in ("int8", "fp16", "fp8")),
    *(
        engines(kind, network, 300, "--tune", "--precision", "int8", "--batch", "1")
        for network in NETWORKS[:2]
        for kind in ("tensorrt", "rtx")
    ),
    *(engines("trtexec", network, 200) for network in NETWORKS),
)  # fmt: skip
