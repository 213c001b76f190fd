"""What is doubtful about calibration data, in sentences for the person who gave it."""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from resvit_calibrate.ranges.statistics import Statistics
from resvit_engines.progress import Reporter

FEW_IMAGES = 32
"""Fewer leave the ranges to chance."""
_SURE = 512
"""Values of a channel that must have been sampled before it is called dead."""
_NAMED = 3


class DiagnosticKind(str, enum.Enum):
    """What a diagnostic is about."""

    FEW_IMAGES = "few images"
    CONSTANT = "constant activation"
    DEAD_CHANNELS = "dead channels"
    ONE_IMAGE = "range of one image"
    CLIPPED = "clipped on validation"


@dataclass(frozen=True)
class Diagnostic:
    """One doubt: its kind, the tensor that shows it most (None: it is about all), and a sentence or two."""

    kind: DiagnosticKind
    tensor: str | None
    text: str

    def to_json(self) -> dict[str, str | None]:
        """Plain values."""
        return {"kind": self.kind.value, "tensor": self.tensor, "text": self.text}


def diagnostics_from_statistics(statistics: Statistics) -> tuple[Diagnostic, ...]:
    """Find what is doubtful about calibration: few images, constants, dead channels, ranges set by one image.

    Only tensors that may be quantised are looked at. Nothing here stops a build: every scale stays finite and
    positive.
    """
    found: list[Diagnostic] = []
    if statistics.images < FEW_IMAGES:
        found.append(
            Diagnostic(
                DiagnosticKind.FEW_IMAGES,
                None,
                f"Calibration saw {statistics.images} image{'s' * (statistics.images != 1)}; with fewer than "
                f"{FEW_IMAGES}, chance sets the ranges. Give 128 to 512 images of the kind that the network will see.",
            )
        )
    found += _constants(statistics)
    found += _dead_channels(statistics)
    found += _single_images(statistics)
    return tuple(found)


def tell(diagnostics: Sequence[Diagnostic], reporter: Reporter, most: int = 5) -> None:
    """Warn of the first ``most`` diagnostics, and say how many more there are."""
    for diagnostic in diagnostics[:most]:
        reporter.warn(diagnostic.text)
    if len(diagnostics) > most:
        kinds = ", ".join(dict.fromkeys(diagnostic.kind.value for diagnostic in diagnostics[most:]))
        reporter.warn(f"And {len(diagnostics) - most} more diagnostics ({kinds}): the stage's files hold all.")


def _constants(statistics: Statistics) -> list[Diagnostic]:
    constant = [
        name
        for name, entry in statistics.tensors.items()
        if entry.histogram is not None and entry.minimum == entry.maximum
    ]
    if not constant:
        return []
    value = statistics.tensors[constant[0]].minimum
    return [
        Diagnostic(
            DiagnosticKind.CONSTANT,
            constant[0],
            f"{_tensors(len(constant))} the same number throughout every calibration image, such as "
            f"{_names(constant)} ({value:g} everywhere). Check the images and the checkpoint: nothing of the image "
            "comes through there.",
        )
    ]


def _dead_channels(statistics: Statistics) -> list[Diagnostic]:
    dead: dict[str, tuple[int, int]] = {}
    for name, entry in statistics.tensors.items():
        if entry.channels is None or entry.absmax == 0.0:  # all zero: said to be constant
            continue
        silent = (entry.channels.absmax == 0.0) & (entry.channels.count >= _SURE)
        if silent.any():
            dead[name] = int(np.count_nonzero(silent)), silent.size
    if not dead:
        return []
    worst = sorted(dead, key=lambda name: -dead[name][0] / dead[name][1])
    shown = ", ".join(f"{name!r} ({dead[name][0]} of {dead[name][1]})" for name in worst[:_NAMED])
    total = sum(count for count, _ in dead.values())
    return [
        Diagnostic(
            DiagnosticKind.DEAD_CHANNELS,
            worst[0],
            f"{total} channel{'s' * (total != 1)} in {len(dead)} tensor{'s' * (len(dead) != 1)} were zero in all of "
            f"{_SURE} or more sampled values each: {shown}{_rest(len(worst))}. They cost time and no accuracy; if "
            "the network sees such images only, pruning can take them out.",
        )
    ]


def _single_images(statistics: Statistics) -> list[Diagnostic]:
    """Ranges that a single image sets, by image.

    A range twice as wide as the second image needs costs every other image one bit of eight, and four times what
    the middle image needs costs a typical image two: from there on the one image is worth a look.
    """
    by_image: dict[int, dict[str, tuple[float, float]]] = {}
    seen: set[int] = set()
    for name, entry in statistics.tensors.items():
        absmax = entry.image_absmax
        if absmax is None or absmax.size < 3 or id(absmax) in seen:  # reshaped tensors share one array
            continue
        seen.add(id(absmax))
        second, first = np.partition(absmax, -2)[-2:].astype(float)
        middle = float(np.median(absmax))
        if first > 2.0 * second and first > 4.0 * middle:
            by_image.setdefault(int(absmax.argmax()), {})[name] = (first, second)
    diagnostics = []
    for image, tensors in sorted(by_image.items(), key=lambda item: -len(item[1])):
        worst = max(tensors, key=lambda name: tensors[name][0] / max(tensors[name][1], 1e-30))
        first, second = tensors[worst]
        others = f" and of {len(tensors) - 1} more" if len(tensors) > 1 else ""
        diagnostics.append(
            Diagnostic(
                DiagnosticKind.ONE_IMAGE,
                worst,
                f"Calibration image {image} alone sets the range of {worst!r}{others}: it reaches {first:.3g} there, "
                f"the next image {second:.3g}. Look at that image; if it does not belong to the data, leave it out, "
                "and if it does, an estimator that clips (mse) keeps it from widening the steps of all others.",
            )
        )
    return diagnostics


def clipping_diagnostics(
    validation: Mapping[str, float], calibration: Mapping[str, float], *, few_per_cent: float = 0.03
) -> tuple[Diagnostic, ...]:
    """Warn where ranges clip more than a few per cent on validation, and much more than on calibration.

    Both hold shares of clipped values, 0 to 1, by tensor, as ``clipped_shares`` gives them. "Much more" is three
    times the share of the calibration images.
    """
    worse = {
        name: share
        for name, share in validation.items()
        if share > few_per_cent and share > 3.0 * calibration.get(name, 0.0)
    }
    if not worse:
        return ()
    order = sorted(worse, key=lambda name: -worse[name])
    shown = ", ".join(
        f"{name!r} ({100 * worse[name]:.1f}%, on calibration {100 * calibration.get(name, 0.0):.1f}%)"
        for name in order[:_NAMED]
    )
    return (
        Diagnostic(
            DiagnosticKind.CLIPPED,
            order[0],
            f"The ranges clip more than {100 * few_per_cent:g}% of the values of {len(worse)} of {len(validation)} "
            f"quantised tensors on the validation images: {shown}{_rest(len(order))}. The calibration images are "
            "unlike the validation images: calibrate with images like those that the network will see.",
        ),
    )


def _tensors(count: int) -> str:
    return "1 tensor that may be quantised holds" if count == 1 else f"{count} tensors that may be quantised hold"


def _names(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names[:_NAMED]))


def _rest(count: int) -> str:
    return f" and {count - _NAMED} more" if count > _NAMED else ""
