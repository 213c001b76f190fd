"""What identifies a model without loading it, so that an unchanged stage can be skipped in a moment."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from resvit_engines.errors import ResvitError
from resvit_engines.files import sha256_file
from resvit_export.recipe import Recipe


def model_identity(recipe: Recipe) -> dict[str, Any]:
    """Names, arguments and digests of the files that the network is made from.

    Raises ``ResvitError`` where a file that the recipe names does not exist.
    """
    model = str(recipe.model)
    identity: dict[str, Any] = {
        "model": model,
        "arguments": dict(recipe.model_args),
        "input_shape": recipe.input_shape,
        **({"shapes": [wish.input.to_json() for wish in recipe.shape_wishes]} if recipe.shapes else {}),
        "checkpoint": _file_digest("checkpoint", Path(recipe.checkpoint)) if recipe.checkpoint else None,
    }
    head, colon, factory = model.rpartition(":")
    if model.endswith((".onnx", ".pt2")):
        # The path may change and the model stay the same.
        identity["model"] = _file_digest("model", Path(model))
    elif model.startswith("hf:"):
        identity["files"] = _folder_digests(Path(model.removeprefix("hf:")).expanduser())
    elif colon and head.endswith(".py"):
        identity["model"] = f"{_file_digest('model', Path(head))}:{factory}"
    elif colon and head not in ("resvit", "timm"):
        identity["source"] = _module_digest(head)
    return identity


def _folder_digests(folder: Path) -> dict[str, str]:
    """Digests of a model's settings and weights; none of a repository's name, whose cached files do not change."""
    kinds = (".json", ".safetensors", ".bin")
    return {path.name: sha256_file(path) for path in sorted(folder.glob("*")) if path.suffix in kinds}


def metric_identity(metric: str | None) -> str | None:
    """Name of the user's metric and digest of the file or module that it is in."""
    if metric is None:
        return None
    place, _, name = metric.rpartition(":")
    return f"{_file_digest('metric', Path(place)) if place.endswith('.py') else _module_digest(place)}:{name}"


def _file_digest(what: str, path: Path) -> str:
    if not path.is_file():
        raise ResvitError(f"The {what} {path} does not exist.", f"Check the path given to --{what}.")
    digest = sha256_file(path)
    # Weights beside an ONNX file (external data) change the model as well.
    outside = sorted(file for file in path.parent.glob(f"{path.name}*data") if file.is_file())
    return "+".join([digest, *(sha256_file(file) for file in outside)])


def _module_digest(module: str) -> str | None:
    """Digest of a module's source file; ``None`` where it has none (the loader will say what is wrong)."""
    try:
        spec = importlib.util.find_spec(module)
    except (ImportError, ValueError, RuntimeError):
        return None  # the last where torchvision does not load its own operators (resvit_export.loading.libraries)
    if spec is None or spec.origin is None or not Path(spec.origin).is_file():
        return None
    return sha256_file(Path(spec.origin))
