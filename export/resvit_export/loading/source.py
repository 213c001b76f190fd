"""What identifies a network: without loading it where that can be trusted, so that unchanged stages cost a moment."""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from resvit_calibrate.readers.user.code import digest_of_file, user_files
from resvit_engines.files import canonical_json, sha256_bytes, sha256_file
from resvit_engines.outside import expanded, leads_to_folder
from resvit_engines.progress import SILENT, Reporter
from resvit_export.loading.spec import ModelSpec
from resvit_export.loading.weights.regular_file import require_file
from resvit_export.loading.weights.shards import shard_files

_LIBRARIES = ("timm", "torchvision", "transformers")
"""What builds networks by name, and is told apart by its version."""

if TYPE_CHECKING:
    from torch import nn

    from resvit_export.loading.load import Network


class NetworkSource:
    """The user's network, loaded once. What it is known by is found without loading it, wherever that can be trusted.

    Names, arguments and digests of files tell all of a network of this project, of timm, torchvision or Hugging Face,
    and of an exported one. A factory of the user's may read anything, in any way, and so may arguments that name files:
    such a network is loaded and traced, and known by its program and its record. So is ``module``, a network in memory;
    it is copied, and stays as it is. ``like`` is a source of the same architecture, which knows that already.

    Raises:
        ResvitError: where a file that the specification names does not exist, and as ``load_network``.
    """

    def __init__(
        self,
        spec: ModelSpec,
        module: nn.Module | None = None,
        reporter: Reporter = SILENT,
        like: NetworkSource | None = None,
    ) -> None:
        self.spec, self._module, self._reporter, self._like = spec, module, reporter, like
        self._network: Network | None = None
        self._named = model_identity(spec)
        if module is not None and like is None:
            self.network(reporter)

    @property
    def from_onnx(self) -> bool:
        """Whether the model came as ONNX, so that there is no PyTorch network."""
        return self.spec.model.endswith(".onnx")

    @functools.cached_property
    def identity(self) -> dict[str, Any]:
        """What the network is made from, and what came of it where that alone tells."""
        if self._like is not None:
            return {**self._named, "of": self._like.digest}
        if self._module is None and known_by_name(self.spec):
            return self._named
        network = self.network(self._reporter)
        record = {key: value for key, value in network.record().to_json().items() if key != "notes"}
        return {**self._named, "program": network.digest, "record": sha256_bytes(canonical_json(record))}

    @functools.cached_property
    def digest(self) -> str:
        """Digest of ``identity``."""
        return sha256_bytes(canonical_json(self.identity))

    @functools.cached_property
    def code(self) -> str:
        """Digest of the source files of the user's network: training runs them in ways that no program holds.

        Empty where names and versions tell that.
        """
        if self._module is None and known_by_name(self.spec):
            return ""
        module = self.network(self._reporter).module
        names = {type(part).__module__ for part in module.modules()} if module is not None else set()
        return sha256_bytes(canonical_json({name: digest_of_file(file) for name, file in user_files(*names).items()}))

    def network(self, reporter: Reporter) -> Network:
        """The network with its weights, as one exported program; raises as ``load_network``."""
        if self._network is None:
            from resvit_export.loading.libraries import quiet_libraries
            from resvit_export.loading.load import load_network, network_from_module
            from resvit_quantize.pruning.copies import copy_of

            with quiet_libraries():
                self._network = (
                    load_network(self.spec, reporter)
                    if self._module is None
                    else network_from_module(copy_of(self._module), self.spec, reporter)
                )
        return self._network

    def with_checkpoint(self, weights: Path) -> NetworkSource:
        """The same architecture with other weights."""
        spec = dataclasses.replace(self.spec, checkpoint=weights, checkpoint_key=None)
        return NetworkSource(spec, self._module, self._reporter, like=self)


def known_by_name(spec: ModelSpec) -> bool:
    """Whether names, arguments, versions and digests of files tell all that there is to know of a network.

    Of timm's and torchvision's builders only those with plain numbers: texts can name files of weights, and ``True``
    can ask for weights that lie in a cache.
    """
    head = spec.model.rpartition(":")[0]
    if spec.model.endswith((".onnx", ".pt2")) or spec.model.startswith("hf:") or head in ("resvit", "object"):
        return True
    library = head.partition(".")[0] in _LIBRARIES
    return library and not any(isinstance(value, str) or value is True for value in spec.model_args.values())


def model_identity(spec: ModelSpec) -> dict[str, Any]:
    """Names, arguments and digests of the files that the network is made from.

    Raises:
        ResvitError: where a file that the specification names does not exist.
    """
    identity: dict[str, Any] = {
        "model": spec.model,
        "arguments": dict(spec.model_args),
        "input_shape": list(spec.input_shape) if spec.input_shape else None,
        **({"sizes": spec.sizes.numbers()} if spec.sizes else {}),
        **({"shapes": [item.to_json() for item in spec.inputs]} if spec.inputs else {}),
        "checkpoint": _file_digest("checkpoint", spec.checkpoint) if spec.checkpoint else None,
        **({"checkpoint_key": spec.checkpoint_key} if spec.checkpoint_key else {}),
    }
    if spec.checkpoint and (shards := shard_files(spec.checkpoint)):
        identity["checkpoint_files"] = {name: sha256_file(file) for name, file in shards.items()}
    head, colon, factory = spec.model.rpartition(":")
    library = "transformers" if spec.model.startswith("hf:") else head.partition(".")[0]
    if library in _LIBRARIES:
        identity["version"] = _version(library)
    if spec.model.endswith((".onnx", ".pt2")):
        # The path may change and the model stay the same.
        identity["model"] = _file_digest("model", Path(spec.model))
        identity |= _weight_files(Path(spec.model))
    elif spec.model.startswith("hf:"):
        identity["files"] = _folder_digests(spec.model.removeprefix("hf:"))
    elif colon and head.endswith(".py"):
        identity["model"] = f"{_file_digest('model', expanded(head))}:{factory}"
    elif colon and head not in ("resvit", "timm", "object"):
        identity["source"] = _module_digest(head)
    return identity


def _folder_digests(reference: str) -> Mapping[str, str]:
    """Digests of a model's settings and weights, in a folder or in the hub's cache; none where it is in neither."""
    folder = expanded(reference)
    if not leads_to_folder(folder):
        try:
            from huggingface_hub import hf_hub_download

            # A repository in the cache becomes another when somebody fetches it again.
            folder = Path(hf_hub_download(reference, "config.json", local_files_only=True)).parent
        except (ImportError, OSError, ValueError):
            return {}  # the loader will say what is wrong
    kinds = (".json", ".safetensors", ".bin")
    return {path.name: sha256_file(path) for path in sorted(folder.glob("*")) if path.suffix in kinds}


def _version(library: str) -> str | None:
    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        return None


def metric_identity(metric: str | None) -> str | None:
    """Name of the user's metric and digest of the file or module that it is in; what that reads is seen as it runs."""
    if metric is None:
        return None
    place, _, name = metric.rpartition(":")
    return f"{_file_digest('metric', Path(place)) if place.endswith('.py') else _module_digest(place)}:{name}"


def _file_digest(what: str, path: Path) -> str:
    require_file(path, what, f"--{what}")
    return sha256_file(path)


def _weight_files(model: Path) -> dict[str, Any]:
    """Digests of the files beside an ONNX model that hold its weights, under the names that the model has for them."""
    if model.suffix != ".onnx":
        return {}
    from resvit_export.loading.weights.onnx_proto import external_files

    files = {name: sha256_file(file) for name, file in external_files(model).items()}
    return {"weight_files": files} if files else {}


def _module_digest(module: str) -> str | None:
    """Digest of a module's source file; ``None`` where it has none (the loader will say what is wrong)."""
    try:
        spec = importlib.util.find_spec(module)
    except (ImportError, ValueError, RuntimeError):
        return None  # the last where torchvision does not load its own operators (resvit_export.loading.libraries)
    if spec is None or spec.origin is None or not Path(spec.origin).is_file():
        return None
    return sha256_file(Path(spec.origin))
