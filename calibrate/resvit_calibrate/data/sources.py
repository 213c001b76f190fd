"""Opening what the user named as data: a folder of one of many kinds, a file, a name, or a factory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from resvit_calibrate.data.classified import pools_of_folders, pools_of_lists, pools_of_one_list
from resvit_calibrate.data.libraries import pools_of_tables
from resvit_calibrate.data.naming import KINDS, Kind, existing, is_factory, kind_of_folder, require_source, split_kind
from resvit_calibrate.images.pixels import ArrayPixels, FilePixels, Pixels
from resvit_calibrate.images.targets import AS_USUAL, TargetOptions
from resvit_calibrate.readers import depth, fashion_mnist, masks
from resvit_calibrate.readers.boxes.coco import (
    annotation_files,
    open_coco,
    open_coco_masks,
    open_panoptic,
    unused_files,
)
from resvit_calibrate.readers.boxes.panoptic import panoptic_file
from resvit_calibrate.readers.boxes.table import with_classes_of_both
from resvit_calibrate.readers.boxes.voc import pixels_from_voc, voc_parts
from resvit_calibrate.readers.boxes.yolo import yolo_file, yolo_from_file, yolo_from_folder
from resvit_calibrate.readers.folders import note_of_unused, split_folders
from resvit_calibrate.readers.foreign.celeba import refuse_celeba
from resvit_calibrate.readers.hugging_face.places import ENDINGS as TABLES
from resvit_calibrate.readers.labelled.formats import ENDINGS as LABELS
from resvit_calibrate.readers.labelled.formats import is_labels, labels_of, notes_of_others, open_labels
from resvit_calibrate.readers.layouts import Layout, layouts_in, unused_parts
from resvit_calibrate.readers.lists.classes import pixels_from_names
from resvit_calibrate.readers.lists.kinds import says
from resvit_calibrate.readers.lists.rows import ENDINGS as LISTS
from resvit_calibrate.readers.npz import pixels_from_npz
from resvit_calibrate.readers.paired import IMAGES, Part
from resvit_calibrate.readers.shards import named_shards, pixels_from_shards, shards_in
from resvit_calibrate.readers.texts import pixels_from_list, pixels_from_texts_beside, text_lists
from resvit_calibrate.readers.torchvision_sets import pixels_from_torchvision
from resvit_calibrate.readers.user.kept_stream import MOST
from resvit_calibrate.readers.user.loader import Factory, factory_from
from resvit_calibrate.readers.video.container import format_of
from resvit_calibrate.readers.video.film import named_films, pixels_from_films
from resvit_calibrate.readers.video.frames import pixels_from_frames
from resvit_engines.errors import ResvitError
from resvit_engines.progress import SILENT, Reporter


@dataclass(frozen=True)
class Pools:
    """Where images can be taken from; ``validation`` is None where both sides share one pool."""

    calibration: Pixels
    validation: Pixels | None


def open_source(
    data: str,
    options: TargetOptions,
    objects: Mapping[str, Any] | None = None,
    reporter: Reporter = SILENT,
    most: int = MOST,
) -> Pools | Factory:
    """Open what the user named, without reading any image but those of films and of data sets that are objects.

    ``objects`` are data sets in memory, by the names that stand for them. Of a stream of pictures the first ``most``
    are taken.

    Raises ``ResvitError`` for what does not exist, cannot be used, or could be two kinds of data.
    """
    if (factory := _factory(data, options, objects)) is not None:
        return Pools(*factory.pictures(most, reporter)) if factory.gives_pictures() else factory
    if data == "fashion-mnist":
        train, test = (
            ArrayPixels(f"fashion-mnist ({split})", *fashion_mnist.read_split(split), fashion_mnist.CLASS_NAMES)
            for split in fashion_mnist.SPLITS
        )
        return Pools(train, test)
    kind, text = split_kind(data)
    if kind == "hf-dataset":
        return Pools(*pools_of_tables(text))
    if kind == "torchvision":
        return Pools(*pixels_from_torchvision(text))
    path = existing(text)
    if kind in (None, "tar") and not (path is not None and path.is_dir()) and (shards := named_shards(text)):
        require_source(data)
        return Pools(pixels_from_shards(shards, Path(text).name), None)
    if path is not None and path.is_dir():
        return _folder_pools(path, kind, options, reporter)
    labels = labels_of(path) if path is not None and kind is None and path.suffix.lower() in LABELS else kind
    if path is not None and is_labels(labels):
        return Pools(*open_labels(path, labels, options))
    if path is not None and (kind == "coco" or (kind is None and path.suffix.lower() == ".json")):
        return Pools(_coco(path, options), None)
    if path is not None and kind == "masks" and path.suffix.lower() == ".json":
        return Pools(open_panoptic(path, options) if panoptic_file(path) else open_coco_masks(path, options), None)
    if path is not None and (kind in ("csv", "text") or (kind is None and path.suffix.lower() in LISTS)):
        return _listed_pools(path, kind)
    if path is not None and kind is None and path.suffix.lower() in TABLES:
        return Pools(*pools_of_tables(data))
    if path is not None and (kind == "video" or (kind is None and format_of(path) is not None)):
        return Pools(pixels_from_films((path,), path.name, reporter), None)
    if path is not None and path.suffix.lower() in (".yaml", ".yml"):
        return Pools(*yolo_from_file(path))
    if path is not None and kind is None and path.suffix != ".py":
        return Pools(*pixels_from_npz(path, options))
    if kind is not None:
        what = "is a file, not a folder" if path is not None else "does not exist"
        raise ResvitError(f"The data {text!r} {what}.", KINDS)
    what = "is a Python file without a function" if path is not None else "does not exist"
    raise ResvitError(f"The data {data!r} {what}.", KINDS)


def gives_prepared(data: str, objects: Mapping[str, Any] | None = None) -> bool:
    """Whether ``data`` is the network's input already, as a function or an object gives it; calls the function."""
    factory = _factory(data, AS_USUAL, objects)
    return factory is not None and not factory.gives_pictures()


def _factory(data: str, options: TargetOptions, objects: Mapping[str, Any] | None) -> Factory | None:
    if objects and data in objects:
        return Factory(data, lambda: objects[data], options)
    return factory_from(data, options) if is_factory(data) else None


def _folder_pools(root: Path, kind: Kind | None, options: TargetOptions, reporter: Reporter) -> Pools:
    """The pictures of a folder, with what other formats lie there where nobody said which to take."""
    if kind is not None:
        return _pools_of_kind(root, kind, options, reporter, told=True)
    kind = kind_of_folder(root)
    pools = _pools_of_kind(root, kind, options, reporter, told=False)
    if kind in ("coco", "yolo", "voc", "masks", "csv", "text") or is_labels(kind):
        pools.calibration.notes += notes_of_others(root, kind)
    return pools


def _pools_of_kind(root: Path, kind: Kind, options: TargetOptions, reporter: Reporter, *, told: bool) -> Pools:
    if is_labels(kind):
        return Pools(*open_labels(root, kind, options))
    if kind == "coco":
        return _coco_pools(root, options, any_name=told)
    if kind == "text":
        return _text_pools(root)
    if kind == "yolo":
        described = yolo_file(root)
        return Pools(*(yolo_from_file(described) if described is not None else yolo_from_folder(root)))
    if kind == "folder":
        return Pools(*pools_of_folders(root, told=told))
    if kind == "csv":
        refuse_celeba(root)
        return Pools(*pools_of_lists(root))
    if kind == "tar":
        return _shard_pools(root)
    if kind == "hf-dataset":
        return Pools(*pools_of_tables(str(root)))
    if kind == "video":
        return Pools(pixels_from_films(named_films(root), root.name, reporter), None)
    if kind == "frames":
        return Pools(pixels_from_frames(root, reporter), None)
    if kind == "voc":
        return _voc_pools(root)
    layout = _layout_of(root, kind)
    pools = [_paired(part, layout, root, options) for part in layout.parts]
    if len(pools) > 1:
        pools[0].notes += unused_parts(layout, root)
    return Pools(pools[0], pools[1] if len(pools) > 1 else None)


def _coco_pools(root: Path, options: TargetOptions, *, any_name: bool) -> Pools:
    found = annotation_files(root, any_name=any_name)
    if found is None:
        raise ResvitError(
            f"{root} holds no annotations.json, no instances_*.json and no panoptic_*.json.",
            "Name the file itself: `coco:FILE.json`.",
        )
    train = _coco(found[0], options)
    if found[1] is None:
        return Pools(train, None)
    train.notes += unused_files(root, (found[0], found[1]))
    return Pools(train, _coco(found[1], options))


def _coco(path: Path, options: TargetOptions) -> Pixels:
    if panoptic_file(path):
        return open_panoptic(path, options)
    return open_coco_masks(path, options) if options.outlines else open_coco(path)


def _voc_pools(root: Path) -> Pools:
    """The pictures of VOC's XML files; classes that occur in one part alone are classes of both."""
    beside = () if any(layout.kind == "voc" for layout in layouts_in(root)) else voc_parts(root)
    layout = None if beside else _layout_of(root, "voc")
    pools = [pixels_from_voc(part) for part in (layout.parts if layout is not None else beside)]
    if len(pools) == 1:
        return Pools(pools[0], None)
    pools[0].notes += (
        unused_parts(layout, root) if layout is not None else note_of_unused(root, [part.root.name for part in beside])
    )
    return Pools(*with_classes_of_both(*pools))


def _listed_pools(path: Path, kind: Kind | None) -> Pools:
    """Pictures by one list: a class or a text each, or their names alone, as the user or its lines say."""
    refuse_celeba(path)
    said = (kind,) if kind is not None else says(path)
    if len(said) > 1:
        raise ResvitError(
            f"{path} gives each picture a word, and nothing says whether that is its class or what is written in it.",
            f"Say which: `csv:{path}` for classes, `text:{path}` for texts.",
        )
    if "csv" in said:
        return Pools(*pools_of_one_list(path))
    return Pools(pixels_from_names(path) if "names" in said else pixels_from_list(path), None)


def _shard_pools(root: Path) -> Pools:
    """The tar files of a folder, in two parts where names or folders say so."""
    first, second = shards_in(root)
    if not first:
        raise ResvitError(f"{root} has no tar files.", "Name the files themselves: `tar:data/train-{0000..0007}.tar`.")
    train = pixels_from_shards(first, f"{root.name} ({len(first)} shards)")
    if not second:
        return Pools(train, None)
    left = [path.name for path in sorted(root.glob("*.tar")) if path not in (*first, *second)]
    train.notes += note_of_unused(
        root, ["its shards of both parts"], ["its shards of both parts", *left] if left else ()
    )
    return Pools(train, pixels_from_shards(second, f"{root.name} ({len(second)} shards to validate with)"))


def _text_pools(root: Path) -> Pools:
    """Pictures with a list, or two, of their texts, or with texts beside them."""
    lists = text_lists(root)
    halves = split_folders(root)
    if not lists:
        pools = [pixels_from_texts_beside(part) for part in halves or (root,)]
    else:
        pools = [pixels_from_list(path) for path in lists]
    if len(pools) == 1:
        return Pools(pools[0], None)
    if halves is not None:
        pools[0].notes += note_of_unused(root, [part.name for part in halves])
    return Pools(pools[0], pools[1])


def _layout_of(root: Path, kind: Kind) -> Layout:
    """The folder's layout of one kind; raises ``ResvitError`` where it has none, or several."""
    found = [layout for layout in layouts_in(root, told=True) if layout.kind == kind]
    if not found:
        about, pictures = {"voc": "Annotations"}.get(kind, kind), (root / IMAGES).is_dir()
        raise ResvitError(
            f"{root} has no folder {about if pictures else IMAGES}.",
            f"Put pictures into {root / IMAGES} and files of the same names into {root / about}.",
        )
    if len(found) > 1:
        raise ResvitError(
            f"{root} has several folders of {kind}: {'; '.join(layout.words for layout in found)}.",
            "Move those away that are not meant.",
        )
    return found[0]


def _paired(part: Part, layout: Layout, root: Path, options: TargetOptions) -> FilePixels:
    if layout.kind == "depth":
        return depth.pixels_from_depth(part, options)
    pixels = masks.pixels_from_masks(part, options, root)
    numbering, said = layout.numbering, len(pixels.class_names) or options.classes
    if numbering is None or (said is not None and said > max(numbering.moved.values()) + 1):  # the values themselves
        return pixels
    pixels.moved = numbering.moved
    pixels.notes = (*pixels.notes, f"the values of {root} are {numbering.said}")
    if numbering.names and not pixels.class_names:
        pixels.class_names, pixels.num_classes = numbering.names, len(numbering.names)
    return pixels
