"""Sample inputs: nothing here needs them, and an archive in which they are no tensors is not one of a network."""

from __future__ import annotations

import io
import pickletools
import re
import zipfile

from resvit_export.loading.exported.errors import NotAllowedError, quoted

_PLAIN = re.compile(
    r"torch(\.storage)? (\w+Storage|bfloat16|device|Size)|torch\._utils _rebuild_(tensor|tensor_v2|parameter)"
    r"|torch\.nn\.parameter Parameter|collections OrderedDict|torch\._export\.serde\.serialize _reconstruct_fake_tensor"
    r"|_codecs encode"
)
_LIMIT = 64 << 20  # bytes of the pickle, which holds no values of tensors


def require_plain_samples(data: bytes) -> None:
    """Refuse sample inputs whose pickle names anything but tensors; nothing of it is unpickled."""
    if not data:
        return
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as file:
            (info,) = [info for info in file.infolist() if info.filename.partition("/")[2] == "data.pkl"]
            if info.file_size > _LIMIT:
                raise ValueError(f"{info.file_size:,} bytes")
            operations = list(pickletools.genops(file.read(info)))
    except Exception as error:  # a damaged pickle makes pickletools raise whatever it meets
        raise NotAllowedError(f"its sample inputs are pickled objects: {quoted(str(error))}") from error
    for operation, argument, _ in operations:
        if operation.name in ("STACK_GLOBAL", "INST", "EXT1", "EXT2", "EXT4"):
            raise NotAllowedError(f"its sample inputs are pickled objects: {operation.name}")
        if operation.name == "GLOBAL" and not _PLAIN.fullmatch(str(argument)):
            raise NotAllowedError(f"its sample inputs are pickled objects: {quoted(argument)}")
