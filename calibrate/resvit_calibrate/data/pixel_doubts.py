"""What files leave open about their pixels: which value is white, and which way up they were annotated."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from resvit_calibrate.images.image_set import DataSpec, ImageSet
from resvit_calibrate.images.pixels import Look
from resvit_calibrate.images.preprocess import Preprocess
from resvit_engines.errors import ResvitError
from resvit_engines.pictures.decode import WHITE
from resvit_engines.progress import Reporter

_DEPTHS = (8, 10, 12, 14, 16)
_OVERSHOOT = 0.05
_OF_TEN = 9
"""So many of ten images must be dark: a few that are not would hide the others."""


def with_white(sets: Sequence[ImageSet], reporter: Reporter) -> None:
    """Let 1 be white in floating-point images from 0 to 1 where no other value is said; all sets are read alike.

    Raises ``ResvitError`` where their values are others, or some images are of whole numbers of 16 bits.
    """
    looks = [look for images in sets for look in images.looks if look.brightest or look.kind.startswith("float")]
    floats = [look for look in looks if look.kind.startswith("float")]
    if not floats or any(images.looks and images.preprocess.white != WHITE for images in sets):
        return
    low, high = min(look.darkest for look in floats), max(look.brightest for look in floats)
    said = f"{len(floats)} images are {floats[0].kind}, not uint8, and their pixels lie from {low:g} to {high:g}"
    if not all(math.isfinite(value) for look in floats for value in (look.darkest, look.brightest)):
        raise ResvitError(f"{len(floats)} images are {floats[0].kind}, some with NaN or infinity.", "Correct them.")
    if low < -_OVERSHOOT:
        raise ResvitError(
            f"{said}: they are not of brightness alone, but normalised or of something else.",
            "Write them as they were before, from 0 to 1 or as uint8, or give a factory, `file.py:factory`.",
        )
    if high > 1 + _OVERSHOOT:
        raise ResvitError(
            f"{said}, and nothing says which value is white.",
            f"Say it: --preprocess white={_likely_white(high)}, for example.",
        )
    if len(floats) < len(looks):
        raise ResvitError(
            f"{said}, and {len(looks) - len(floats)} others are of whole numbers: one value cannot be white in both.",
            "Write all of them with the same type.",
        )
    reporter.warn(f"{said}: 1 is taken for white, and recorded as white=1")
    for images in sets:
        if images.looks:
            images.preprocess = dataclasses.replace(images.preprocess, white=1)


def require_readable(
    spec: DataSpec, asked: Preprocess, calibration: ImageSet, validation: ImageSet, reporter: Reporter
) -> str:
    """Say where pixels are not what a trainer may have made of the same files; why answers tell nothing, or "".

    Raises ``ResvitError`` where annotations are of the images the other way round.
    """
    both = (calibration, validation)
    looks = [look for images in both for look in images.looks]
    _say_who_prepares(asked, calibration, validation, reporter)
    _say_what_is_squeezed(asked, validation, reporter)
    doubts = [_about_turning(asked, both, looks, spec, reporter), _about_white(both, looks, spec, reporter)]
    return "; ".join(doubt for doubt in doubts if doubt)


def _say_who_prepares(asked: Preprocess, calibration: ImageSet, validation: ImageSet, reporter: Reporter) -> None:
    both = ((calibration, "calibration"), (validation, "validation"))
    whole = [what for images, what in both if images.preprocess.resize != asked.resize]
    if whole:
        reporter.warn(
            f"the {' and '.join(whole)} images are of the network's size already and are used whole: "
            f"crop_fraction={asked.crop_fraction:g} is for larger ones"
            + ("" if len(whole) == 2 else ", and cuts those on the other side: the two do not show the same of a scene")
        )
    if calibration.factory != validation.factory:
        told = [f"the {what} images are prepared by {images.factory or 'this tool'}" for images, what in both]
        reporter.warn(
            f"{told[0]}, {told[1]}: ranges and verdict hold only if both do the same, and the bundle records what "
            "the validation images went through"
        )


def _say_what_is_squeezed(asked: Preprocess, validation: ImageSet, reporter: Reporter) -> None:
    """Lines of text that are longer than the network's input is wide."""
    if validation.task != "text" or not validation.looks:
        return
    height, width = asked.size
    shapes = [look.stored for look in validation.looks]
    longer = sum(tall > 0 and wide * height > tall * width for tall, wide in shapes)
    other = sum(tall > 0 and wide * height != tall * width for tall, wide in shapes)
    if asked.resize == "stretch":
        if other:
            reporter.warn(
                f"{other} of {len(shapes)} lines, {longer} of them longer, have another shape than the "
                f"{height}x{width} pixels that they are drawn to; recognisers are mostly trained on lines that "
                "keep their shape, with what is left padded: --preprocess resize=letterbox"
            )
    elif longer:
        reporter.warn(
            f"{longer} of {len(shapes)} lines are longer than {width}:{height}, which the network's input is; they are "
            + ("cut" if asked.resize == "crop" else "made smaller as a whole")
        )


def _about_turning(
    asked: Preprocess, both: Sequence[ImageSet], looks: Sequence[Look], spec: DataSpec, reporter: Reporter
) -> str:
    turned = [look for look in looks if look.turned]
    if not turned:
        return ""
    done, other = ("turned upright", "ignore") if asked.exif == "apply" else ("read as they are stored", "apply")
    said = f"{len(turned)} of {sum(map(len, both))} images have an EXIF orientation and are {done}"
    reporter.warn(
        f"{said}; torchvision and timm turn none, other trainers do: --preprocess exif={other} reads them the other way"
    )
    upright = [look.annotated_upright for look in turned if look.annotated_upright is not None]
    if len(set(upright)) == 2:
        raise ResvitError(
            f"Of the images with an EXIF orientation {sum(upright)} are annotated upright and "
            f"{len(upright) - sum(upright)} as they are stored, by their sizes.",
            "Annotate all of them one way round: save the images upright and without EXIF orientation, for example.",
        )
    if upright and upright[0] != (asked.exif == "apply"):
        raise ResvitError(
            f"{said}, but {len(upright)} of them are annotated the other way round, by their sizes.",
            f"Say --preprocess exif={other}: boxes and masks then lie where they were drawn.",
        )
    if upright or "exif" in spec.said or not {images.task for images in both} & {"detection", "segmentation", "depth"}:
        return ""
    return (
        f"{said}, and no size tells which way round their boxes, masks or depths were made: "
        "say --preprocess exif=apply if upright, exif=ignore if as stored"
    )


def _about_white(both: Sequence[ImageSet], looks: Sequence[Look], spec: DataSpec, reporter: Reporter) -> str:
    reach = sorted(look.brightest for look in looks if look.kind != "uint8")
    if not reach:
        return ""
    white = next(images.preprocess.white for images in both if images.looks)
    name = "floating-point" if any(look.kind.startswith("float") for look in looks) else "16-bit"
    # In most images, or in nearly all: one that was stored otherwise must not hide the others.
    level = reach[(len(reach) - 1) * _OF_TEN // 10]
    if level <= white / 2:
        few = "" if level == reach[-1] else "nine of ten of "
        dark = f"{few}the {name} images reach {level:g} of {white} and come out nearly black: "
        if white == 1:
            remedy = "scale them so that 1 is white, or write them with 8 bits"
        else:
            bits = _bits_of(level)
            remedy = f"if they hold {bits} bits, say --preprocess white={(1 << bits) - 1}"
        reporter.warn(dark + remedy)
        if "white" in spec.said:
            return ""
        return dark + remedy + ("" if white == 1 else f", or white={white} if they are as dark as that")
    if level > 2 * white:
        bits = _bits_of(level)
        bright = (
            f"the {name} images reach {level:g}, and what is above white={white} is cut off, most of what they show: "
            f"say --preprocess white={(1 << bits) - 1} if they hold {bits} bits, or write them with 8 bits as meant"
        )
        reporter.warn(bright)
        return bright
    if reach[-1] > white * (1 + _OVERSHOOT * (white == 1)):
        reporter.warn(f"the {name} images reach {reach[-1]:g}: what is above white={white} is cut off")
    return ""


def _bits_of(value: float) -> int:
    return next((bits for bits in _DEPTHS if value < 1 << bits), _DEPTHS[-1])


def _likely_white(value: float) -> int:
    return int((1 << _bits_of(value)) - 1)
