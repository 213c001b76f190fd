"""What each kind of file says about itself, as plain JSON values; nothing in a file is ever executed."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from resvit_engines.errors import ExitCode, ResvitError, first_line

if TYPE_CHECKING:
    from resvit_engines.bundle.reader import OpenBundle
    from resvit_engines.keys.public import PublicKey

_BUFFERS = ("running_mean", "running_var", "num_batches_tracked")
# torch/_export/serde/schema.py, ScalarType
_PT2_DTYPES = {
    1: "uint8", 2: "int8", 3: "int16", 4: "int32", 5: "int64", 6: "float16", 7: "float32", 8: "float64",
    12: "bool", 13: "bfloat16", 28: "uint16", 29: "float8_e4m3fn", 30: "float8_e5m2",
}  # fmt: skip
_SAFETENSORS_DTYPES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2", "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8",
    "U8": "uint8", "BOOL": "bool",
}  # fmt: skip


def describe_checkpoint(path: Path) -> dict[str, Any]:
    """Describe a file of ``torch.save``, read with ``weights_only=True``. Raises ``ResvitError`` as reading does."""
    try:
        from resvit_export.loading.weights.file import read_checkpoint
        from resvit_export.loading.weights.places import PREFIXES, flattened, likely_place
    except ImportError as error:
        raise ResvitError(
            f"{path.name} is a PyTorch checkpoint, and PyTorch is not installed.",
            "pip install 'resvit-export[host]'",
            ExitCode.MISSING,
        ) from error
    flat = flattened(read_checkpoint(path), path)
    wrapper, weights, others = likely_place(flat)
    keys = flat.keys if wrapper else ()
    prefix = next((p for p in PREFIXES if all(key.startswith(p) for key in weights)), None)
    tensors = [
        {"name": name, "shape": list(tensor.shape), "dtype": str(tensor.dtype).removeprefix("torch.")}
        for name, tensor in weights.items()
    ]
    return {
        "kind": "checkpoint",
        "wrapper": wrapper or None,
        "prefix": prefix,
        "beside_the_weights": [key for key in keys if key != wrapper.partition(".")[0]],
        "other_weights": list(others),
        **_summary(tensors),
    }


def describe_safetensors(path: Path) -> dict[str, Any]:
    """Describe a safetensors file from its header. Raises ``ResvitError`` where it is damaged or truncated."""
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError as error:
        raise ResvitError(
            "Reading .safetensors needs the package safetensors, which is not installed.",
            "pip install 'resvit-export[host]'",
            ExitCode.MISSING,
        ) from error
    try:
        with safe_open(path, framework="numpy") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118  (not a mapping)
            tensors = [
                {
                    "name": name,
                    "shape": [int(dim) for dim in part.get_shape()],
                    "dtype": _SAFETENSORS_DTYPES.get(part.get_dtype(), part.get_dtype()),
                }
                for name, part in slices.items()
            ]
            metadata = dict(file.metadata() or {})
    except (SafetensorError, ValueError, OSError) as error:
        raise damaged(path, "a safetensors file", error) from error
    return {"kind": "safetensors", "metadata": metadata, **_summary(tensors)}


def describe_program(path: Path) -> dict[str, Any]:
    """Describe a ``.pt2`` from its JSON parts; neither its pickles nor its expressions are evaluated."""
    from resvit_export.loading.exported.archive import MODEL, open_archive
    from resvit_export.loading.exported.errors import NotAllowedError

    try:
        with open_archive(path) as archive:
            model = archive.json(MODEL)
            config = archive.json("data/weights/model_weights_config.json")
        graph = model["graph_module"]["graph"]
        values = graph["tensor_values"]
        specs = model["graph_module"]["signature"]["input_specs"]
        given = [spec["user_input"]["arg"]["as_tensor"]["name"] for spec in specs if "user_input" in spec]
        tensors = [_pt2_tensor(name, entry["tensor_meta"]) for name, entry in config["config"].items()]
        outputs = [output["as_tensor"]["name"] for output in graph["outputs"] if "as_tensor" in output]
        version = model.get("torch_version")
        return {
            "kind": "exported program",
            "torch": str(version) if version else None,
            "pickled_weights": [name for name, entry in config["config"].items() if entry.get("use_pickle")],
            "inputs": [_pt2_tensor(name, values[name]) for name in given],
            "outputs": [_pt2_tensor(name, values[name]) for name in outputs],
            "nodes": len(graph["nodes"]),
            "operators": counted(node["target"].removeprefix("torch.ops.") for node in graph["nodes"]),
            **_summary(tensors),
        }
    except (NotAllowedError, KeyError, TypeError, ValueError, AttributeError, OSError) as error:
        raise damaged(path, "an exported program of torch 2.8 or later", error) from error


def describe_engine(path: Path) -> dict[str, Any]:
    """Describe an engine from its first bytes and the record beside it; it is never deserialised."""
    from resvit_engines.bundle.engine_file import describe_engine_file

    description = describe_engine_file(path)
    if description.format == "unknown":
        raise damaged(path, "a TensorRT engine", "its first bytes are not those of one")
    if description.sidecar_matches is False:
        raise ResvitError(
            f"{path} is not the engine that {description.sidecar} describes: their digests differ.",
            "Copy both files again from the run folder, or build the engine again.",
        )
    return {"kind": "engine", **description.to_json()}


def describe_bundle(path: Path, trust: Path | None = None) -> dict[str, Any]:
    """Describe a bundle after checking the digest of every file in it, and its signature by the keys of ``trust``.

    ``signature`` is ``verified``, ``not verified`` or ``unsigned``, with the reason in ``signature_note``;
    ``signed_by`` holds the id of the key whose signature was verified, and no other. What the manifest says, whatever
    it calls it, changes none of these: of fields that this version does not know, ``other`` has the names alone.
    """
    from resvit_engines.bundle.reader import opened_bundle

    with opened_bundle(path) as bundle:
        manifest = bundle.manifest()
        bundle.check(manifest)
        key, note = _signer_of(bundle, path.name, trust)
    state = "verified" if key else "unsigned" if bundle.envelope is None else "not verified"
    found = {"signature": state, "signed_by": [key.keyid] if key else [], "signature_note": note}
    known = dataclasses.replace(manifest, other={}).to_json()
    other = {"other": sorted(manifest.other)} if manifest.other else {}
    return {"kind": "bundle", "whole": True, **found, **known, **other}


def _signer_of(bundle: OpenBundle, name: str, trust: Path | None) -> tuple[PublicKey | None, str]:
    """The key whose signature over the manifest was verified, or None, and why in words."""
    from resvit_engines.keys.public import load_trust
    from resvit_engines.keys.signing import require_signature

    if bundle.envelope is None:
        return None, "nobody signed it"
    try:
        key = require_signature(bundle.head, bundle.envelope, load_trust(trust), name)
    except ResvitError as error:
        return None, error.problem
    return key, f"by {key.name}" + (f", a key that is good until {key.expires}" if key.expires else "")


def damaged(path: Path, what: str, why: object) -> ResvitError:
    """Say that a file looks like ``what`` and cannot be read as one."""
    first = first_line(why)
    return ResvitError(
        f"{path} cannot be read as {what} ({path.stat().st_size:,} bytes): {first}",
        "The file is truncated, damaged or of another kind; copy it again or write it anew.",
    )


def _summary(tensors: list[dict[str, Any]]) -> dict[str, Any]:
    per_dtype: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    parameters = 0
    for tensor in tensors:
        values = math.prod(dim for dim in tensor["shape"] if isinstance(dim, int))
        per_dtype[tensor["dtype"]][0] += 1
        per_dtype[tensor["dtype"]][1] += values
        if not tensor["name"].endswith(_BUFFERS):
            parameters += values
    return {
        "parameters": parameters,
        "dtypes": [{"dtype": dtype, "tensors": n, "values": v} for dtype, (n, v) in sorted(per_dtype.items())],
        "tensors": tensors,
    }


def counted(names: Iterable[str]) -> dict[str, int]:
    """Count names, the most frequent first."""
    return dict(sorted(Counter(names).items(), key=lambda item: (-item[1], item[0])))


def _pt2_tensor(name: str, meta: Mapping[str, Any]) -> dict[str, Any]:
    sizes = [size.get("as_int") for size in meta["sizes"][:64]]
    dims = [size if type(size) is int and 0 <= size < 2**63 else "dynamic" for size in sizes]
    return {"name": name, "shape": dims, "dtype": _PT2_DTYPES.get(meta["dtype"], f"type {meta['dtype']}")}
