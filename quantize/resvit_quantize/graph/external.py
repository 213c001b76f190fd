"""Graphs whose weights are too large for one file: they lie beside it, and its bytes say which they are."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir

from resvit_engines.files import atomic_file, sha256_file

EXTERNAL_ABOVE = 512 << 20
"""Bytes of weights above which they go into a second file. Protobuf ends at 2 GiB, and whoever reads or writes a model
in one file holds several copies of it; what lies beside is read by page."""
_SMALL = 256
"""Bytes of what stays in the model: shapes and other constants, where shape inference can read them."""
_DIGEST = "weights_sha256"


def weight_bytes(model: ir.Model) -> int:
    """Bytes of all weights of a graph."""
    return sum(v.const_value.nbytes for v in model.graph.initializers.values() if v.const_value is not None)


def weight_folder(model: ir.Model) -> Path | None:
    """The folder of the file that a graph's weights are read from where they are needed; None where it holds all."""
    tensors = (value.const_value for value in model.graph.initializers.values())
    return next((Path(tensor.base_dir) for tensor in tensors if isinstance(tensor, ir.ExternalTensor)), None)


def write_onnx(model: ir.Model, path: Path, external_above: int = EXTERNAL_ABOVE) -> None:
    """Write ``model``, a whole file or none: the same graph gives the same bytes, and another weight gives others.

    Weights above ``external_above`` bytes in all go into ``<name>.data`` beside it, whose digest the model holds.
    """
    ir.external_data.load_to_model(model)  # what was read from elsewhere does not lie beside this file
    model.metadata_props.pop(_DIGEST, None)
    if weight_bytes(model) > external_above:
        data = path.with_name(f"{path.name}.data")
        named = [(v, v.const_value) for v in model.graph.initializers.values() if v.const_value is not None]
        large = [(value, tensor) for value, tensor in named if tensor.nbytes > _SMALL]
        with atomic_file(data) as partial:
            # The bytes go into the partial file, and the model refers to the final name.
            written = ir.external_data.convert_tensors_to_external(
                [tensor for _, tensor in large], base_dir=partial.parent, relative_path=partial.name
            )
        for (value, _), tensor in zip(large, written, strict=True):
            value.const_value = ir.ExternalTensor(
                data.name,
                tensor.offset,
                tensor.length,
                tensor.dtype,
                shape=tensor.shape,
                name=str(value.name),
                base_dir=path.parent,
            )
        model.metadata_props[_DIGEST] = sha256_file(data)
    proto = ir.serde.serialize_model(model)
    with atomic_file(path) as partial:
        partial.write_bytes(proto.SerializeToString(deterministic=True))
