"""The user's network with its weights, from whatever names it, as one exported program."""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn
from torch.export import ExportedProgram

from resvit_calibrate.images.preprocess import Preprocess
from resvit_calibrate.runtime.behaviour import coupled_error
from resvit_engines.errors import ResvitError
from resvit_engines.pictures.sizes import Size, SizeRange
from resvit_engines.progress import SILENT, Reporter
from resvit_export.loading.checkpoint import load_checkpoint, require_finite
from resvit_export.loading.factories import module_from_name
from resvit_export.loading.inputs import NetworkInput
from resvit_export.loading.network_record import NetworkRecord
from resvit_export.loading.program.check import (
    COUPLED,
    ONE_BATCH,
    coupling_of,
    refuse_blind_program,
    refuse_random_program,
)
from resvit_export.loading.program.facts import (
    fixed_batch_of,
    has_dynamic_batch,
    input_shape_of,
    inputs_of,
    output_names,
    output_shapes,
    sizes_of,
)
from resvit_export.loading.program.run import runner_from_program
from resvit_export.loading.program.trace import program_from_module
from resvit_export.loading.spec import ModelSpec, Scalar
from resvit_export.loading.user_code import told_as_user_errors, user_error
from resvit_export.loading.weights.drawn import draw_heads, keep_signals_alive
from resvit_export.models.config import HybridConfig

if TYPE_CHECKING:
    from resvit_calibrate.runtime.runner import Runner

_FEW = 4
"""Channels of an image, at most, where nothing else tells its layout."""
_QUANTISED = ("torch.ao.nn.quantized", "torch.ao.nn.intrinsic.quantized", "torch.ao.nn.quantizable")
_FLOAT_ALL_THE_SAME = ("FloatFunctional",)
"""What stands among quantised modules, and in float networks that were written to be quantised."""


@dataclass(frozen=True)
class Network:
    """A trained network in eval mode. ``module`` is None for a ``.pt2``; ``num_classes`` where it is not known."""

    program: ExportedProgram
    module: nn.Module | None
    preprocess: Preprocess | None
    input_shape: tuple[int, int, int]
    num_classes: int | None
    digest: str
    """SHA-256 over the graph and all its tensors."""
    notes: tuple[str, ...] = ()
    task_options: Mapping[str, Any] = field(default_factory=dict)
    """How the network says that its outputs are to be read; what the user says goes before."""
    class_names: Mapping[int, str] = field(default_factory=dict)
    """What the network calls its classes, where it says so."""
    sizes: SizeRange | None = None
    """The sizes that its image may have, where there are several; ``input_shape`` then has the usual one."""

    @property
    def inputs(self) -> tuple[NetworkInput, ...]:
        """What it reads: the image first, called ``input``."""
        return inputs_of(self.program)

    def runner(self) -> Runner:
        """The network in PyTorch as a function from arrays to arrays."""
        return runner_from_program(self.program)

    def record(self) -> NetworkRecord:
        """What later stages need to know."""
        return NetworkRecord(
            input_shape=self.input_shape,
            num_classes=self.num_classes,
            preprocess=self.preprocess,
            dynamic_batch=has_dynamic_batch(self.program),
            digest=self.digest,
            task_options=dict(self.task_options),
            inputs=self.inputs if len(self.inputs) > 1 else (),
            notes=self.notes,
            coupled=COUPLED in self.notes,
            class_names=dict(self.class_names),
            sizes=self.sizes,
            outputs=tuple(
                {"name": name, "shape": list(shape)}
                for name, shape in zip(output_names(self.program), output_shapes(self.program), strict=True)
            ),
        )


def load_network(spec: ModelSpec, reporter: Reporter = SILENT) -> Network:
    """Load, check and export the network that ``spec`` names.

    Raises ``ResvitError`` for everything that can be wrong with it: no such model, a factory that fails, a
    checkpoint that does not fit, NaN in the weights, an unknown input size, a forward that cannot be exported.
    An ``.onnx`` file has no PyTorch program; ``resvit_export.to_onnx.own_onnx.import_onnx`` takes it.
    """
    if spec.model.endswith(".onnx"):
        raise ResvitError("An ONNX model has no PyTorch program.", "It goes through import_onnx.")
    if spec.model.endswith(".pt2"):
        return _network_from_pt2(spec, reporter)
    with told_as_user_errors(spec.model):
        module = module_from_name(spec.model, spec.model_args)
    return network_from_module(module, spec, reporter)


def network_from_module(module: nn.Module, spec: ModelSpec, reporter: Reporter = SILENT) -> Network:
    """The same of a module in memory, which is changed: the checkpoint goes into it, and it computes in float32.

    Without a checkpoint, a module that a name stands for has random weights, and the user is told.
    """
    with told_as_user_errors(spec.model):
        return _network_from_module(module, spec, reporter)


def _network_from_module(module: nn.Module, spec: ModelSpec, reporter: Reporter) -> Network:
    notes: list[str] = []
    _refuse_lazy(module, spec.model)
    _refuse_compiled(module, spec.model)
    _refuse_quantised(module, spec.model)
    named = spec.model.startswith(("timm:", "resvit:", "torchvision."))
    drawn = named and not spec.model_args.get("pretrained")
    untrained = spec.checkpoint is None and (drawn or getattr(module, "random_weights", False))
    if getattr(module, "has_own_code", False):
        notes.append(f"{spec.model} comes with code of its own, which was not run: transformers' own class is built")
    if spec.checkpoint is not None:
        notes += load_checkpoint(module, spec.checkpoint, spec.checkpoint_key, reporter)
    elif untrained:
        reporter.warn(
            f"{spec.model} has random weights: no --checkpoint was given. Speed and size will be right, accuracy not."
        )
        notes.append("random weights: no checkpoint was given")
        draw_heads(module)
    _refuse_own_selection(module, spec.model)
    module, cast = _as_float32(module)
    notes += cast
    require_finite(module, str(spec.checkpoint or spec.model))
    inputs = _inputs(module, spec)
    if untrained and keep_signals_alive(module, [size for size in inputs if isinstance(size, int)]):
        notes.append("signals died out or grew without bounds under its own random weights: others were drawn")
    try:
        program, trace_notes = program_from_module(module, inputs, spec.sizes)
    except ResvitError as error:
        if not cast:
            raise
        own = "Its weights became float32: a forward that casts by itself has to follow them (x.to(self.weight.dtype))."
        raise ResvitError(error.problem, f"{own} Otherwise: {error.fix}", error.code) from error
    shape = input_shape_of(program)
    shape = (shape[0], *spec.sizes.usual) if spec.sizes else shape
    for note in (*notes, *trace_notes):
        if note not in (COUPLED, ONE_BATCH):  # said where the batch is known, which may be refused
            reporter.say(note)
    return Network(
        program,
        module,
        preprocess_of(module, shape),
        shape,
        _classes(program, module),
        program_digest(program),
        (*notes, *trace_notes),
        dict(getattr(module, "task_options", {})),
        _class_names(module),
        spec.sizes,
    )


def _class_names(module: nn.Module) -> dict[int, str]:
    """What a module calls its classes: in ``.class_names``, by number or in order, or in timm's ``.pretrained_cfg``."""
    said = getattr(module, "class_names", None)
    if said is None:
        known = getattr(module, "pretrained_cfg", None)
        said = known.get("label_names") if isinstance(known, dict) else None
    names = dict(enumerate(said)) if isinstance(said, (list, tuple)) else said
    if not isinstance(names, Mapping):
        return {}
    return {
        number: name
        for number, name in names.items()
        if isinstance(number, int) and not isinstance(number, bool) and number >= 0 and isinstance(name, str) and name
    }


def preprocess_of(module: nn.Module, input_shape: tuple[int, int, int]) -> Preprocess | None:
    """How the network wants its images: from ``.preprocess`` (a ``Preprocess``, as Hugging Face's models get one),
    ``.config`` (resvit) or ``.pretrained_cfg`` (timm); else None.
    """
    channels, size = input_shape[0], (input_shape[1], input_shape[2])
    if channels not in (1, 3):
        return None
    own = getattr(module, "preprocess", None)
    if isinstance(own, Preprocess):
        return dataclasses.replace(own, size=size)
    config = getattr(module, "config", None)
    if isinstance(getattr(config, "mean", None), tuple) and isinstance(getattr(config, "std", None), tuple):
        assert config is not None
        return Preprocess(size=size, channels=channels, mean=_channels(config.mean, channels),
                          std=_channels(config.std, channels))  # fmt: skip
    known = getattr(module, "pretrained_cfg", None)
    if not isinstance(known, Mapping) or "mean" not in known:
        return None
    interpolation = str(known.get("interpolation", "bicubic"))
    mode = str(known.get("crop_mode", "center"))
    return Preprocess(
        size=size,
        channels=channels,
        resize="stretch" if mode == "squash" else "crop",
        crop_fraction=1.0 if mode == "squash" else float(known.get("crop_pct") or 0.875),
        interpolation="bilinear" if interpolation == "bilinear" else "bicubic",
        mean=_channels(tuple(known["mean"]), channels),
        std=_channels(tuple(known["std"]), channels),
    )


def program_digest(program: ExportedProgram) -> str:
    """SHA-256 over the graph, how it is called and every tensor: the same network gives the same digits anywhere."""
    digest = hashlib.sha256()
    for path, module in program.graph_module.named_modules():
        if isinstance(module, torch.fx.GraphModule):  # the parts that run without gradients have graphs of their own
            digest.update(f"{path}\n{module.graph}\n".encode())
    called = (program.graph_signature, program.call_spec, sorted(map(str, program.range_constraints.items())))
    digest.update("\n".join(map(str, called)).encode())
    tensors = {**program.constants, **program.state_dict}
    for name in sorted(tensors):
        tensor = tensors[name]
        if isinstance(tensor, torch.Tensor):
            digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _network_from_pt2(spec: ModelSpec, reporter: Reporter) -> Network:
    from resvit_export.loading.pt2 import program_from_pt2

    if spec.checkpoint is not None or spec.model_args:
        raise ResvitError(
            "A .pt2 program brings its own weights and takes no arguments.",
            "Leave out --checkpoint and --model-arg.",
        )
    program = program_from_pt2(Path(spec.model))
    output_shapes(program)
    refuse_random_program(program, spec.model)
    if (moved := coupling_of(program)) is not None:
        raise coupled_error(
            spec.model, moved, "Export it again for batch 1, without a dynamic shape, or mend its forward."
        )
    require_finite({**program.constants, **program.state_dict}, spec.model)
    refuse_blind_program(program, spec.model)
    shape = input_shape_of(program)
    own = sizes_of(program)
    if own is not None:
        shape = (shape[0], *_sizes_within(own, spec).usual)
    if spec.input_shape not in (None, shape) or (spec.sizes is not None and own is None):
        raise ResvitError(f"{spec.model} takes images of {shape}, not {spec.input_shape}.", "Leave out --input-shape.")
    for size in spec.sizes.all if spec.sizes else (None,):
        _require_running(program, spec.model, size)
    notes = () if has_dynamic_batch(program) else ("the program was exported for one batch size",)
    for note in notes:
        reporter.say(note)
    return Network(program, None, None, shape, _classes(program), program_digest(program), notes, sizes=spec.sizes)


def _sizes_within(own: SizeRange, spec: ModelSpec) -> SizeRange:
    """The sizes that the user says, of a program that takes several; raises ``ResvitError`` unless it takes those."""
    if spec.sizes is None or not (own.holds(spec.sizes.smallest) and own.holds(spec.sizes.largest)):
        asked = f"and {spec.sizes} was asked for" if spec.sizes else "and nothing says which of them to build for"
        raise ResvitError(
            f"{spec.model} takes images of {own} pixels, {asked}.",
            f"Give a range within, such as --input-shape 3x{own}, or export the network for one size.",
        )
    return spec.sizes


def _require_running(program: ExportedProgram, name: str, size: Size | None) -> None:
    """Run a program once on zeros, ones for integers: a file can say anything of what its graph computes.

    ``size`` is that of the image, where it may have several.
    """
    make = {True: np.zeros, False: np.ones}
    batch = fixed_batch_of(program) or 2
    inputs = inputs_of(program)
    if size is not None:
        inputs = (inputs[0].at_size(size), *inputs[1:])
    arrays = {item.name: make[item.dtype == "float32"]((batch, *item.shape), item.dtype) for item in inputs}
    try:
        answers = runner_from_program(program)(arrays)
    except Exception as error:
        raise user_error(
            error,
            f"The graph of {name} fails on a batch of {batch}",
            "Export the network again with torch.export.save.",
        ) from error
    for (output, answer), declared in zip(answers.items(), output_shapes(program), strict=True):
        if any(isinstance(size, int) and size != own for size, own in zip(declared, answer.shape, strict=False)):
            raise ResvitError(
                f"{name} says that {output} is {list(declared)}, and it computes {list(answer.shape)}.",
                "Export the network again with torch.export.save.",
            )


def _inputs(module: nn.Module, spec: ModelSpec) -> tuple[int, int, int] | tuple[NetworkInput, ...]:
    """What to trace the module with: (C, H, W) of its only input, or all inputs by name.

    Raises:
        ResvitError: for a name that the forward does not have, a parameter that nothing is said of, and no image size.
    """
    image = spec.input_shape or _own_input_shape(module, spec.model_args)
    _require_channels_first(image, spec.model)
    if image is not None and spec.sizes:
        for size in spec.sizes.all:
            _require_step(module, (image[0], *size), spec.model)
    _require_step(module, image, spec.model)
    parameters = inspect.signature(module.forward).parameters.values()
    names = [item.name for item in parameters if item.kind in (item.POSITIONAL_OR_KEYWORD, item.KEYWORD_ONLY)]
    needed = [item.name for item in parameters if item.name in names and item.default is item.empty]
    given = {item.name: item for item in spec.inputs}
    if wrong := [name for name in given if name not in names]:
        raise ResvitError(
            f"The forward of {spec.model} has no parameter {wrong[0]}.",
            f"It has {', '.join(names) or 'none'}: name those in --shape.",
        )
    missing = [name for name in needed if name not in given]
    if len(given) < 2 and len(needed) <= 1 and not (given and missing):
        (only,) = given.values() or (None,)
        if only is not None and not only.is_image:
            raise ResvitError(f"--shape says {only}: no image.", "The image is float32 [B, C, H, W].")
        if only is None and image is None:
            raise ResvitError(
                f"{spec.model} does not say which images it takes.",
                "Give --input-shape C,H,W, for example --input-shape 3,224,224.",
            )
        channels, height, width = only.shape if only is not None else image or (0, 0, 0)
        return channels, height, width
    if missing and image is not None and not any(item.is_image for item in given.values()):
        # The first parameter is the image, as everywhere.
        given = {missing[0]: NetworkInput(missing[0], image), **given}
        missing = missing[1:]
    if missing:
        example = " ".join(f"--shape {name}=1x…" for name in missing)
        raise ResvitError(
            f"The forward of {spec.model} needs {', '.join(needed)}, and nothing says what {', '.join(missing)} "
            f"{'is' if len(missing) == 1 else 'are'}.",
            f"Give shape and type of each: {example}, for example --shape sizes=1x2:int64. What only training needs, "
            "such as labels, is no input of an engine: give it a default of None, or wrap the network in a module "
            "whose forward takes the image alone.",
        )
    return tuple(given[name] for name in names if name in given)


def _require_channels_first(image: tuple[int, int, int] | None, name: str) -> None:
    """Refuse a size that is height, width and channels: no image is ``_FEW`` pixels wide and has more channels."""
    if image is None or image[2] > _FEW or image[0] <= _FEW:
        return
    height, width, channels = image
    raise ResvitError(
        f"{name} is to take images of {height} channels that are {width} pixels high and {channels} wide: that is "
        "height, width and channels.",
        f"Give --input-shape {channels},{height},{width}. A network that reads [B, H, W, C] needs a wrapper whose "
        "forward takes [B, C, H, W] and permutes it.",
    )


def _require_step(module: nn.Module, image: tuple[int, int, int] | None, name: str) -> None:
    """Refuse a size that the network cannot cut into its windows; ``module.size_step`` is what divides it."""
    step = getattr(module, "size_step", 1)
    if image is None or not isinstance(step, int) or step < 2 or all(size % step == 0 for size in image[1:]):
        return
    near = ",".join(str(step * max(1, round(size / step))) for size in image[1:])
    raise ResvitError(
        f"{name} cuts its image into windows, for which height and width must be multiples of {step}; they are "
        f"{image[1]} and {image[2]}.",
        f"Give --input-shape {image[0]},{near}.",
    )


def _refuse_lazy(module: nn.Module, name: str) -> None:
    """Refuse layers that wait for their first image to know their sizes, and weights that were never allocated."""
    for key, tensor in module.state_dict().items():
        if isinstance(tensor, torch.Tensor) and tensor.is_meta:
            raise ResvitError(
                f"{name} has weights without values: {key} is on the device 'meta'.",
                "Let the factory make the network on the CPU, or load its weights before it returns it.",
            )
        if isinstance(tensor, torch.Tensor) and torch.nn.parameter.is_lazy(tensor):
            raise ResvitError(
                f"{name} has lazy layers, whose sizes are not known yet.",
                "Let the factory run one image through the network before it returns it.",
            )


def _refuse_compiled(module: nn.Module, name: str) -> None:
    """Refuse TorchScript, as a whole or in a part: it is code of its own, which no trace goes into."""
    found = next((key for key, part in module.named_modules() if isinstance(part, torch.jit.ScriptModule)), None)
    if found is None:
        return
    what = f"its part {found} is" if found else "it is"
    raise ResvitError(
        f"{name} cannot be traced: {what} TorchScript (torch.jit.script, trace or load).",
        "Let the factory return the network in Python, with the weights of the TorchScript's state_dict(); or write it "
        "as ONNX by torch.onnx.export(..., dynamo=False) and give that file.",
    )


def _refuse_quantised(module: nn.Module, name: str) -> None:
    """Refuse what quantises already, or is trained to bear it: quantising is done, and compared with float, here."""
    from torch.ao.quantization import FakeQuantizeBase, ObserverBase

    for key, part in module.named_modules():
        kind = type(part)
        quantised = kind.__module__.startswith(_QUANTISED) and kind.__name__ not in _FLOAT_ALL_THE_SAME
        if quantised or isinstance(part, (FakeQuantizeBase, ObserverBase)):
            raise ResvitError(
                f"{name} is quantised already, or prepared for it: {key or 'it'} is a {kind.__name__}.",
                "Give the float network, which may have the weights that were trained with fake quantisation: "
                "quantising is what is done here.",
            )


def _refuse_own_selection(module: nn.Module, name: str) -> None:
    """Refuse torchvision's detectors, which hold what no fixed graph can: their reason beats a trace's."""
    kinds = {kind.__module__ for kind in type(module).__mro__}
    if not any(kind.startswith("torchvision.models.detection.") for kind in kinds):
        return
    two_stages = "torchvision.models.detection.faster_rcnn" in kinds or hasattr(module, "roi_heads")
    why = (
        "between its two stages it picks a varying number of regions (NMS, RoIAlign)"
        if two_stages
        else "it resizes photos of any size and answers with a varying number of boxes (NMS) for each"
    )
    raise ResvitError(
        f"{name} ({type(module).__name__}) has no fixed graph: {why}, so that no engine of fixed shapes holds it.",
        "Take a detector that answers for a fixed set of queries or cells (RT-DETR, DETR, resvit:fpn-nano-det)"
        + ("." if two_stages else ", or a module of yours that returns this one's backbone and head alone."),
    )


def _as_float32(module: nn.Module) -> tuple[nn.Module, tuple[str, ...]]:
    module = module.to("cpu")
    kinds = {t.dtype for t in module.state_dict().values() if isinstance(t, torch.Tensor) and t.is_floating_point()}
    if kinds <= {torch.float32}:
        return module, ()
    names = ", ".join(sorted(str(kind).removeprefix("torch.") for kind in kinds))
    return module.float(), (f"the network is in {names}; it is computed in float32",)


def _own_input_shape(module: nn.Module, arguments: Mapping[str, Scalar]) -> tuple[int, int, int] | None:
    config = getattr(module, "config", None)
    if config is not None and hasattr(config, "image_size") and hasattr(config, "in_channels"):
        height, width = _pair(config.image_size)
        return int(config.in_channels), height, width
    known = getattr(module, "pretrained_cfg", None)
    if isinstance(known, Mapping) and "input_size" in known:
        channels, height, width = (int(size) for size in known["input_size"])
        # Arguments override what the pretrained weights were trained with.
        embed = getattr(module, "patch_embed", None)
        height, width = _pair(getattr(embed, "img_size", None) or (height, width))
        asked = arguments.get("in_chans")
        channels = asked if isinstance(asked, int) else _own_channels(module, known, channels)
        return channels, height, width
    own = getattr(module, "input_shape", None)
    if own is None and isinstance(getattr(module, "image_size", None), int):
        own = (3, module.image_size, module.image_size)  # torchvision's ViT
    return tuple(int(size) for size in own) if isinstance(own, (tuple, list)) and len(own) == 3 else None  # type: ignore[return-value]


def _own_channels(module: nn.Module, config: Mapping[str, Any], usual: int) -> int:
    """The image's channels by timm's first convolution, where its configuration names one that reads the image itself.

    One that reads a multiple of the ``usual`` channels stands behind a rearrangement of pixels into channels.
    """
    named = config.get("first_conv") or ()
    names = [named] if isinstance(named, str) else list(named)
    for name, part in module.named_modules():
        if name in names and isinstance(part, nn.Conv2d):
            return usual if part.in_channels % usual == 0 else part.in_channels
    return usual


def _pair(size: Any) -> tuple[int, int]:
    return (int(size), int(size)) if isinstance(size, int) else (int(size[0]), int(size[1]))


def _channels(values: tuple[float, ...], channels: int) -> tuple[float, ...]:
    """As many values as channels: timm's grey models use the mean of the three colours."""
    if len(values) in (1, channels):
        return tuple(float(value) for value in values)
    return (math.fsum(values) / len(values),)


def _classes(program: ExportedProgram, module: nn.Module | None = None) -> int | None:
    """K of class scores [B, K], or of ``scores`` [B, Q, K] beside ``boxes``; else what a reference hybrid says."""
    shapes = dict(zip(output_names(program), output_shapes(program), strict=True))
    scores = next(iter(shapes.values())) if len(shapes) == 1 else shapes.get("scores", ()) if "boxes" in shapes else ()
    if len(scores) == (2 if len(shapes) == 1 else 3) and isinstance(scores[-1], int):
        return scores[-1]
    config = getattr(module, "config", None)
    return config.num_classes if isinstance(config, HybridConfig) else None
