"""DeepStream's ``config_infer_primary.txt`` (Gst-nvinfer), computed from the manifest, and the parser of its outputs.

nvinfer prepares y = net-scale-factor * (x - offset) of pixels 0 to 255, after scaling the whole frame. What of the
manifest's preprocessing that cannot say is refused.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from resvit_engines.answers.boxes import BoxReader, DetectionOptions
from resvit_engines.answers.maps import SegmentationOptions, masks_name
from resvit_engines.answers.options import options_from
from resvit_engines.answers.vectors import OUTPUT
from resvit_engines.errors import ExitCode, ResvitError
from resvit_engines.pictures.preprocess import PicturePreprocess
from resvit_engines.trt.io_tensor import IoTensor
from resvit_export.serve.subject import ENGINE, FILES, Subject

CONFIG = "config_infer_primary.txt"
LIBRARY = "libresvit_parser.so"
_NETWORK_TYPES = {"detection": 0, "classification": 1, "segmentation": 2}
_PARSERS = {
    "detection": ("parse-bbox-func-name", "NvDsInferParseResvitBoxes"),
    "classification": ("parse-classifier-func-name", "NvDsInferParseResvitClasses"),
    "segmentation": ("parse-segmentation-func-name", "NvDsInferParseResvitMasks"),
}
_FILTERS = {"nearest": 0, "bilinear": 1, "bicubic": 1, "lanczos": 1}
"""nvinfer's scaling-filter; the others mean something else on a GPU than on a Jetson's VIC."""
_NO_CLUSTERING = 4
_BEFORE_NMS = 1000
_ROUNDING = 1e-5
"""By how much of themselves deviations may differ and count as one."""
_OTHERWISE = "Serve it by Triton, whose repository prepares frames exactly, or by resvit_engines.load in a program."


@dataclass(frozen=True)
class Scaling:
    """What nvinfer is told of the preprocessing: y = ``factor`` * (x - ``offsets``), colours, and how frames fit."""

    factor: float
    offsets: tuple[float, ...]
    colours: int
    keep_aspect: bool
    symmetric: bool
    filter: int


def scaling_of(how: PicturePreprocess) -> Scaling:
    """What nvinfer is told, so that it prepares frames as the manifest says.

    Raises:
        ResvitError: IMPOSSIBLE where it cannot: different deviations, cut frames, a padding that is not black.
    """
    if max(how.std) - min(how.std) > _ROUNDING * max(how.std):
        raise _impossible(
            f"The channels have the deviations {', '.join(f'{one:g}' for one in how.std)}, and DeepStream has one "
            "net-scale-factor for all.",
            "Train or build with one deviation for all channels (--preprocess std=0.226).",
        )
    if how.resize == "crop":
        raise _impossible(
            "Frames are cut in the middle, and DeepStream scales whole frames.",
            "Build with --preprocess resize=stretch or letterbox, and look at the verdict.",
        )
    if how.resize == "letterbox" and any(how.pad_value):
        raise _impossible(
            f"Frames are padded with {', '.join(f'{one:g}' for one in how.pad_value)}, and DeepStream pads with black.",
            "Build with --preprocess pad_value=0, and look at the verdict.",
        )
    if how.channels not in (1, 3):
        raise _impossible(
            f"The network reads {how.channels} channels, and DeepStream gives colour or grey.", "Feed it by a program."
        )
    colours = 2 if how.channels == 1 else int(how.channel_order == "bgr")
    letterbox = how.resize == "letterbox"
    return Scaling(
        factor=1.0 / (255.0 * how.std[0]),
        offsets=tuple(255.0 * mean for mean in how.mean),
        colours=colours,
        keep_aspect=letterbox,
        symmetric=letterbox and how.padding == "centre",
        filter=_FILTERS[how.interpolation],
    )


def write_pipeline(subject: Subject, folder: Path) -> list[str]:
    """Write the configuration, labels, parser and engine into the empty ``folder``; returns what there is to know.

    Raises:
        ResvitError: IMPOSSIBLE for a task that DeepStream does not know, a preprocessing that it cannot do, outputs
            that are not FP32, or a bundle without an engine.
    """
    task = subject.reading.task
    if task not in _NETWORK_TYPES:
        raise _impossible(
            f"The task is {task}, and DeepStream knows classes, boxes and masks.", "Call it by a program of your own."
        )
    if subject.image.encoding is not None:  # and what reads more than images is refused
        raise _impossible(
            f"The engine reads {subject.image.dtype}, and nvinfer gives floats.", "Build it without --input-type."
        )
    engine, scaling = subject.require_engine("DeepStream"), scaling_of(subject.preprocess)
    report = subject.manifest.engine
    assert report is not None
    outputs = {tensor.name: tensor for tensor in subject.manifest.outputs}
    constants, blobs, classes = _CONSTANTS[task](subject, outputs)
    for name in blobs:
        if outputs[name].dtype not in ("", "float32"):
            raise _impossible(f"The output {name} is {outputs[name].dtype}.", "Export it with FP32 outputs.")
    height, width = subject.preprocess.size
    largest = subject.batches[2]
    key, function = _PARSERS[task]
    settings = {
        "gpu-id": 0,
        "gie-unique-id": 1,
        "process-mode": 1,
        "network-type": _NETWORK_TYPES[task],
        "model-engine-file": ENGINE,
        "labelfile-path": "labels.txt",
        "batch-size": largest,
        "infer-dims": f"{subject.preprocess.channels};{height};{width}",
        "network-input-order": 0,
        "net-scale-factor": repr(scaling.factor),
        "offsets": ";".join(map(repr, scaling.offsets)),
        "model-color-format": scaling.colours,
        "maintain-aspect-ratio": int(scaling.keep_aspect),
        "symmetric-padding": int(scaling.symmetric),
        "scaling-filter": scaling.filter,
        "output-blob-names": ";".join(blobs),
        "num-detected-classes": classes,
        "custom-lib-path": LIBRARY,
        key: function,
        **_of_task(subject),
    }
    lines = [f"# {subject.name}, of task {task}; see README.txt", "[property]"]
    lines += [f"{name}={value}" for name, value in settings.items()]
    if task == "detection":
        options = options_from(DetectionOptions, task, subject.reading.options)
        lines += ["", "[class-attrs-all]", f"pre-cluster-threshold={options.shown!r}", f"topk={options.top_k}"]
    (folder / CONFIG).write_text("\n".join(lines) + "\n")
    names = subject.class_names or tuple(map(str, range(classes)))
    # Of a classifier, nvinfer reads the labels of one output from one line.
    (folder / "labels.txt").write_text(
        (";" if task == "classification" else "\n").join(one.replace(";", ",") for one in names) + "\n"
    )
    (folder / "resvit_bundle.h").write_text(_header(constants, names))
    shutil.copyfile(FILES / "deepstream_parser.cpp", folder / "resvit_parser.cpp")
    shutil.copyfile(FILES / "deepstream.mk", folder / "Makefile")
    shutil.copyfile(engine, folder / ENGINE)
    notes = [f"make, there, with DeepStream's headers, compiles {LIBRARY}."]
    notes.append(f"The engine is by TensorRT {report.builder_version} for SM {report.sm / 10:.1f}: no other reads it.")
    if report.plugin_library:
        shutil.copyfile(subject.folder / report.plugin_library.name, folder / report.plugin_library.name)
        notes.append(f"The engine needs its plugin library: LD_PRELOAD=./{report.plugin_library.name}")
    notes.append(
        "DeepStream scales frames by its own filter, not by that of the validated images: compare answers on a few."
    )
    (folder / "README.txt").write_text("\n\n".join((f"{subject.name} for DeepStream", *notes)) + "\n")
    return notes


def _of_task(subject: Subject) -> dict[str, object]:
    if subject.reading.task == "detection":
        return {"cluster-mode": _NO_CLUSTERING}
    if subject.reading.task == "segmentation":
        return {"segmentation-threshold": 0.0, "segmentation-output-order": 0}
    return {"classifier-threshold": 0.0}


def _boxes(subject: Subject, outputs: dict[str, IoTensor]) -> tuple[dict[str, object], list[str], int]:
    arrays = {name: np.broadcast_to(np.float32(0), _sizes(tensor)) for name, tensor in outputs.items()}
    options = options_from(DetectionOptions, "detection", subject.reading.options)
    reader = BoxReader(options, arrays, subject.reading.classes)
    constants = {
        "BOXES": reader.boxes,
        "SCORES": reader.scores,
        "ACTIVATION": ("none", "sigmoid", "softmax").index(reader.activation),
        "CENTRES": reader.centres,
        "NORMALIZED": reader.normalized,
        "OVERLAP": 1.0 if reader.overlap is None else reader.overlap,
        "BEFORE_NMS": options.top_k if reader.overlap is None else max(_BEFORE_NMS, options.top_k),
        "MOST": options.top_k,
    }
    return constants, [reader.boxes, reader.scores], reader.classes


def _classes(subject: Subject, outputs: dict[str, IoTensor]) -> tuple[dict[str, object], list[str], int]:
    del subject
    name = OUTPUT if OUTPUT in outputs else next(iter(outputs))
    return {"SCORES": name}, [name], _sizes(outputs[name])[-1]


def _masks(subject: Subject, outputs: dict[str, IoTensor]) -> tuple[dict[str, object], list[str], int]:
    arrays = {name: np.broadcast_to(np.float32(0), _sizes(tensor)) for name, tensor in outputs.items()}
    name = masks_name(options_from(SegmentationOptions, "segmentation", subject.reading.options), arrays)
    if arrays[name].ndim != 4:
        raise _impossible(
            "The network answers with class numbers, and DeepStream reads scores.", "Leave the argmax out of it."
        )
    return {"SCORES": name}, [name], arrays[name].shape[1]


_CONSTANTS = {"detection": _boxes, "classification": _classes, "segmentation": _masks}


def _sizes(tensor: IoTensor) -> tuple[int, ...]:
    """The shape with 1 for what is dynamic."""
    return tuple(size if isinstance(size, int) and size > 0 else 1 for size in tensor.shape)


def _header(constants: dict[str, object], names: tuple[str, ...]) -> str:
    usual: dict[str, object] = {
        "BOXES": "", "SCORES": "", "ACTIVATION": 0, "CENTRES": False, "NORMALIZED": False, "OVERLAP": 1.0,
        "BEFORE_NMS": 1, "MOST": 1,
    }  # fmt: skip
    lines = ["// How the bundle's outputs are read.", "#pragma once", ""]
    for name, value in {**usual, **constants}.items():
        if isinstance(value, bool):
            lines.append(f"constexpr bool {name} = {str(value).lower()};")
        elif isinstance(value, str):
            lines.append(f"constexpr char {name}[] = {_quoted(value)};")
        else:
            lines.append(f"constexpr {'double' if isinstance(value, float) else 'int'} {name} = {value!r};")
    lines.append(f"constexpr const char* NAMES[] = {{{', '.join(map(_quoted, names))}}};")
    return "\n".join(lines) + "\n"


def _quoted(text: str) -> str:
    """A string literal of C++: bytes beyond the plainest as octal escapes, which end after three digits."""
    plain = (chr(byte) if chr(byte).isalnum() and byte < 128 else f"\\{byte:03o}" for byte in text.encode())
    return '"' + "".join(plain) + '"'


def _impossible(problem: str, fix: str) -> ResvitError:
    return ResvitError(problem, f"{fix} {_OTHERWISE}", ExitCode.IMPOSSIBLE)
