"""The book as Markdown: every part, the GPU, engines beside what was predicted of them, and the kernels.

Needs the standard library alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from gpu_parts.schedule import DONE


def markdown(machine: Mapping[str, Any], parts: Mapping[str, Mapping[str, Any]], names: Sequence[str]) -> str:
    """Tables of the parts ``names``, in that order; what was not tried yet is a row too."""
    gpu = f"{machine.get('smi') or 'GPU not named'}; compute capability {_capability(machine)}."
    lines = ["# A day with a GPU", "", gpu, "", "| part | | seconds | tries |", "|---|---|---|---|"]
    for name in names:
        known = parts.get(name, {})
        status, reason = known.get("status", "not tried yet"), known.get("reason", "")
        told = f"{status}: {reason}" if reason else status
        lines.append(f"| {name} | {_cell(told)} | {known.get('seconds', 0):g} | {known.get('tries', 0)} |")
    done = {name: parts[name].get("result") for name in names if parts.get(name, {}).get("status") == DONE}
    for name, part in parts.items():
        if remarks := list(_remarks(part)):
            lines += ["", f"{name}: {'; '.join(remarks)}."]
    lines += _tests(done.get("gpu-tests")) + _engines(done) + _kernels(done)
    return "\n".join(lines) + "\n"


def _remarks(part: Mapping[str, Any]) -> Iterator[str]:
    """What speaks against a part's times: other programs on the GPU before it, a clock that was held down."""
    before, after = part.get("before") or {}, part.get("after") or {}
    if others := before.get("others"):
        yield f"{', '.join(others)} used the GPU too"
    if held := after.get("held_down"):
        yield f"the clock was held down by {' and '.join(held)}"


def _tests(result: Mapping[str, Any] | None) -> list[str]:
    if result is None:
        return []
    lines = ["", f"Tests marked gpu: {result['passed']} passed, {result['failed']} failed."]
    lines += [f"- failed: {_cell(failure)}" for failure in result["failures"]]
    return lines + [f"- {count} skipped: {_cell(reason)}" for reason, count in result["skipped"].items()]


def _engines(done: Mapping[str, Any]) -> list[str]:
    """FP16 and quantised medians, what was predicted of each, and how far the two are apart."""
    rows = []
    for name, result in done.items():
        for row in result.get("rows", ()) if isinstance(result, dict) else ():
            if "runners" not in row:
                continue
            float_ms, eight_ms = (_median(runner) for runner in (row["runners"][0], row["runners"][-1]))
            expected = row["predicted"] or {}
            float_said, eight_said = expected.get("fp16_ms"), expected.get("quantised_ms")
            cells = [
                name, row["precision"], str(row["batch"]), f"{float_ms:.3f}", f"{eight_ms:.3f}",
                f"{float_ms / eight_ms:.2f}", _beside(float_said, float_ms), _beside(eight_said, eight_ms),
                f"{float_said / eight_said:.2f}" if float_said and eight_said else "", row["verdict"],
            ]  # fmt: skip
            rows.append(f"| {' | '.join(cells)} |")
    heads = ("part", "precision", "batch", "FP16 ms", "quantised ms", "times as fast", "predicted FP16",
             "predicted quantised", "predicted times as fast", "verdict")  # fmt: skip
    return ["", f"| {' | '.join(heads)} |", "|---" * len(heads) + "|", *rows] if rows else []


def _kernels(done: Mapping[str, Any]) -> list[str]:
    lines = ["", "| kernels | timed | faster than the best other | refused |", "|---|---|---|---|"]
    for name, result in done.items():
        if not name.startswith("kernels-"):
            continue
        rows = result["rows"]
        timed = [row for row in rows if "best_other_us" in row]
        faster = sum(row["ours_us"] < row["best_other_us"] for row in timed)
        reasons = dict.fromkeys(_cell(row["refused"]) for row in rows if "refused" in row)
        lines.append(f"| {name} | {len(timed)} | {faster} | {'; '.join(reasons)} |")
    return lines if len(lines) > 3 else []


def _median(runner: Mapping[str, Any]) -> float:
    return float((runner.get("gpu_ms") or runner["latency_ms"])["p50"])


def _beside(predicted: float | None, measured: float) -> str:
    return "" if predicted is None else f"{predicted:.3f} ({100 * (predicted / measured - 1):+.0f}%)"


def _capability(machine: Mapping[str, Any]) -> str:
    sm = machine.get("sm")
    return "unknown" if sm is None else f"{sm / 10:.1f}"


def _cell(text: str) -> str:
    return " ".join(str(text).split()).replace("|", "\\|")[:400]
