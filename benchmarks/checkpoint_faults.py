"""Damage checkpoints of all formats, byte by byte and inside their pickles, and count how reading them ends.

python benchmarks/checkpoint_faults.py [CASES] > benchmarks/results/checkpoint_faults.json

Every case must end as loaded or as one ``ResvitError`` of exit code 3; anything else is listed under ``escaped``.
"""

from __future__ import annotations

import collections
import io
import json
import random
import sys
import tempfile
import time
import zipfile
from pathlib import Path

import torch
from safetensors.torch import save
from torch import nn

from resvit_engines.errors import ExitCode, ResvitError
from resvit_export.loading.checkpoint import load_checkpoint


def network() -> nn.Module:
    """A small network with all kinds of tensors."""
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8, 10))


def originals() -> dict[str, bytes]:
    """One checkpoint of each format."""
    weights = network().state_dict()
    archive, legacy = io.BytesIO(), io.BytesIO()
    torch.save({"state_dict": weights, "epoch": 3}, archive)
    torch.save({"state_dict": weights, "epoch": 3}, legacy, _use_new_zipfile_serialization=False)
    return {"zip": archive.getvalue(), "legacy": legacy.getvalue(), "safetensors": save(weights)}


def damaged(content: bytes, chance: random.Random) -> bytes:
    """The same with some bytes set, cut out, or cut off."""
    data = bytearray(content)
    if chance.random() < 0.2:
        return bytes(data[: chance.randrange(len(data))])
    reach = len(data) if chance.random() < 0.5 else min(len(data), 1500)
    for _ in range(chance.choice((1, 1, 2, 5, 10))):
        place = chance.randrange(min(reach, len(data)))
        if chance.random() < 0.8:
            data[place] = chance.randrange(256)
        else:
            del data[place : place + chance.randrange(6)]
    return bytes(data)


def main() -> None:
    """Print how all cases ended."""
    cases, chance = int(sys.argv[1]) if len(sys.argv) > 1 else 3000, random.Random(0)
    ends: collections.Counter[str] = collections.Counter()
    escaped: list[str] = []
    slowest = 0.0
    whole = originals()
    archive = zipfile.ZipFile(io.BytesIO(whole["zip"]))
    pickled = archive.read("archive/data.pkl")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "w.pt"
        for kind in ("zip", "legacy", "safetensors", "pickle in a whole archive"):
            for _ in range(cases):
                if kind in whole:
                    file.write_bytes(damaged(whole[kind], chance))
                else:
                    inner = damaged(pickled, chance)
                    with zipfile.ZipFile(file, "w") as new:
                        for name in archive.namelist():
                            new.writestr(name, inner if name.endswith("data.pkl") else archive.read(name))
                start = time.monotonic()
                try:
                    load_checkpoint(network(), file)
                    ends[f"{kind}: loaded"] += 1
                except ResvitError as error:
                    ends[f"{kind}: refused"] += 1
                    if error.code is not ExitCode.INPUT:
                        escaped.append(f"{kind}: exit {int(error.code)}: {error.problem}")
                except Exception as error:  # noqa: BLE001 what is counted here
                    escaped.append(f"{kind}: {type(error).__name__}: {error}")
                slowest = max(slowest, time.monotonic() - start)
    print(
        json.dumps({"ends": dict(sorted(ends.items())), "escaped": escaped, "slowest_s": round(slowest, 2)}, indent=2)
    )


if __name__ == "__main__":
    main()
