"""What identifies a network without loading it, so that an unchanged stage can be skipped in a moment."""

from __future__ import annotations

import copy
import dataclasses
import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from resvit_engines.errors import ResvitError
from resvit_engines.files import canonical_json, sha256_bytes, sha256_file
from resvit_engines.progress import SILENT, Reporter
from resvit_export.loading.spec import ModelSpec

if TYPE_CHECKING:
    from torch import nn

    from resvit_export.loading.load import Network


class NetworkSource:
    """The user's network, known by names, arguments and digests of files; loaded once, when a stage really needs it.

    ``module`` is a network in memory, known by its graph and its weights instead, for which it is traced at once: a
    forward's code and what a module holds beside its tensors leave no other mark. It is copied, and stays as it is.
    Raises ``ResvitError`` where a file that the specification names does not exist, and as ``load_network``.
    """

    def __init__(self, spec: ModelSpec, module: nn.Module | None = None, reporter: Reporter = SILENT) -> None:
        self.spec, self._module = spec, module
        self.identity = model_identity(spec)
        self._network: Network | None = None
        if module is not None:
            self.identity["program"] = self.network(reporter).digest
        self.digest = sha256_bytes(canonical_json(self.identity))

    @property
    def from_onnx(self) -> bool:
        """Whether the model came as ONNX, so that there is no PyTorch network."""
        return self.spec.model.endswith(".onnx")

    def network(self, reporter: Reporter) -> Network:
        """The network with its weights, as one exported program; raises as ``load_network``."""
        if self._network is None:
            from resvit_export.loading.libraries import quiet_libraries
            from resvit_export.loading.load import load_network, network_from_module

            with quiet_libraries():
                self._network = (
                    load_network(self.spec, reporter)
                    if self._module is None
                    else network_from_module(copy.deepcopy(self._module), self.spec, reporter)
                )
        return self._network

    def with_checkpoint(self, weights: Path) -> NetworkSource:
        """The same architecture with other weights."""
        return NetworkSource(dataclasses.replace(self.spec, checkpoint=weights), self._module)


def model_identity(spec: ModelSpec) -> dict[str, Any]:
    """Names, arguments and digests of the files that the network is made from.

    Raises ``ResvitError`` where a file that the specification names does not exist.
    """
    identity: dict[str, Any] = {
        "model": spec.model,
        "arguments": dict(spec.model_args),
        "input_shape": list(spec.input_shape) if spec.input_shape else None,
        **({"shapes": [item.to_json() for item in spec.inputs]} if spec.inputs else {}),
        "checkpoint": _file_digest("checkpoint", spec.checkpoint) if spec.checkpoint else None,
    }
    head, colon, factory = spec.model.rpartition(":")
    if spec.model.endswith((".onnx", ".pt2")):
        # The path may change and the model stay the same.
        identity["model"] = _file_digest("model", Path(spec.model))
    elif spec.model.startswith("hf:"):
        identity["files"] = _folder_digests(Path(spec.model.removeprefix("hf:")).expanduser())
    elif colon and head.endswith(".py"):
        identity["model"] = f"{_file_digest('model', Path(head))}:{factory}"
    elif colon and head not in ("resvit", "timm", "object"):
        identity["source"] = _module_digest(head)
    return identity


def _folder_digests(folder: Path) -> Mapping[str, str]:
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
