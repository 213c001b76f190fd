"""What the machine is and how its GPU stands, or which modules it lacks: one JSON document.

python -m gpu_parts.look [--out result.json]
python -m gpu_parts.look torch triton
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from pathlib import Path

from resvit_engines.bench.beside import usage_now
from resvit_engines.bench.clocks import conditions_now
from resvit_engines.gpu import local_sm
from resvit_engines.machine import printed, this_machine

_DRIVER = ("nvidia-smi", "--id=0", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader")


def machine() -> dict[str, object]:
    """The GPU with its driver, versions, clocks, what holds them down and who else uses it; ``sm`` is None without."""
    sm = local_sm()
    found: dict[str, object] = {"sm": sm}
    if sm is not None:
        usage, conditions = usage_now(on_gpu=True), conditions_now(on_gpu=True)
        found |= {"smi": printed(_DRIVER).strip(), "others": list(usage.others), "held_down": list(usage.held_down)}
        found |= {"conditions": conditions.to_json(), "machine": this_machine().to_json()}
    return found


def absent(modules: list[str]) -> list[str]:
    """Those that cannot be found; nothing is imported but what holds a sub-module."""

    def there(name: str) -> bool:
        try:
            return importlib.util.find_spec(name) is not None
        except ImportError:
            return False

    return [name for name in modules if not there(name)]


def main() -> None:
    """Print the document, or write it."""
    parser = argparse.ArgumentParser()
    parser.add_argument("modules", nargs="*")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    text = json.dumps(absent(given.modules) if given.modules else machine()) + "\n"
    if given.out is None:
        sys.stdout.write(text)
    else:
        given.out.write_text(text)


if __name__ == "__main__":
    main()
