"""From a bundle, or an installed name, to a model that a program calls."""

from __future__ import annotations

import contextlib
import numbers
import os
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from resvit_engines.errors import ResvitError
from resvit_engines.program.frames import ORDERS, Order
from resvit_engines.program.model import MOST_AT_ONCE, Model, Opened
from resvit_engines.program.reading import reading_of

if TYPE_CHECKING:
    from resvit_engines.bundle.manifest import Manifest
    from resvit_engines.pictures.sizes import Size

_MOST_STREAMS = 64


def load(
    what: str | os.PathLike[str],
    *,
    order: Order = "rgb",
    size: Sequence[int] | None = None,
    least_score: float | None = None,
    check: bool = True,
    runtime: str = "auto",
    streams: int = 2,
    cuda_graph: bool = True,
    trust: str | os.PathLike[str] | None = None,
    root: str | os.PathLike[str] | None = None,
) -> Model:
    """Open a bundle (``….resvit``), or what is installed under a name, for frames of a camera.

    The signature is checked, then every file, as ``resvit-engine`` does; an engine is loaded only if it is the one that
    was signed. ``order`` is that of the frames' channels: ``"bgr"`` for those of OpenCV. ``size`` (height, width) is
    the input of a bundle that takes several, without it the usual one. ``least_score`` is of the boxes that are given,
    without it the score from which validation counted boxes as shown. ``check`` runs the golden images and compares
    with what was validated, which takes as long as a few frames. ``runtime`` is as of ``resvit-engine run``.
    ``streams`` is how many batches run at once; each takes memory on the GPU, and a CUDA graph unless ``cuda_graph`` is
    off. ``trust`` is a public key or a folder of them, ``root`` where bundles are installed; without them the usual
    places.

    Raises:
        ResvitError: UNTRUSTED for a signature that does not hold or is by a key that is not trusted; INPUT where there
            is no such bundle, it does not say how pictures are prepared or has no golden images; MISMATCH where the
            golden check fails; IMPOSSIBLE and MISSING where the runtime that was asked for cannot run here.
    """
    from resvit_engines.install.state import default_root
    from resvit_engines.keys.public import load_trust
    from resvit_engines.run.golden import golden_check_of
    from resvit_engines.run.opened import opened
    from resvit_engines.run.prepared import preprocess_at, preprocess_from

    _require_settings(order, streams, least_score)
    named = _path(what, "what to load")
    wanted = None if size is None else _size(size)
    with contextlib.ExitStack() as owned:
        trusted = load_trust(Path(_path(trust, "trust=")) if trust is not None else None)
        place = Path(_path(root, "root=")) if root is not None else default_root()
        runner, folder, manifest = owned.enter_context(opened(named, place, trusted, runtime))
        preprocess = preprocess_from(preprocess_at(manifest, wanted, "size="))
        reading = reading_of(manifest)
        golden = None
        if check:
            _require_golden(folder, manifest)
            golden = golden_check_of(runner, folder, manifest).sentence
        if manifest.engine is not None and runner.why and runtime == "auto":
            warnings.warn(f"{named} runs on the CPU: {runner.why}", RuntimeWarning, stacklevel=2)
        fewest, most = runner.batch
        batch = (fewest, max(fewest, min(most, MOST_AT_ONCE)))
        lanes = [owned.enter_context(runner.lane(batch[1], cuda_graph=cuda_graph)) for _ in range(streams)]
        opening = Opened(runner, manifest, preprocess, reading, golden, batch, tuple(lanes), owned.pop_all())
        return Model(opening, order, least_score)


def _path(given: object, what: str) -> str:
    """The text of a path or name; ``what`` says of which."""
    text = os.fspath(given) if isinstance(given, (str, os.PathLike)) else None
    if not isinstance(text, str):
        raise ResvitError(f"{given!r:.100} is no path, as {what}.", "Give a text or a pathlib.Path.")
    return text


def _size(given: object) -> Size:
    """(height, width) out of any sequence of two whole numbers."""
    sides = list(given) if isinstance(given, Iterable) and not isinstance(given, (str, bytes)) else []
    whole = [int(side) for side in sides if isinstance(side, numbers.Integral) and not isinstance(side, bool)]
    if len(whole) != 2 or len(sides) != 2 or min(whole) < 1:
        raise ResvitError(f"size={given!r:.100} is no size.", "Give height and width in pixels: size=(480, 640).")
    return whole[0], whole[1]


def _require_settings(order: object, streams: object, least_score: object) -> None:
    if not isinstance(order, str) or order not in ORDERS:
        raise ResvitError(f"There is no order of channels {order!r}.", f"Use one of {', '.join(ORDERS)}.")
    if type(streams) is not int or not 1 <= streams <= _MOST_STREAMS:
        raise ResvitError(f"{streams!r} streams cannot be had.", f"Give 1 to {_MOST_STREAMS}.")
    if least_score is None:
        return
    number = isinstance(least_score, numbers.Real) and not isinstance(least_score, bool)
    if not number or not 0.0 <= float(least_score) <= 1.0:  # type: ignore[arg-type]
        raise ResvitError(f"The score {least_score!r:.100} is out of range.", "Give a number from 0 to 1.")


def _require_golden(folder: Path, manifest: Manifest) -> None:
    if manifest.golden is None or not (folder / manifest.golden.input).is_file():
        raise ResvitError(
            "The bundle has no golden images, so nothing shows that what runs here is what was validated.",
            "Make the bundle again with this version, or say check=False.",
        )
