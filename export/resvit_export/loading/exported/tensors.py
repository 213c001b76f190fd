"""Weights and constants: bytes of the archive, seen as their records say."""

from __future__ import annotations

import math
import re
from typing import Any

import torch
from torch._export.serde import schema
from torch._export.serde.serialize import _SERIALIZE_TO_TORCH_DTYPE

from resvit_export.loading.exported.archive import TENSOR_FILES, Archive
from resvit_export.loading.exported.errors import NotAllowedError, quoted
from resvit_export.loading.exported.records import payload_record

_EXPANDED_LIMIT = 1 << 26
"""Elements that tensors may have together beyond those that are stored: repeated by a stride of 0."""


def tensors_in(archive: Archive, kind: str) -> dict[str, torch.Tensor]:
    """The ``weights`` or ``constants`` by their paths, on the CPU; tensors that share bytes share them here too.

    Raises ``NotAllowedError`` where one is pickled, of an unknown type, or reaches beyond the bytes that are there.
    """
    records = payload_record(archive.json(f"data/{kind}/model_{kind}_config.json"))
    storages: dict[str, torch.Tensor] = {}
    tensors: dict[str, torch.Tensor] = {}
    stored = elements = 0
    for path, record in records.items():
        meta = record.tensor_meta
        if record.use_pickle or meta is None or not re.fullmatch(rf"{TENSOR_FILES[kind]}_\d+", record.path_name):
            raise NotAllowedError(f"{quoted(path)} is pickled, an object of a class of its own")
        if record.path_name not in storages:
            storages[record.path_name] = _storage(archive, f"data/{kind}/{record.path_name}")
            stored += storages[record.path_name].numel()
        tensor = _tensor(path, storages[record.path_name], meta)
        elements += tensor.numel()
        if elements > stored + _EXPANDED_LIMIT:
            raise NotAllowedError(f"{quoted(path)} repeats its values too often")
        floating = tensor.is_floating_point() or tensor.is_complex()
        gradient = meta.requires_grad and floating
        tensors[path] = torch.nn.Parameter(tensor, requires_grad=gradient) if record.is_param else tensor
    return tensors


def _storage(archive: Archive, name: str) -> torch.Tensor:
    """A member as uint8 [bytes]."""
    storage = torch.empty(archive.size(name), dtype=torch.uint8)
    archive.fill(name, storage.numpy().data)
    return storage


def _tensor(path: str, storage: torch.Tensor, meta: schema.TensorMeta) -> torch.Tensor:
    dtype: Any = _SERIALIZE_TO_TORCH_DTYPE.get(meta.dtype)
    if dtype is None:
        raise NotAllowedError(f"{quoted(path)} is of the type {quoted(meta.dtype)}")
    sizes, strides = _integers(path, meta.sizes), _integers(path, meta.strides)
    (offset,) = _integers(path, [meta.storage_offset])
    whole = storage.numel() - storage.numel() % dtype.itemsize
    reach = offset + 1 + sum((size - 1) * stride for size, stride in zip(sizes, strides, strict=False))
    empty = 0 in sizes
    if len(sizes) != len(strides) or len(sizes) > 64 or whole != storage.numel():
        raise NotAllowedError(f"{quoted(path)} is not laid out as a tensor")
    if (offset if empty else reach) > whole // dtype.itemsize:
        raise NotAllowedError(f"{quoted(path)} reaches beyond its bytes")
    if math.prod(size for size in sizes if size) >= 2**62:
        raise NotAllowedError(f"{quoted(path)} repeats its values too often")
    if dtype is torch.bool and bool((storage > 1).any()):
        raise NotAllowedError(f"{quoted(path)} holds truth values that are neither")
    flat = storage.view(dtype) if storage.numel() else torch.empty(0, dtype=dtype)
    return flat.as_strided(sizes, strides, offset)


def _integers(path: str, values: list[schema.SymInt]) -> list[int]:
    found = [value.as_int if value.type == "as_int" else -1 for value in values]
    if any(not 0 <= value < 2**62 for value in found):
        raise NotAllowedError(f"{quoted(path)} has a size that is none")
    return found
