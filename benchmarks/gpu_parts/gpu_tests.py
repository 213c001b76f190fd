"""The tests that need a GPU: how many passed, which failed, and why others were skipped.

python -m gpu_parts.gpu_tests --out result.json
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

TESTS = ("tests/test_kernel_gpu.py", "tests/test_run_engine.py")
_SHOWN = 40


def counted(junit: Path) -> dict[str, Any]:
    """What pytest's file of results says: passed tests by number, failed ones by name, skipped ones by reason."""
    failed, skipped, passed = [], {}, 0
    for case in ET.parse(junit).iter("testcase"):
        kind = next((child for child in case if child.tag in ("failure", "error", "skipped")), None)
        if kind is None:
            passed += 1
        elif kind.tag == "skipped":
            reason = str(kind.get("message"))[:200]
            skipped[reason] = skipped.get(reason, 0) + 1
        else:
            failed.append(f"{case.get('name')}: {str(kind.get('message'))[:300]}")
    return {"passed": passed, "failed": len(failed), "failures": failed[:_SHOWN], "skipped": skipped}


def main() -> None:
    """Run them and write the counts; the exit code is pytest's where they could not be run."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("tests", nargs="*", default=TESTS)
    given = parser.parse_args()
    junit = given.out.with_suffix(".xml")
    command = [sys.executable, "-m", "pytest", "-q", "-o", "addopts=", "-p", "no:cacheprovider", "-m", "gpu"]
    code = subprocess.run([*command, f"--junitxml={junit}", *given.tests], check=False).returncode
    if code not in (0, 1):
        raise SystemExit(code)
    given.out.write_text(json.dumps(counted(junit)))


if __name__ == "__main__":
    main()
