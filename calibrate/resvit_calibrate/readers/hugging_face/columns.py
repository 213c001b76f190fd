"""Which column of a table holds the pictures and which their classes, by the features that the data set describes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeGuard

from resvit_calibrate.readers.hugging_face.reference import Wanted
from resvit_calibrate.readers.paired import shortened
from resvit_engines.errors import ResvitError
from resvit_engines.outside import json_from_outside

if TYPE_CHECKING:
    import pyarrow as pa

_IMAGE_NAMES = ("image", "img", "picture", "photo", "jpg", "png", "webp", "pixel_values")
_LABEL_NAMES = ("label", "labels", "class", "class_id", "category", "target", "y", "cls")
_CAST = "Store pictures as such: `dataset.cast_column('image', datasets.Image())`, then `save_to_disk`."
_BOX_KEYS = ("bbox", "bboxes", "boxes", "box")
_CATEGORY_KEYS = ("category", "categories", "category_id", "label", "labels", "class", "classes")
_DEEP = 8
_TARGETS = ("objects", "bbox", "boxes", "annotation", "mask")


@dataclass(frozen=True)
class Columns:
    """The columns that are read. ``names`` are the classes by number; empty where numbers or texts stand alone.

    ``objects`` is the column of boxes, where it is read, and ``object_keys`` what its boxes and categories are called.
    """

    image: str
    label: str | None
    names: tuple[str, ...]
    notes: tuple[str, ...]
    objects: str | None = None
    object_keys: tuple[str, str] = ("", "")


def columns_of(schema: pa.Schema, wanted: Wanted) -> Columns:
    """Choose them: as the user says, else by the features, else by usual names and types.

    Raises ``ResvitError`` where there is none, or could be several, with all that there are.
    """
    features = _features(schema)
    kinds = {field.name: _kind(field, features) for field in schema}
    told = ", ".join(f"{name} ({kind})" for name, kind in kinds.items())
    where = wanted.where
    for column in filter(None, (wanted.image, wanted.label)):
        if column not in kinds:
            raise ResvitError(f"{where} has no column {column!r}.", f"It has: {told}.")
    image = wanted.image or _only(
        [name for name, kind in kinds.items() if kind == "pictures"], _IMAGE_NAMES, "image", wanted, told
    )
    if image is None:
        raise ResvitError(f"{where} has no column of pictures; it has: {told}.", _CAST)
    if kinds[image] != "pictures":
        raise ResvitError(f"The column {image!r} of {where} holds {kinds[image]}, and no pictures.", _CAST)
    label = wanted.label or _label(kinds, wanted, told)
    found = _objects(schema) if label is None else None
    if found is not None:
        objects, keys = found
        left = [name for name in kinds if name not in (image, objects)]
        note = f"of {where} the column {image!r} is read with the boxes of {objects!r}" + (
            f"; {shortened(left)} not" if left else ""
        )
        return Columns(image, None, _names_within(features.get(objects), keys[1]), (note,), objects, keys)
    if label is not None and not kinds[label].startswith(("classes", "whole numbers", "numbers", "texts")):
        raise ResvitError(
            f"The column {label!r} of {where} holds {kinds[label]}, and no class for each picture.",
            f"Choose another with `label=`; there are: {told}.",
        )
    unread = [name for name in kinds if name not in (image, label)]
    notes = [f"of {where} the column {image!r} is read" + (f" with its classes {label!r}" if label else "")]
    if unread:
        notes[0] += f"; {shortened(unread)} not"
    about = [name for name in unread if name.lower() in (*_TARGETS, *_LABEL_NAMES)]
    if about and label is None:
        about = [f"{name}: {kinds[name]}" for name in about]
        notes.append(
            f"{where} says more of its pictures ({shortened(about)}), which is not read: nothing is known here"
        )
    names = features.get(label or "", {}).get("names")
    return Columns(image, label, tuple(names) if _are_names(names) else (), tuple(notes))


def _objects(schema: pa.Schema) -> tuple[str, tuple[str, str]] | None:
    """The column of objects with boxes and categories, and what these are called there."""
    import pyarrow as pa

    for field in schema:
        kind = field.type
        if pa.types.is_list(kind) or pa.types.is_large_list(kind):
            kind = kind.value_type
        if not pa.types.is_struct(kind):
            continue
        inside = [kind.field(place).name for place in range(kind.num_fields)]
        boxes = next((key for key in _BOX_KEYS if key in inside), None)
        category = next((key for key in _CATEGORY_KEYS if key in inside), None)
        if boxes is not None and category is not None:
            return field.name, (boxes, category)
    return None


def _names_within(feature: Any, key: str, depth: int = 0) -> tuple[str, ...]:
    """Names of the classes of ``key``, wherever the feature has them."""
    if not isinstance(feature, (dict, list)) or depth > _DEEP:
        return ()
    if isinstance(feature, list):
        return next((found for item in feature if (found := _names_within(item, key, depth + 1))), ())
    own = feature.get(key)
    inner = own.get("feature", own) if isinstance(own, dict) else None
    names = inner.get("names") if isinstance(inner, dict) else None
    if _are_names(names):
        return tuple(names)
    return next((found for item in feature.values() if (found := _names_within(item, key, depth + 1))), ())


def _label(kinds: dict[str, str], wanted: Wanted, told: str) -> str | None:
    classes = [name for name, kind in kinds.items() if kind.startswith("classes")]
    if classes:
        return _only(classes, _LABEL_NAMES, "label", wanted, told)
    for fitting in (("whole numbers", "texts"), ("numbers",)):
        named = [
            name
            for name, kind in kinds.items()
            if kind.startswith(fitting) and (name.lower() in _LABEL_NAMES or name.lower()[-6:] == "_label")
        ]
        if named:
            return _only(named, _LABEL_NAMES, "label", wanted, told)
    return None


def _only(found: list[str], usual: tuple[str, ...], key: str, wanted: Wanted, told: str) -> str | None:
    """The one column, or the one of several with the most usual name; asks where that does not tell."""
    if len(found) < 2:
        return found[0] if found else None
    called = [name for name in found if name.lower() == usual[0]]
    if len(called) == 1:
        return called[0]
    raise ResvitError(
        f"{' and '.join(found)} of {wanted.where} could each be the {key}; there are: {told}.",
        f"Say which: `{wanted.saying(**{key: found[0]})}`.",
    )


def _features(schema: pa.Schema) -> dict[str, dict[str, Any]]:
    """What the data set says of its columns; empty where it says nothing."""
    said = (schema.metadata or {}).get(b"huggingface")
    if said is None:
        return {}
    document = json_from_outside(said, "what the data set says of its columns")
    info = document.get("info") if isinstance(document, dict) else None
    features = info.get("features") if isinstance(info, dict) else None
    if not isinstance(features, dict):
        return {}
    return {name: feature for name, feature in features.items() if isinstance(feature, dict)}


def _kind(field: pa.Field, features: dict[str, dict[str, Any]]) -> str:
    """What a column holds, in words; ``pictures`` where that is what it can be read as."""
    import pyarrow as pa

    kind = field.type.value_type if pa.types.is_dictionary(field.type) else field.type
    said = features.get(field.name, {})
    if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
        binary = kind.field("bytes").type
        return "pictures" if _is_binary(binary) and said.get("_type", "Image") == "Image" else "sounds or other files"
    if _is_binary(kind):
        return "pictures" if said.get("_type", "Image") == "Image" else "bytes"
    if pa.types.is_integer(kind) or pa.types.is_boolean(kind):
        names = said.get("names")
        return f"classes, {len(names)} by name" if _are_names(names) else "whole numbers"
    if pa.types.is_floating(kind):
        return "numbers"
    if pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind):
        return "texts"
    return str(said.get("_type") or kind)[:60]


def _is_binary(kind: pa.DataType) -> bool:
    import pyarrow as pa

    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind))


def _are_names(names: Any) -> TypeGuard[list[str]]:
    return isinstance(names, list) and bool(names) and all(isinstance(name, str) for name in names)
