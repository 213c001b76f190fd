"""Every stage is one value: changing any field of it, or of what it holds, changes its key."""

from __future__ import annotations

import dataclasses
import enum
import importlib
import pkgutil
import sys
import types
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from resvit_calibrate.images.preprocess import Preprocess
from resvit_calibrate.ranges.estimators import Estimator
from resvit_engines.builder.settings import BuildSettings
from resvit_engines.pictures.sizes import SizeRange
from resvit_engines.targets.table import Precision, find_target
from resvit_export import stages
from resvit_export.stage import Artifact, File, Key, Output, Record, Stage, plain
from resvit_quantize.settings import Effort, Methods, QuantizeSettings

for module in pkgutil.walk_packages(stages.__path__, f"{stages.__name__}."):
    importlib.import_module(module.name)


def below(kind: type) -> Iterator[type]:
    for child in kind.__subclasses__():
        yield child
        yield from below(child)


STAGES = sorted(
    {kind for kind in below(Stage) if kind.__module__.startswith("resvit_export.stages.") and "name" in vars(kind)},
    key=lambda kind: kind.__qualname__,
)


class Told:
    """What is only known by its digest: images, the user's network, a key."""

    def __init__(self, digest: str) -> None:
        self.digest = digest


BY_DIGEST = {"NetworkSource", "ImageSet", "TrainingImages", "Signer"}
WHOLE = {
    "Target": (find_target("rtx-4090"), find_target("jetson-orin")),
    "Preprocess": (Preprocess((8, 8)), Preprocess((8, 9))),
    "BuildSettings": (BuildSettings(), BuildSettings(batch=(1, 2, 4))),
    "SizeRange": (SizeRange((8, 8), (8, 8), (9, 9)), SizeRange((8, 8), (8, 9), (9, 9))),
    "QuantizeSettings": (QuantizeSettings(Precision.INT8), QuantizeSettings(Precision.FP8)),
}
"""What checks its own fields, so that not every combination of values can be made; their fields are changed below."""


for name in (
    "resvit_calibrate.data.overlap",
    "resvit_calibrate.data.training_images",
    "resvit_calibrate.images.image_set",
    "resvit_engines.keys.private",
    "resvit_quantize.search.search",
):
    importlib.import_module(name)
NAMED = {
    name: value
    for module in [module for path, module in sys.modules.items() if path.startswith("resvit_")]
    for name, value in vars(module).items()
    if isinstance(value, type) and value.__module__.startswith("resvit_")
}


def artifact(kind: type[Artifact], content: str) -> Artifact:
    return kind(Path("x"), Record("s", "k", {}, {}, {"f": Output(content, 1)}, 1.0, 1), reused=False)


def names_of(kind: type) -> dict[str, Any]:
    """Every class by its name: annotations name some that are imported for type checkers alone."""
    return {**NAMED, **vars(importlib.import_module(kind.__module__)), "Any": Any}


def two(annotation: Any, kind: type) -> tuple[Any, Any]:
    """Two values of a type that mean different things."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType):
        inner = next(item for item in arguments if item is not type(None))
        return two(inner, kind)[0], (None if type(None) in arguments else two(inner, kind)[1])
    if origin is tuple:
        parts = [item for item in arguments if item is not Ellipsis]
        return tuple(two(item, kind)[0] for item in parts), tuple(two(item, kind)[1] for item in parts)
    if origin is not None and issubclass(origin, Mapping):
        key, value = (two(item, kind) for item in arguments)
        return {key[0]: value[0]}, {key[0]: value[1]}
    name = getattr(annotation, "__name__", "")
    if annotation is Any:
        return "one", "another"
    if name in BY_DIGEST:
        return Told("one"), Told("another")
    if name in WHOLE:
        return WHOLE[name]
    plainly = {
        str: ("one", "another"),
        int: (1, 2),
        float: (0.25, 0.5),
        bool: (False, True),
        Path: (Path("a"), Path("b")),
    }
    if annotation in plainly:
        return plainly[annotation]
    if isinstance(annotation, type) and issubclass(annotation, enum.Enum):
        first, second, *_ = annotation
        return first, second
    if annotation is File:
        return File(Path("a"), "one"), File(Path("a"), "another")
    if isinstance(annotation, type) and issubclass(annotation, Artifact):
        return artifact(annotation, "one"), artifact(annotation, "another")
    assert dataclasses.is_dataclass(annotation), annotation
    base = example(annotation)
    first = next(item for item in dataclasses.fields(annotation) if item.init)
    changed = two(typing.get_type_hints(annotation, localns=names_of(annotation))[first.name], annotation)[1]
    return base, dataclasses.replace(base, **{first.name: changed})


def example(kind: type) -> Any:
    hints = typing.get_type_hints(kind, localns=names_of(kind))
    return kind(**{item.name: two(hints[item.name], kind)[0] for item in dataclasses.fields(kind) if item.init})


def test_there_are_stages() -> None:
    assert {"load", "prune", "retrain", "fold", "export", "recover", "calibrate", "quantize", "fuse", "validate"} <= {
        kind.name for kind in STAGES
    }
    assert {"sensitivity", "search", "compile", "audit", "bundle", "device"} <= {kind.name for kind in STAGES}


@pytest.mark.parametrize("kind", STAGES, ids=lambda kind: kind.__name__)
def test_changing_any_field_changes_the_key(kind: type[Stage[Artifact]]) -> None:
    stage = example(kind)
    key = Key.of(stage).digest
    assert Key.of(example(kind)).digest == key
    hints = typing.get_type_hints(kind, localns=names_of(kind))
    fields = dataclasses.fields(kind)
    assert fields
    for item in fields:
        other = dataclasses.replace(stage, **{item.name: two(hints[item.name], kind)[1]})
        assert Key.of(other).digest != key, item.name


@pytest.mark.parametrize("kind", STAGES, ids=lambda kind: kind.__name__)
def test_changing_what_a_field_holds_changes_the_key(kind: type[Stage[Artifact]]) -> None:
    stage = example(kind)
    key = Key.of(stage).digest
    for item in dataclasses.fields(kind):
        held = getattr(stage, item.name)
        if not dataclasses.is_dataclass(held) or isinstance(held, (File, Artifact)):
            continue
        hints = typing.get_type_hints(type(held), localns=names_of(type(held)))
        for inner in dataclasses.fields(held):
            # Where it is found is no part of what it is: a file on a disk, a device under an address.
            if not inner.init or not inner.compare or type(held).__name__ in WHOLE:
                continue
            changed = dataclasses.replace(held, **{inner.name: two(hints[inner.name], type(held))[1]})
            if changed == held:
                changed = dataclasses.replace(held, **{inner.name: two(hints[inner.name], type(held))[0]})
            other = dataclasses.replace(stage, **{item.name: changed})
            assert Key.of(other).digest != key, f"{item.name}.{inner.name}"


@pytest.mark.parametrize(
    "change",
    [
        {"batch": (1, 1, 2)},
        {"workspace_mib": 64},
        {"optimization_level": 1},
        {"sparse": True},
        {"hardware_compatible": True},
        {"version_compatible": True},
        {"strip_weights": True},
        {"plugins": "aot"},
    ],
)
def test_settings_of_a_build_tell_builds_apart(change: dict[str, Any]) -> None:
    assert plain(BuildSettings(**change)) != plain(BuildSettings())


@pytest.mark.parametrize(
    "change",
    [
        {"estimator": Estimator.MAX},
        {"include": ("head*",)},
        {"exclude": ("head*",)},
        {"effort": Effort.BEST},
        {"methods": Methods(smoothing=False)},
        {"precisions": {"a": Precision.FP16}},
        {"bits": 6},
    ],
)
def test_settings_of_the_quantiser_tell_graphs_apart(change: dict[str, Any]) -> None:
    assert plain(QuantizeSettings(Precision.INT8, **change)) != plain(QuantizeSettings(Precision.INT8))


def test_the_versions_of_what_computes_a_stage_are_in_its_key() -> None:
    for kind in STAGES:
        stage = example(kind)
        key = Key.of(stage)
        assert set(key.versions) == {"resvit-export", *stage.libraries()}
        for package in key.versions:
            assert dataclasses.replace(key, versions={**key.versions, package: "0"}).digest != key.digest


def test_what_nothing_tells_apart_has_no_place_in_a_stage() -> None:
    with pytest.raises(TypeError, match="nothing tells one from another"):
        plain(lambda: None)
    assert plain({"a": (1, None), "b": frozenset({2, 1})}) == {"a": [1, None], "b": [1, 2]}
