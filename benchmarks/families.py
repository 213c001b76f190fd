"""Every vision architecture of transformers and timm's by family, with random weights, through every stage to a bundle.

    python benchmarks/families.py --out benchmarks/results/families.md
    python benchmarks/families.py --until export --only rt_detr
    python benchmarks/families.py --until prune --only levit

Weights cannot be had everywhere, architectures can. Those of transformers are built small (``family_models.py``),
timm's as they are (three at 224 or 256 pixels instead of 546 and 768). Images are Fashion-MNIST, and outputs are
compared as they are (task ``other``): a network of random weights has no accuracy. Engines are TensorRT for RTX's for
an RTX 4090, built without a GPU. "Own noise" is the ratio of signal to noise of the float network's outputs where
noise of 40 dB lies on its images: where that is low already, a low SQNR is the network's own. Where the SQNR is under
20 dB, "least noise" is what the float network keeps under the least noise that 8 bits cost, at the same places
(``sensitivity/own_noise.py``), and who is to blame: the network, or us. "As far as" is the last stage that was run:
rows of ``--until export`` are folded, exported and compared with PyTorch, and no more. "Pruned" (``--until prune``)
is the share of the products that is left to a network that is pruned to half, or as far as it can be, and folded:
small configurations are near their least widths. What answers to prompts, text or films is no function of one image:
refused by name, it is counted apart, and the part of it that sees has its own row. Each model runs in a process of
its own, within ``--memory`` and ``--seconds``. Every row is added to ``--records`` as it is done, and what stands
there is not done again: a run can be ended at any time, and continued on another machine, whose seconds are others.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import resource
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
from family_models import HEADLESS, MAPPINGS, OTHER_INPUTS, SMALL, TIMM, TOWERS, write_folder
from machine import describe_machine

ROOT = Path(__file__).parent.parent
RECORDS = ROOT / "benchmarks" / "results" / "families.jsonl"
FIRST = ("rt_detr_v2", "d_fine", "dinov3_vit", "conditional_detr", "zoedepth", "mask2former", "maskformer", "lw_detr",
         "rf_detr", "vitmatte", "efficientloftr", "deformable_detr", "rt_detr", "dpt", "depth_anything")  # fmt: skip
"""What is deployed most, or was refused: these come first."""
TARGET = "rtx-4090"
STAGES = ("fold", "export", "calibrate", "quantize", "validate", "compile", "audit", "bundle")
GOES_ON = (0, 4, 5)
"""Exit codes of a build that came to its end: done, rejected by validation, undecided."""
TIMED_OUT, KILLED = -1, -2
NO_FUNCTION = "no function of one image"
_SAID_SO = (
    "an engine here is a function of images alone",
    "that is no network from an image to tensors of fixed shape",
    "reads patches of photos of any aspect ratio",
)
"""What the refusals say that a class is not at fault for, nor the tool: it asks for more than one image."""
UNTIL = ("bundle", "export")
"""What the table takes a row from: the run that went further, where it was done."""
_NOISE_DB = 40.0
_BLAME = {True: "the network", False: "us"}
_ONCE = ("torch._dynamo", "torchvision", "torch.onnx._internal.exporter._core", "onnxscript", "onnxruntime")
"""Imported before the fork: half of the time that a small model's export takes, else."""


@dataclass(frozen=True)
class Case:
    """One architecture: in which list it stands, how it is named on the command line, and the side of its images."""

    name: str
    listed: str
    kind: str
    model: str | None = None
    side: int | None = None


def cases() -> list[Case]:
    """All of them, those of ``FIRST`` first."""
    found = [*transformers_cases(), *timm_cases()]
    return sorted(found, key=lambda case: FIRST.index(case.kind) if case.kind in FIRST else len(FIRST))


def transformers_cases() -> Iterator[Case]:
    """What transformers' own lists name; of those without a head, what has none in another list."""
    from resvit_export.loading.libraries import import_transformers

    import_transformers()
    from transformers.models.auto import modeling_auto

    seen: set[str] = set()
    classes: set[str] = set()
    for listed in MAPPINGS:
        kinds: set[str] = set()
        mapping = dict(getattr(modeling_auto, f"MODEL_FOR_{listed}_MAPPING_NAMES"))
        for kind, named in mapping.items():
            if listed in (*HEADLESS, *OTHER_INPUTS) and kind in seen:
                continue
            for architecture in named if isinstance(named, (tuple, list)) else (named,):
                if architecture not in classes:
                    yield Case(architecture, listed.lower().replace("_", " "), kind)
                    classes.add(architecture)
                    kinds.add(kind)
        seen |= kinds
    for kind, architecture in TOWERS:
        yield Case(architecture, "the part that sees", kind)


def timm_cases() -> Iterator[Case]:
    """timm's, by family."""
    for name, *side in TIMM:
        yield Case(f"timm:{name}", "timm", name, f"timm:{name}", int(side[0]) if side else None)


@click.command(help=(__doc__ or "").split("\n\n", maxsplit=1)[0])
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), help="Markdown. [standard output]")
@click.option("--records", type=click.Path(path_type=Path, dir_okay=False), default=RECORDS, help="Rows, as JSON.")
@click.option("--runs", type=click.Path(path_type=Path, file_okay=False), default=Path("runs/families"))
@click.option("--only", multiple=True, help="Part of a model's name; repeat it.")
@click.option("--until", type=click.Choice(["export", "bundle", "prune"]), default="bundle", show_default=True)
@click.option("--again", type=int, multiple=True, help="Do those again that ended with this exit code; repeat it.")
@click.option("--share", default="1/1", help="Part of the models, such as 2/2: several runs go side by side.")
@click.option("--seconds", default=900, show_default=True, help="Of one model; then it is ended.")
@click.option("--memory", default=8.0, show_default=True, help="GiB of one model.")
@click.option("--table-only", is_flag=True, help="Run nothing.")
def main(
    *, out: Path | None, records: Path, runs: Path, only: tuple[str, ...], until: str, again: tuple[int, ...],
    share: str, seconds: int, memory: float, table_only: bool,
) -> None:  # fmt: skip
    """Take every model through, one after the other, and write the table."""
    chosen = [case for case in cases() if not only or any(part.lower() in case.name.lower() for part in only)]
    part, parts = (int(number) for number in share.split("/"))
    if not table_only:
        import resvit_export.to_onnx.export  # noqa: F401  what every model's process needs is imported once, before the fork
        from resvit_export.loading.libraries import import_transformers

        import_transformers()  # before torchvision, which may refuse to be imported by itself
        for name in _ONCE:
            importlib.import_module(name)
    done = recorded_rows(records)
    for number, case in enumerate(chosen):
        known = done.get((until, case.name))
        if not table_only and number % parts == part - 1 and (known is None or known["code"] in again):
            folder = runs / until / re.sub(r"[^A-Za-z0-9._]+", "-", case.name)
            row = row_of(case, folder, until, seconds, memory)
            with records.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"until": until, **row}) + "\n")
            click.echo(f"{case.name}: {outcome(row)} ({row['seconds']:.0f} s)", err=True)
    done = recorded_rows(records)  # with those of a run beside this one
    text = table([row for case in chosen if (row := furthest(done, case))], len(chosen))
    if out:
        out.write_text(text, encoding="utf-8")
    else:
        click.echo(text)


def recorded_rows(records: Path) -> dict[tuple[str, str], dict[str, Any]]:
    """The last row of each run and network in ``records``."""
    lines = records.read_text(encoding="utf-8").splitlines() if records.exists() else []
    rows = [json.loads(line) for line in lines]
    return {(row["until"], row["name"]): row for row in rows}


def furthest(rows: Mapping[tuple[str, str], dict[str, Any]], case: Case) -> dict[str, Any] | None:
    """The row of ``case`` from the run that went furthest, with what pruning it came to; none where it was not run."""
    row = next((rows[until, case.name] for until in UNTIL if (until, case.name) in rows), None)
    pruned = rows.get(("prune", case.name))
    return {**row, "pruned": pruned_cell(pruned) if pruned else None} if row else None


def pruned_cell(row: Mapping[str, Any]) -> str:
    """What of the products remains, where it went through; else what became of it."""
    remains = row.get("remains")
    return f"{remains:.1%}" if row["code"] in GOES_ON and remains else outcome(row)


def row_of(case: Case, folder: Path, until: str, seconds: float, memory: float) -> dict[str, Any]:
    """Run one model in a process of its own, and read what it left behind."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    began = time.monotonic()
    code, peak = in_own_process(lambda: take_through(case, folder, until), folder / "log", seconds, memory)
    log = (folder / "log").read_text(encoding="utf-8", errors="replace")
    said = re.findall(r"^error: (.*(?:\n    .*)*)\n  → (.*(?:\n    .*)*)$", log, re.MULTILINE)
    row: dict[str, Any] = {
        "name": case.name,
        "kind": case.kind,
        "listed": case.listed,
        "code": code,
        "seconds": time.monotonic() - began,
        "peak_mib": peak,
        **recorded(folder / "run"),
    }
    if said:
        row["problem"], row["fix"] = (
            " ".join(text.split()).replace(str((folder / "model").resolve()), "the folder") for text in said[-1]
        )
    elif code not in GOES_ON:
        row["problem"], row["fix"] = " ".join(log.split())[-300:], ""
    shutil.rmtree(folder / "run", ignore_errors=True)
    return row


def take_through(case: Case, folder: Path, until: str) -> int:
    """Build the model as the command line does; returns the exit code."""
    from resvit_export.cli.main import run

    small = SMALL.get(case.kind)
    channels, sizes = 3, (case.side, case.side) if case.side else None
    reference = case.model
    if reference is None:
        reference = f"hf:{write_folder(case.kind, case.name, folder / 'model')}"
        channels = small.channels if small is not None else 3
        sizes = small.size if small is not None else None
    options: list[str] = []
    if sizes is not None:
        options += ["--input-shape", f"{channels},{sizes[0]},{sizes[1]}"]
    common = ["--model", reference, "--run", str(folder / "run"), "--quiet", *options]
    if until == "export":
        return run(["export", *common, "--target", TARGET])
    if until == "prune":
        return pruned_to_half(["fold", *common], folder)
    data = "fashion-mnist" if channels in (1, 3) else f"{Path(__file__).parent / 'family_models.py'}:four_channels"
    few = ["--calibration-images", "8", "--validation-images", "8", "--no-search", "--allow-rejected"]
    code = run(["build", *common, "--target", TARGET, "--precision", "int8", "--data", data, "--task", "other", *few])
    for model in sorted((folder / "run").glob("export-*/model.onnx"))[:1]:
        (folder / "run" / "own_noise.json").write_text(json.dumps({"own_noise_db": own_noise(model)}))
    return code


def pruned_to_half(fold: list[str], folder: Path) -> int:
    """Fold the network with half of its products, or with the least that is said to be possible; the exit code."""
    from resvit_export.cli.main import run

    share = "0.5"
    code = run([*fold, "--prune-macs", share])
    sys.stderr.flush()
    nearest = re.findall(r"Let (0\.\d+) or more remain", (folder / "log").read_text(errors="replace"))
    if code not in GOES_ON and nearest:
        share = nearest[-1]
        code = run([*fold, "--prune-macs", share])
    (folder / "run" / "pruned.json").write_text(json.dumps({"remains": float(share)}))
    return code


def own_noise(model: Path) -> float:
    """SNR in dB of the float network's outputs where noise of 40 dB lies on its images."""
    import numpy as np

    from resvit_calibrate.runtime.sessions import open_session, session_options

    session = open_session(model, session_options())
    random = np.random.default_rng(0)
    image = session.get_inputs()[0]
    batch = image.shape[0] if isinstance(image.shape[0], int) else 2
    clean = random.standard_normal((batch, *image.shape[1:]), dtype=np.float32)
    noisy = clean + random.standard_normal(clean.shape, dtype=np.float32) * 10 ** (-_NOISE_DB / 20)
    pairs = zip(session.run(None, {image.name: clean}), session.run(None, {image.name: noisy}), strict=True)
    ratios = []
    for before, after in pairs:
        signal_power = float(np.mean(np.square(before.astype(np.float64))))
        noise_power = float(np.mean(np.square(before.astype(np.float64) - after)))
        ratios.append(10 * np.log10(max(signal_power, 1e-30) / max(noise_power, 1e-30)))
    return float(min(ratios))


def in_own_process(work: Any, log: Path, seconds: float, memory: float) -> tuple[int, float]:
    """Fork, run ``work`` there with its output in ``log``; returns its exit code and its peak of memory in MiB.

    ``memory`` in GiB is what it may take itself: what this process has reserved by then is not counted.
    """
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.setsid()
            descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(descriptor, 1)
            os.dup2(descriptor, 2)
            sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
            inherited = re.search(r"^VmData:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
            reserved = 1024 * int(inherited.group(1)) if inherited else 0
            resource.setrlimit(resource.RLIMIT_DATA, (int(memory * 2**30) + reserved,) * 2)
            code = int(work())
        except BaseException:  # noqa: BLE001 the log says what it was
            import traceback

            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    ends = time.monotonic() + seconds
    while True:
        done, status, usage = os.wait4(child, os.WNOHANG)
        if done:
            code = os.waitstatus_to_exitcode(status)
            return (code if code >= 0 else KILLED), usage.ru_maxrss / 1024
        if time.monotonic() > ends:
            os.killpg(child, signal.SIGKILL)
            _, _, usage = os.wait4(child, 0)
            return TIMED_OUT, usage.ru_maxrss / 1024
        time.sleep(0.05)


def recorded(run: Path) -> dict[str, Any]:
    """How far the build came, and the figures of the table."""
    stages = {json.loads(path.read_bytes())["stage"] for path in run.glob("*/record.json")}
    row: dict[str, Any] = {"stages": [stage for stage in STAGES if stage in stages]}
    for pattern, take in (
        ("export-*/export.json", lambda d: {"parameters": d["parameters"], "parity": d["parity_max_rel"]}),
        ("quantize-*/quantize.json", lambda d: {"share": d["macs_share"]}),
        ("validate-*/verdict.json", lambda d: {"sqnr_db": d["stages"][-1]["sqnr_db"], **blamed(d["blame"])}),
        ("own_noise.json", dict),
        ("pruned.json", dict),
    ):
        for path in sorted(run.glob(pattern))[:1]:
            row |= take(json.loads(path.read_bytes()))
    row["bundles"] = len(list(run.glob("bundle-*/*.resvit")))
    return row


def blamed(blame: Mapping[str, Any] | None) -> dict[str, Any]:
    """What the verdict says of an SQNR under 20 dB: what the least noise of 8 bits leaves, and who is to blame."""
    from resvit_quantize.sensitivity.own_noise import OwnNoise

    if blame is None:
        return {}
    found = OwnNoise.from_json(blame)
    return {"under_noise_db": found.under_noise_db, "sensitive": found.network_is_sensitive}


def outcome(row: Mapping[str, Any]) -> str:
    """One word or two: what became of it."""
    if row["code"] in GOES_ON:
        return "goes through"
    if row["code"] == TIMED_OUT:
        return "out of time"
    if row["code"] in (1, KILLED):
        return "FAILS"
    return NO_FUNCTION if any(said in row.get("problem", "") for said in _SAID_SO) else "refused"


def table(rows: list[dict[str, Any]], architectures: int) -> str:
    """The rows as Markdown, totals first; ``architectures`` is how many there are, run or not."""
    machine = describe_machine()
    lines = ["# Families of networks, through every stage", "", " ".join((__doc__ or "").split("\n\n")[2].split()), ""]
    lines += [
        f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_gib']} GiB, Python {machine['python']}; "
        + ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
        + ".",
        "",
        f"- {len(rows)} of {architectures} architectures were run",
    ]
    others = [name.lower().replace("_", " ") for name in OTHER_INPUTS]
    for title, group in (
        ("transformers, images", [r for r in rows if r["listed"] not in ("timm", *others)]),
        ("timm", [r for r in rows if r["listed"] == "timm"]),
        ("transformers, prompts, text or films", [r for r in rows if r["listed"] in others]),
    ):
        counts = Counter(outcome(row) for row in group)
        apart = counts.pop(NO_FUNCTION, 0)
        through = counts.pop("goes through", 0)
        rest = "".join(f", {count} {what}" for what, count in sorted(counts.items()))
        rest += f"; {apart} more are {NO_FUNCTION}, and say so" if apart else ""
        bundles = sum(1 for row in group if row.get("bundles"))
        counted = f"{through} of {len(group) - apart} go through, {bundles} of them to a bundle"
        lines += [f"- {title}: {counted}{rest}"] if len(group) > apart else []
        lines += [f"- {title}: all {apart} are {NO_FUNCTION}, and say so"] if apart and len(group) == apart else []
    heads = ("network", "of", "outcome", "as far as", "weights", "SQNR", "least noise", "own noise",
             "products in 8 bits", "pruned", "s", "why")  # fmt: skip
    lines += ["", f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for row in rows:
        why = f"{row['problem']} {row['fix']}".strip() if "problem" in row and row["code"] not in GOES_ON else ""
        cells = [
            f"{row['name']} ({row['kind']})" if row["listed"] != "timm" else row["name"],
            row["listed"],
            outcome(row),
            (row.get("stages") or ["—"])[-1],
            f"{row['parameters'] / 1e6:.1f} M" if "parameters" in row else "—",
            f"{row['sqnr_db']:.1f} dB" if isinstance(row.get("sqnr_db"), float) else "—",
            f"{row['under_noise_db']:.1f} dB: {_BLAME[row['sensitive']]}" if "under_noise_db" in row else "—",
            f"{row['own_noise_db']:.0f} dB" if "own_noise_db" in row else "—",
            f"{row['share']:.1%}" if isinstance(row.get("share"), float) else "—",
            row.get("pruned") or "—",
            f"{row['seconds']:.0f}",
            why.replace("|", "\\|"),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
