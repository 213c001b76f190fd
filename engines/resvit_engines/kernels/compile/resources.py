"""What a compiled kernel came to: registers, spills, shared memory, tensor-core instructions, widths of its loads.

Instructions are counted in the PTX, so each counts once however often its loop runs. Registers and spills are what
NVIDIA's assembler ``ptxas`` reports; the driver on a device has an assembler of its own version and may differ a
little. Occupancy follows the rules of the CUDA occupancy calculator.
"""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from resvit_engines.errors import ExitCode, ResvitError
from resvit_engines.kernels.compile.ptx import version_of_ptx
from resvit_engines.kernels.launch import LAUNCH_SHARED_BYTES, Kernel
from resvit_engines.kernels.multiprocessors import resident_blocks, warp_slots
from resvit_engines.targets.table import Target

_MMA = re.compile(
    r"\bmma\.sync\.\S*?\.(?:f32|f16|s32)\.(?P<mma>f16|bf16|tf32|s8|e4m3)\."
    r"|\bwgmma\.mma_async\.\S*?\.(?:f32|f16|s32)\.(?P<wgmma>f16|bf16|tf32|s8|e4m3)\."
    r"|\btcgen05\.mma\.\S*?\.kind::(?P<tcgen05>\w+)"
)
_KINDS = {"f8f6f4": "e4m3", "f16": "f16", "i8": "s8", "tf32": "tf32"}
_LOAD = re.compile(r"\bld\.global(?:\.\w+(?:::\w+)*)*?(?:\.v(?P<count>[248]))?\.[bfsu](?P<bits>8|16|32|64)\b")
_COPY = re.compile(
    r"\bcp\.async\.c[ag]\.shared\.global(?:\.\S+)?\s*\[[^\]]*\],\s*\[[^\]]*\],\s*(?P<bytes>0x[\da-f]+|\d+)"
)
_TENSOR_COLUMNS = re.compile(r"\btcgen05\.alloc\.[^;]*,\s*(\d+)\s*;")
_REPORT = {
    "registers": re.compile(r"Used (\d+) registers"),
    "spill_store_bytes": re.compile(r"(\d+) bytes spill stores"),
    "spill_load_bytes": re.compile(r"(\d+) bytes spill loads"),
    "static_shared_bytes": re.compile(r"(\d+) bytes smem"),
}


@dataclass(frozen=True)
class Inspection:
    """One kernel, compiled for one GPU.

    Sizes are in bytes; registers are per thread, spills per thread too. ``mma`` counts tensor-core instructions by
    family and operand type (``mma.sync s8``, ``wgmma f16``, ``tcgen05 e4m3``; the kind f16 of tcgen05 is BF16 too).
    ``loads`` counts reads of global memory by their width in bytes, asynchronous copies among them.
    ``blocks`` is how many thread blocks one multiprocessor holds, ``occupancy`` the share of its warps they come to.
    """

    registers: int
    spill_store_bytes: int
    spill_load_bytes: int
    static_shared_bytes: int
    dynamic_shared_bytes: int
    mma: Mapping[str, int]
    loads: Mapping[int, int]
    blocks: int
    occupancy: float

    @property
    def spill_bytes(self) -> int:
        """Stores and loads together."""
        return self.spill_store_bytes + self.spill_load_bytes


def inspection(kernel: Kernel, ptxas: Path | None = None) -> Inspection:
    """Assemble a kernel and look at it; no GPU is needed.

    Raises:
        ResvitError: MISSING without an assembler, BUILD with its message where it refuses the PTX.
    """
    report = _assembled(kernel, ptxas or find_ptxas())
    found = {name: pattern.search(report) for name, pattern in _REPORT.items()}
    numbers = {name: int(match[1]) if match else 0 for name, match in found.items()}
    columns = [int(number) for number in _TENSOR_COLUMNS.findall(kernel.ptx)]
    blocks = resident_blocks(
        kernel.sm,
        kernel.threads,
        registers=numbers["registers"],
        shared_bytes=numbers["static_shared_bytes"] + kernel.shared_bytes,
        tensor_columns=max(columns, default=0),
    )
    return Inspection(
        **numbers,
        dynamic_shared_bytes=kernel.shared_bytes,
        mma=mma_counts(kernel.ptx),
        loads=load_widths(kernel.ptx),
        blocks=blocks,
        occupancy=blocks * -(-kernel.threads // 32) / warp_slots(kernel.sm),
    )


def mma_counts(ptx: str) -> dict[str, int]:
    """Tensor-core instructions by family and operand type."""
    names = {"mma": "mma.sync", "wgmma": "wgmma", "tcgen05": "tcgen05"}
    counts: Counter[str] = Counter()
    for match in _MMA.finditer(ptx):
        kind = match.lastgroup or ""
        counts[f"{names[kind]} {_KINDS.get(match[kind], match[kind])}"] += 1
    return dict(counts)


def load_widths(ptx: str) -> dict[int, int]:
    """Reads of global memory by their width in bytes."""
    counts = Counter(int(match["count"] or 1) * int(match["bits"]) // 8 for match in _LOAD.finditer(ptx))
    counts.update(int(match["bytes"], 0) for match in _COPY.finditer(ptx))
    return dict(sorted(counts.items()))


def find_ptxas() -> Path:
    """The newest assembler at hand: of the two that come with Triton the one that knows every GPU, else the system's.

    Raises:
        ResvitError: MISSING where there is none.
    """
    triton = importlib.util.find_spec("triton")
    folders = [Path(folder) for folder in (triton.submodule_search_locations or [])] if triton else []
    bundled = [folder / "backends" / "nvidia" / "bin" / "ptxas-blackwell" for folder in folders]
    system = shutil.which("ptxas")
    for path in [*bundled, *([Path(system)] if system else [])]:
        if path.is_file():
            return path
    raise ResvitError(
        "Compiled kernels cannot be inspected: NVIDIA's assembler ptxas is not here.",
        "pip install 'triton>=3.7,<3.8', which brings it, or install the CUDA toolkit.",
        ExitCode.MISSING,
    )


def require_fits(kernel: Kernel, target: Target) -> None:
    """Refuse a kernel that ``target`` could not load or launch.

    Raises:
        ResvitError: IMPOSSIBLE where it is for another GPU, its PTX is newer than the driver reads, or it needs more
            dynamic shared memory than a launch is given.
    """
    if kernel.sm != target.sm:
        reason = f"it is for SM {kernel.sm / 10:.1f} and {target.title} is SM {target.sm / 10:.1f}"
    elif version_of_ptx(kernel.ptx_version) > version_of_ptx(target.ptx):
        reason = f"its PTX is version {kernel.ptx_version} and the driver on {target.title} reads up to {target.ptx}"
    elif kernel.shared_bytes > LAUNCH_SHARED_BYTES:
        reason = f"it needs {kernel.shared_bytes} bytes of shared memory and a launch gets {LAUNCH_SHARED_BYTES}"
    else:
        return
    raise ResvitError(
        f"The kernel {kernel.entry} does not run there: {reason}.",
        "Build without plugins (--plugins off); with --plugins auto the plain graph is used here.",
        ExitCode.IMPOSSIBLE,
    )


def _assembled(kernel: Kernel, ptxas: Path) -> str:
    target = re.search(r"^\.target\s+(\w+)", kernel.ptx, re.MULTILINE)
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "kernel.ptx")
        source.write_text(kernel.ptx, encoding="utf-8")
        command = [str(ptxas), "-v", f"-arch={target[1] if target else f'sm_{kernel.sm}'}", str(source)]
        done = subprocess.run(
            [*command, "-o", str(source.with_suffix(".cubin"))], capture_output=True, text=True, check=False
        )
    said = done.stderr + done.stdout
    if done.returncode:
        lines = [line.replace(str(source), "line") for line in said.splitlines() if "error" in line or "fatal" in line]
        raise ResvitError(
            f"NVIDIA's assembler refuses the kernel {kernel.entry}: {(lines or [f'status {done.returncode}'])[0]}.",
            "Use the ptxas of a newer CUDA, or report this with the model's name.",
            ExitCode.BUILD,
        )
    return said
