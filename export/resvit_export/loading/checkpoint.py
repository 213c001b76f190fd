"""Trained weights from a file into a module: strictly, and without running what a pickle might hold."""

from __future__ import annotations

import argparse
import pathlib
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from resvit_engines.errors import ExitCode, ResvitError

if TYPE_CHECKING:
    from resvit_quantize.pruning.structure import Structure

WRAPPERS = ("state_dict", "model", "model_state_dict", "ema", "model_ema", "state_dict_ema", "net")
"""Keys under which training scripts keep the weights, in the order in which they are tried."""

STRUCTURE = "resvit_structure"
"""Key under which a pruned checkpoint records its shapes."""

PREFIXES = ("module.", "_orig_mod.", "model.")
"""What DataParallel, torch.compile and Lightning put in front of every key."""

_WRAPPED = "model."
"""What a network that wraps another (``HuggingFaceModel``) puts in front of the other's keys."""

_COUNTERS = ("n_averaged",)
_NAMED = 3


def load_checkpoint(module: nn.Module, path: Path) -> tuple[str, ...]:
    """Load the weights in ``path`` into ``module``, every key and shape exact; returns notes for the user.

    Reads ``.safetensors`` and files of ``torch.save``; the latter only as tensors and plain values
    (``weights_only=True``). Raises ``ResvitError`` for a missing, empty, truncated or foreign file, a pickle
    with code in it, no weights inside, and weights that do not fit (the first missing, unexpected and wrongly
    shaped keys are named).
    """
    content = read_checkpoint(path)
    _take_structure(module, content, path)
    weights, where, others = find_weights(content, path)
    notes = [f"weights taken from '{where}' in {path.name}"] if where else []
    if others:
        notes.append(f"{path.name} also holds weights under {', '.join(others)}, which were not used")
    expected = module.state_dict()
    weights, stripped = _without_prefix(weights, set(expected))
    if stripped:
        notes.append(f"removed the prefix '{stripped}' from all keys of {path.name}")
    inner = {f"{_WRAPPED}{key}": value for key, value in weights.items()}
    if len(expected.keys() & inner.keys()) > len(expected.keys() & weights.keys()):
        weights = inner
    missing = [key for key in expected if key not in weights]
    unexpected = [key for key in weights if key not in expected]
    misshapen = [
        f"{key} {list(weights[key].shape)} instead of {list(tensor.shape)}"
        for key, tensor in expected.items()
        if key in weights and isinstance(tensor, torch.Tensor) and weights[key].shape != tensor.shape
    ]
    findings = [
        f"{len(found)} {what} ({', '.join(found[:_NAMED])}{', …' if len(found) > _NAMED else ''})"
        for what, found in (("missing", missing), ("unexpected", unexpected), ("wrongly shaped", misshapen))
        if found
    ]
    if findings:
        raise ResvitError(
            f"The weights in {path} do not fit the model, which has {len(expected)} tensors: {'; '.join(findings)}.",
            "Give the model and the arguments that this checkpoint was trained with "
            "(num_classes, image size, variant).",
        )
    narrow = {str(w.dtype) for w in weights.values() if w.is_floating_point() and w.dtype.itemsize < 4}
    if narrow:
        notes.append(f"{path.name} holds {', '.join(sorted(narrow))} weights; they are computed in float32")
    module.load_state_dict(weights)
    return tuple(notes)


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


def read_checkpoint(path: Path) -> Any:
    """The content of a checkpoint file as tensors and plain values.

    Besides tensors, ``argparse.Namespace`` and paths are let through, since training scripts save their
    settings beside the weights; both only store what they are given.
    """
    if not path.is_file():
        raise ResvitError(f"The checkpoint {path} does not exist.", "Check the path given to --checkpoint.")
    if path.stat().st_size == 0:
        raise ResvitError(f"The checkpoint {path} is empty (0 bytes).", "Copy or download the file again.")
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    if path.suffix not in (".pt", ".pth", ".bin", ".ckpt", ".tar"):
        raise ResvitError(
            f"{path.name} is no known checkpoint format.",
            "Give a .safetensors file, or a .pt or .pth written by torch.save(model.state_dict(), path).",
        )
    _refuse_torchscript(path)
    try:
        allowed: list[Any] = [argparse.Namespace, pathlib.PosixPath, pathlib.PurePosixPath]
        with torch.serialization.safe_globals(allowed):
            return torch.load(path, weights_only=True, map_location="cpu")
    except pickle.UnpicklingError as error:
        if "Unsupported global" in str(error) or "Unsupported class" in str(error) or "GLOBAL" in str(error):
            raise ResvitError(
                f"{path} holds more than weights, and loading that would run code from the file: {_refused(error)}.",
                "Where it was trained, save the weights alone: torch.save(model.state_dict(), path), "
                "or use safetensors.",
            ) from error
        raise _unreadable(path, error) from error
    except (RuntimeError, EOFError, ValueError, KeyError, AssertionError, OSError, TypeError) as error:
        raise _unreadable(path, error) from error


def find_weights(content: Any, path: Path) -> tuple[dict[str, torch.Tensor], str, tuple[str, ...]]:
    """The state dict inside the usual wrappers: (weights, where they were, where others are).

    Raises ``ResvitError`` naming the keys that are there instead.
    """
    where: list[str] = []
    others: tuple[str, ...] = ()
    while isinstance(content, Mapping):
        inside = [key for key in WRAPPERS if isinstance(content.get(key), Mapping) and content[key]]
        if not inside:
            break
        if not where:
            others = tuple(inside[1:])
        where.append(inside[0])
        content = content[inside[0]]
    keys = [str(key) for key in content] if isinstance(content, Mapping) else []
    weights = {str(key): value for key, value in content.items() if isinstance(value, torch.Tensor)} if keys else {}
    if not weights:
        found = f"the keys {', '.join(keys[:8])}" if keys else f"a {type(content).__name__}"
        raise ResvitError(
            f"{path} holds no weights that could be found: it holds {found}.",
            f"Weights are looked for at the top and under {', '.join(WRAPPERS)}.",
        )
    return weights, ".".join(where), others


def require_finite(module_or_tensors: nn.Module | Mapping[str, Any], source: str) -> None:
    """Raise ``ResvitError`` naming the first tensor that holds NaN or infinity.

    A buffer that is no running statistic may hold -inf: attention masks do.
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
        bad = torch.isnan(tensor) | torch.isposinf(tensor) if mask else ~torch.isfinite(tensor)
        count = int(bad.sum())
        if count:
            raise ResvitError(
                f"{source}: {name} holds {count} NaN or infinite values (of {tensor.numel()}).",
                "Training has diverged or the file is damaged; take an earlier checkpoint.",
            )


def _read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        loaded: dict[str, torch.Tensor] = load_file(path, device="cpu")
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise _unreadable(path, error) from error
    return loaded


def _without_prefix(weights: dict[str, torch.Tensor], expected: set[str]) -> tuple[dict[str, torch.Tensor], str]:
    """Strip prefixes that all keys share, as far as that makes more keys fit the model."""
    weights = {key: value for key, value in weights.items() if key not in _COUNTERS or key in expected}
    best, best_prefix, prefix = weights, "", ""
    current = weights
    while True:
        common = [p for p in PREFIXES if current and all(key.startswith(p) for key in current)]
        if not common:
            return best, best_prefix
        prefix += common[0]
        current = {key.removeprefix(common[0]): value for key, value in current.items()}
        if len(expected & set(current)) > len(expected & set(best)):
            best, best_prefix = current, prefix


def _refuse_torchscript(path: Path) -> None:
    if not zipfile.is_zipfile(path):
        return
    with zipfile.ZipFile(path) as archive:
        names = [name.partition("/")[2] for name in archive.namelist()]
    if "constants.pkl" in names or any(name.startswith("code/") for name in names):
        raise ResvitError(
            f"{path} is a TorchScript program, which cannot be read as weights.",
            "Save the weights with torch.save(model.state_dict(), path), or the program with torch.export.save.",
        )
    if any(name.startswith("models/") for name in names):
        raise ResvitError(
            f"{path} is an exported program, not a checkpoint.",
            "Give it as the model: --model program.pt2.",
        )


def _refused(error: Exception) -> str:
    for word in str(error).replace("`", " ").split():
        if "." in word and not word.startswith(("http", "torch.load", "torch.serialization")) and word.count(".") < 8:
            name = word.strip(".,()[]'\"")
            if "." in name and all(part.isidentifier() for part in name.split(".")):
                return f"it refers to {name}"
    return "it refers to Python classes"


def _unreadable(path: Path, error: Exception) -> ResvitError:
    first = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
    if isinstance(error, PermissionError):
        return ResvitError(f"{path} cannot be read: permission denied.", "Change its permissions.", ExitCode.SYSTEM)
    return ResvitError(
        f"{path} cannot be read as a checkpoint ({path.stat().st_size:,} bytes): {first}",
        "The file is truncated, damaged or of another kind; copy or download it again.",
    )


def write_network(
    folder: Path, name: str, module: nn.Module, structure: Structure, shape: tuple[int, int, int]
) -> None:
    """Write ``NAME.pt``, weights and structure, and ``NAME.pt2``, a program that needs neither code nor structure."""
    from resvit_export.loading.torch_program import program_from_module, write_by_memory

    module = module.cpu().eval()
    program, _ = program_from_module(module, shape)
    weights = {key: value.detach().clone() for key, value in module.state_dict().items()}
    content = {"state_dict": weights, STRUCTURE: structure.to_json()}
    write_by_memory(folder / f"{name}.pt", lambda out: torch.save(content, out))
    write_by_memory(folder / f"{name}.pt2", lambda out: torch.export.save(program, out))
