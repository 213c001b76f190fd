"""A bundle, or what is installed under a name, checked and opened for running."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path

from resvit_engines.bundle.bundle import extract_trusted
from resvit_engines.bundle.manifest import Manifest
from resvit_engines.errors import ResvitError
from resvit_engines.install.install import installed_version
from resvit_engines.keys.public import TrustStore
from resvit_engines.names import is_name
from resvit_engines.outside import leads_to_file
from resvit_engines.run.runner import Runner, open_runner

BUNDLE_SUFFIX = ".resvit"


@contextlib.contextmanager
def opened(what: str, root: Path, trust: TrustStore, runtime: str = "auto") -> Iterator[tuple[Runner, Path, Manifest]]:
    """The runner, unpacked folder and manifest of a bundle's path, or of the current version of an installed name.

    The signature is checked first, then every file. A bundle is unpacked into a temporary folder.

    Raises:
        ResvitError: INPUT for what is neither; UNTRUSTED as ``extract_trusted`` and ``installed_version``; what
            ``open_runner`` raises.
    """
    with contextlib.ExitStack() as owned:
        if what.endswith(BUNDLE_SUFFIX) or leads_to_file(Path(what)):
            scratch = owned.enter_context(tempfile.TemporaryDirectory(prefix="resvit-run-"))
            folder = Path(scratch) / "bundle"
            manifest = extract_trusted(Path(what), folder, trust)
        elif not is_name(what):
            pull = " Pull it first: resvit-engine pull, with --install or --out." if what.startswith("oci://") else ""
            raise ResvitError(
                f"{what!r:.200} is neither a {BUNDLE_SUFFIX} file nor an installed name.",
                f"Give one of both; resvit-engine status lists what is installed.{pull}",
            )
        else:
            installed = installed_version(root, what, trust)
            folder, manifest = installed.folder, installed.manifest
        yield owned.enter_context(open_runner(folder, manifest, runtime)), folder, manifest
