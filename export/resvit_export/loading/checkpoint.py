"""Trained weights from a file into a module: strictly, and without running what a pickle might hold."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from resvit_engines.errors import ResvitError
from resvit_engines.progress import SILENT, Reporter
from resvit_export.loading.user_code import user_error
from resvit_export.loading.weights.file import read_checkpoint
from resvit_export.loading.weights.places import Flat, Place, flattened, place_named, places_for

if TYPE_CHECKING:
    from resvit_quantize.pruning.structure import Structure

STRUCTURE = "resvit_structure"
"""Key under which a pruned checkpoint records its shapes."""

_NAMED = 3
_COUNTER = ".num_batches_tracked"
_SHARD = re.compile(r"-\d{5}-of-\d{5}\.")


def load_checkpoint(
    module: nn.Module, path: Path, key: str | None = None, reporter: Reporter = SILENT
) -> tuple[str, ...]:
    """Load the weights in ``path`` into ``module``, every name and shape exact; returns notes for the user.

    They are looked for below every key and prefix of the file (``resvit_export.loading.weights.places``), or below
    ``key`` alone. Where several places fit, averaged weights (EMA) are taken, and a warning says how to choose.

    Raises:
        ResvitError: as ``read_checkpoint``; for weights that do not fit (the first missing, unexpected and wrongly
            shaped are named, and where else some are); and for tensors that are no plain numbers.
    """
    content = read_checkpoint(path)
    _take_structure(module, content, path)
    flat = flattened(content, path)
    expected = {name: tensor for name, tensor in module.state_dict().items() if isinstance(tensor, torch.Tensor)}
    found = places_for(flat, {name: tuple(tensor.shape) for name, tensor in expected.items()})
    place = place_named(found, flat, key, path) if key else found[0] if found else None
    names = place.names if place else {}
    if place and not any(name.endswith(_COUNTER) for name in names):
        # Counts of batches came with PyTorch 0.4.1, and nothing of another library has them; no answer needs one.
        expected = {name: tensor for name, tensor in expected.items() if not name.endswith(_COUNTER)}
    # An average over all entries makes floats of them, and halving all halves them.
    weights = {
        name: flat.tensors[full].to(torch.int64) if _is_count(name, flat.tensors[full]) else flat.tensors[full]
        for name, full in names.items()
    }
    if odd := [f"{names[name]} {why}" for name in names if (why := _oddity(weights[name], expected[name]))]:
        raise ResvitError(
            f"{path} holds tensors that are no plain weights: {', '.join(odd[:_NAMED])}"
            f"{f', … ({len(odd)})' if len(odd) > _NAMED else ''}.",
            "Save the trained network's own weights, as dense floating-point numbers, before any conversion of it.",
        )
    if place is None or len(names) < len(expected) or place.fitting < len(expected) or place.unexpected:
        raise _misfit(path, expected, flat, place, found)
    others = [other for other in found if other is not place and other.fitting == place.fitting and not key]
    if different := [other for other in others if not _same(flat, place, other)]:
        reporter.warn(
            f"{path.name} holds weights that fit the network in {1 + len(different)} places: '{place.key}'"
            f"{' (averaged over training)' if place.averaged else ''} is taken, and "
            f"{', '.join(repr(other.key) for other in different)} not; --checkpoint-key chooses another"
        )
    try:
        # Names and shapes are checked; a module's own state beside its tensors is no weight.
        module.load_state_dict(weights, strict=False)
    except (RuntimeError, TypeError, ValueError, KeyError, AttributeError) as error:
        raise user_error(
            error, f"The model did not take the weights in {path}", "Mend what its code does on loading."
        ) from error
    return tuple(_notes(path, place, others, weights, found))


def _notes(
    path: Path, place: Place, others: list[Place], weights: Mapping[str, torch.Tensor], found: list[Place]
) -> list[str]:
    notes = []
    if place.path:
        notes.append(f"weights taken from '{place.path.removesuffix('.')}' in {path.name}")
    if others:
        told = ", ".join(other.key for other in others)
        notes.append(f"{path.name} also holds weights under {told}, which were not used")
    if stripped := place.prefix.removeprefix(place.path):
        notes.append(f"removed the prefix '{stripped}' from all keys of {path.name}")
    partly = [each for each in found if each.averaged and len(weights) > each.fitting >= len(weights) / 2]
    for each in partly[:1]:
        lacking = [name for name in weights if name not in each.names]
        notes.append(
            f"{path.name} holds {each.fitting} of the network's {len(weights)} tensors averaged over training, under "
            f"'{each.key}'; {', '.join(lacking[:_NAMED])} and others lack there, so that they were not used"
        )
    if place.beside and not others:
        notes.append(
            f"left out what is not the network's in {path.name}: {', '.join(place.beside[:_NAMED])}"
            f"{', …' if len(place.beside) > _NAMED else ''}"
        )
    if narrow := {str(w.dtype) for w in weights.values() if w.is_floating_point() and w.dtype.itemsize < 4}:
        notes.append(f"{path.name} holds {', '.join(sorted(narrow))} weights; they are computed in float32")
    return notes


def _misfit(
    path: Path, expected: Mapping[str, torch.Tensor], flat: Flat, place: Place | None, found: list[Place]
) -> ResvitError:
    """What lacks, what is too much and what has another shape, at the place that fits best."""
    names = place.names if place else {}
    missing = [name for name in expected if name not in names]
    misshapen = [
        f"{name} {list(flat.tensors[full].shape)} instead of {list(expected[name].shape)}"
        for name, full in names.items()
        if flat.tensors[full].shape != expected[name].shape
    ]
    unexpected = [full.removeprefix(place.prefix) for full in place.unexpected] if place else list(flat.tensors)
    findings = [
        f"{len(each)} {what} ({', '.join(each[:_NAMED])}{', …' if len(each) > _NAMED else ''})"
        for what, each in (("missing", missing), ("unexpected", unexpected), ("wrongly shaped", misshapen))
        if each
    ]
    where = f" below '{place.key}'" if place and place.prefix else ""
    # A place with a few layers of the network's sizes is another network's.
    likely = [other for other in found if other is not place and 2 * other.fitting >= len(expected)]
    others = [f"'{other.key}' ({other.fitting} of {len(expected)} tensors)" for other in likely]
    if _SHARD.search(path.name):
        return ResvitError(
            f"{path} is one of several files, and does not hold all of the model's {len(expected)} tensors: "
            f"{'; '.join(findings)}.",
            "Give the index beside it, such as model.safetensors.index.json.",
        )
    return ResvitError(
        f"The weights in {path}{where} do not fit the model, which has {len(expected)} tensors: {'; '.join(findings)}.",
        "Give the model and the arguments that this checkpoint was trained with (num_classes, image size, variant)"
        + (f"; some weights fit at {', '.join(others[:_NAMED])}: --checkpoint-key names a place." if others else "."),
    )


def _is_count(name: str, tensor: torch.Tensor) -> bool:
    plain = type(tensor) in (torch.Tensor, nn.Parameter) and tensor.layout is torch.strided and not tensor.is_quantized
    return name.endswith(_COUNTER) and plain and tensor.is_floating_point() and tensor.device.type == "cpu"


def _oddity(tensor: torch.Tensor, wanted: torch.Tensor) -> str | None:
    """Why a tensor is no plain weight of the wanted kind; None for one that is."""
    if tensor.is_nested or tensor.layout is not torch.strided:
        return "is nested" if tensor.is_nested else f"is sparse ({str(tensor.layout).removeprefix('torch.')})"
    if tensor.is_quantized:
        return "is quantised"
    if tensor.device.type != "cpu":
        return f"has no values (device {tensor.device.type})"
    if type(tensor) not in (torch.Tensor, nn.Parameter):
        return f"is a {type(tensor).__name__}"
    if tensor.is_complex() != wanted.is_complex() or tensor.is_floating_point() != wanted.is_floating_point():
        own, other = (str(each.dtype).removeprefix("torch.") for each in (tensor, wanted))
        return f"is {own} instead of {other}"
    return None


def _same(flat: Flat, one: Place, another: Place) -> bool:
    """Whether two places hold the same numbers."""
    pairs = [(flat.tensors[full], flat.tensors[another.names[name]]) for name, full in one.names.items()]
    return all(_oddity(second, first) is None and torch.equal(first, second) for first, second in pairs)


def structure_in(path: Path) -> Structure | None:
    """The structure that a pruned checkpoint records; ``None`` for any other. Raises as ``load_checkpoint`` does."""
    return _structure_of(read_checkpoint(path))


def _structure_of(content: Any) -> Structure | None:
    from resvit_quantize.pruning.structure import structure_from_json

    return structure_from_json(content[STRUCTURE]) if isinstance(content, Mapping) and STRUCTURE in content else None


def _take_structure(module: nn.Module, content: Any, path: Path) -> None:
    """Give the module the shapes that a pruned checkpoint records; nothing for any other."""
    from resvit_quantize.pruning.structure import apply_structure

    try:
        if (structure := _structure_of(content)) is not None:
            apply_structure(module, structure)
    except ResvitError as error:
        raise ResvitError(f"{path} was pruned from another model: {error.problem}", error.fix) from error


def require_finite(module_or_tensors: nn.Module | Mapping[str, Any], source: str) -> None:
    """Raise ``ResvitError`` naming the first tensor that holds NaN or infinity.

    A buffer that is no running statistic may hold -inf, as attention masks do, or be one infinite number: the bound of
    a clamp that does nothing.
    """
    parameters: set[str] | None = None
    if isinstance(module_or_tensors, nn.Module):
        parameters = {name for name, _ in module_or_tensors.named_parameters(remove_duplicate=False)}
        module_or_tensors = module_or_tensors.state_dict()
    for name, tensor in module_or_tensors.items():
        if not isinstance(tensor, torch.Tensor) or not tensor.is_floating_point():
            continue
        weight = isinstance(tensor, nn.Parameter) if parameters is None else name in parameters
        mask = not weight and "running_" not in name
        bad = torch.isnan(tensor)
        if not mask:
            bad = ~torch.isfinite(tensor)
        elif tensor.numel() > 1:
            bad |= torch.isposinf(tensor)
        count = int(bad.sum())
        if count:
            raise ResvitError(
                f"{source}: {name} holds {count} NaN or infinite values (of {tensor.numel()}).",
                "Training has diverged or the file is damaged; take an earlier checkpoint.",
            )


def write_network(
    folder: Path, name: str, module: nn.Module, structure: Structure, shape: tuple[int, int, int]
) -> None:
    """Write ``NAME.pt``, weights and structure, and ``NAME.pt2``, a program that needs neither code nor structure."""
    from resvit_export.loading.program.run import write_by_memory
    from resvit_export.loading.program.trace import program_from_module

    module = module.cpu().eval()
    program, _ = program_from_module(module, shape)
    weights = {key: value.detach().clone() for key, value in module.state_dict().items()}
    content = {"state_dict": weights, STRUCTURE: structure.to_json()}
    write_by_memory(folder / f"{name}.pt", lambda out: torch.save(content, out))
    write_by_memory(folder / f"{name}.pt2", lambda out: torch.export.save(program, out))
