"""Vision models of Hugging Face's transformers: from a folder, or from the hub's cache on this machine."""

from __future__ import annotations

import contextlib
import difflib
import inspect
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from resvit_calibrate.images.preprocess import Preprocess
from resvit_engines.errors import ExitCode, ResvitError
from resvit_engines.outside import expanded, json_from_outside, leads_to_file, read_outside
from resvit_export.loading.libraries import import_transformers
from resvit_export.loading.weights.drawn import draw_weights

if TYPE_CHECKING:
    from resvit_export.loading.spec import Scalar

_ANSWERS = ("logits", "pred_boxes", "predicted_depth", "class_queries_logits", "masks_queries_logits")
"""Fields of a model's output that applications read; where it has none of them, all tensors of it are kept."""
_KEPT_FOR_OTHERS = re.compile(r"^((encoder|decoder)_)?hidden_states$|attentions$|position")
"""Fields of several tensors that are no answers: the layers' own outputs, and positions, the same for every image."""
_OF_MASKING = ("mask", "ids_restore")
"""What a masked autoencoder says of its masking: constants, where it masks nothing."""
_SOFTMAX = frozenset({"detr", "yolos", "table-transformer"})
"""Detectors whose last score stands for "no object"; the others' scores go through a sigmoid."""
_DETR_COCO = 91
"""Classes of DETR's own COCO weights: the numbers are COCO's, gaps and all."""
_RESAMPLE = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}  # Pillow's numbers
_OTHER_INPUTS = {
    "KEYPOINT_MATCHING": "compares two images, and answers with as many matches as it finds",
    "KEYPOINT_DETECTION": "answers with as many points as it finds",
    "VIDEO_CLASSIFICATION": "takes films [B, frames, C, H, W]",
    "MASK_GENERATION": "takes points or boxes beside its image",
}
"""Lists of transformers (``MODEL_FOR_…_MAPPING_NAMES``) whose classes are more than a function of one image."""
_GRID = "spatial_shapes"
"""The parameter of a forward whose images are cut into patches before it: rows and columns of patches of each."""
_WEIGHTS = ("*.safetensors", "pytorch_model*.bin", "*.safetensors.index.json")
_ARCHITECTURE = "architecture"


class HuggingFaceModel(nn.Module):
    """A transformers model as a network from images [B, C, H, W] to a dictionary of tensors.

    What a hub's model does behind its network (boxes in pixels of the photo, masks at its size) is left to the
    application, as transformers leaves it to the image processor.
    """

    def __init__(self, model: nn.Module, config: Any, preprocess: Preprocess | None, random_weights: bool) -> None:
        super().__init__()
        self.model = model
        self.preprocess = preprocess
        self.random_weights = random_weights
        self.has_own_code = False
        self.input_name = _reads(type(model))[0]
        self._patch = config.patch_size if _masks_at_random(type(model), config) is not None else None
        self.input_shape = _input_shape(config, preprocess)
        self.size_step = _size_step(config)
        self.task_options = _task_options(config)
        self.class_names = dict(getattr(config, "id2label", None) or {})

    def forward(self, pixel_values: Tensor, pixel_mask: Tensor | None = None) -> dict[str, Tensor]:
        """Answer for images float32 [B, C, H, W]; ``pixel_mask`` int64 [B, H, W] is 0 where they are padded."""
        beside = {} if pixel_mask is None else {"pixel_mask": pixel_mask}
        if self._patch is not None:  # a masked autoencoder that masks nothing: its patches stay in their order
            images, _, height, width = pixel_values.shape
            patches = (height // self._patch) * (width // self._patch)
            beside["noise"] = torch.arange(patches, dtype=torch.float32).expand(images, patches)
        answer = self.model(**{self.input_name: pixel_values}, return_dict=True, **beside)
        own = _OF_MASKING if self._patch is not None else ()
        tensors = {name: value for name, value in answer.items() if isinstance(value, Tensor) and name not in own}
        # A backbone answers with a tuple of maps, some encoders with maps of several sizes beside their last one.
        maps = {
            f"{name}_{index}": value
            for name, several in answer.items()
            if isinstance(several, (tuple, list)) and not _KEPT_FOR_OTHERS.search(name)
            for index, value in enumerate(several)
            if isinstance(value, Tensor)
        }
        return {name: tensors[name] for name in _ANSWERS if name in tensors} or {**tensors, **maps}


def hugging_face_model(reference: str, arguments: Mapping[str, Scalar]) -> HuggingFaceModel:
    """Load ``reference``: a folder as ``save_pretrained`` writes it, or a repository that is in the hub's cache.

    Nothing is downloaded, and no code that comes with a model is run. ``arguments`` replace settings of its
    configuration; ``architecture`` names the class where the configuration does not. A folder without weights gives a
    network with random ones.

    Raises:
        ResvitError: for a model that is not there, needs code of its own, takes no images, or whose weights do not
            cover the network; MISSING without transformers.
    """
    transformers = import_transformers()
    folder = expanded(reference)
    with _quiet(transformers), _refusals(reference):
        place = str(folder) if folder.is_dir() else reference
        config = transformers.AutoConfig.from_pretrained(place, local_files_only=True, trust_remote_code=False)
        settings = dict(arguments)
        kind = _class_of(transformers, config, settings.pop(_ARCHITECTURE, None), reference)
        _require_image(kind, reference)
        config = _own_config(kind, config)
        _set(config, settings, reference)
        _refuse_masking(kind, config, reference)
        files = _folder_of(folder, reference)
        trained = any(next(files.glob(pattern), None) for pattern in _WEIGHTS)
        if trained:
            model, loaded = kind.from_pretrained(
                place, config=config, local_files_only=True, dtype=torch.float32, output_loading_info=True
            )
            _require_whole(loaded, reference)
        else:
            model = kind(config)
            draw_weights(model)
        preprocess = _preprocess(files / "preprocessor_config.json", config)
        made = HuggingFaceModel(model, config, preprocess, not trained)
        made.has_own_code = bool(getattr(config, "auto_map", None))
        return made


def _class_of(transformers: Any, config: Any, named: object, reference: str) -> Any:
    names = [str(named)] if named is not None else list(config.architectures or ())
    if not names and isinstance(of_timm := getattr(config, "architecture", None), str):
        raise ResvitError(
            f"{reference} is a model of timm's.",
            f"Name it as such, with the weights of its folder: --model timm:{of_timm} "
            "--checkpoint FOLDER/model.safetensors.",
        )
    if not names:
        fitting = _classes_of(getattr(config, "model_type", ""))
        raise ResvitError(
            f"The configuration of {reference} does not say which class the model is.",
            f"Name it: --model-arg architecture={' or '.join(fitting[:6]) or 'CLASS'}.",
        )
    kind = getattr(transformers, names[0], None)
    if not isinstance(kind, type) and getattr(config, "auto_map", None):
        raise _own_code(reference)
    if not isinstance(kind, type) or not issubclass(kind, nn.Module):
        raise ResvitError(
            f"transformers {transformers.__version__} has no model class {names[0]}.",
            "Check --model-arg architecture=…, or install the version that the model was saved with.",
        )
    return kind


def _classes_of(model_type: str) -> list[str]:
    """The classes for images that transformers lists for a type of model, those with a head first."""
    from transformers.models.auto import modeling_auto

    found: dict[str, None] = {}
    for listed, mapping in vars(modeling_auto).items():
        if (
            listed.startswith("MODEL_")
            and listed.endswith("_MAPPING_NAMES")
            and isinstance(mapping, dict)
            and model_type in mapping
        ):
            names = mapping[model_type]
            found.update(dict.fromkeys([names] if isinstance(names, str) else names))
    return sorted(found, key=lambda name: "For" not in name)


def _require_image(kind: Any, reference: str) -> None:
    """Refuse, before anything is built, a class that is no function of one image, and say which of its parts is."""
    from transformers.models.auto import modeling_auto

    reads = _reads(kind)
    for listed, what in _OTHER_INPUTS.items():
        mapping = dict(getattr(modeling_auto, f"MODEL_FOR_{listed}_MAPPING_NAMES", {}))
        classes = {name for names in mapping.values() for name in ([names] if isinstance(names, str) else names)}
        films = listed == "VIDEO_CLASSIFICATION" and getattr(kind.config_class, "model_type", None) in mapping
        if kind.__name__ in classes or films:
            raise ResvitError(
                f"{kind.__name__} ({reference}) {what}: that is no network from an image to tensors of fixed shape.",
                _fix_by_part(kind),
            )
    if _GRID in reads:
        raise ResvitError(
            f"{kind.__name__} ({reference}) reads patches of photos of any aspect ratio, cut before the network "
            f"([B, patches, values], with {_GRID}), not images.",
            "Take the weights of the same family for a fixed size, which read images (of SigLIP 2 those without "
            "'naflex'), or give a module of yours that cuts its image itself (--model file.py:factory).",
        )
    if len(reads) > 1 or not (reads[0] == "pixel_values" or (reads[0] == "inputs" and "Image" in kind.__name__)):
        raise ResvitError(
            f"{kind.__name__} ({reference}) reads {', '.join(reads)}: an engine here is a function of images alone.",
            _fix_by_part(kind),
        )


def _reads(kind: Any) -> list[str]:
    """What the forward of ``kind`` reads: its main input first, then what else it cannot do without.

    The main input is what the class says, where its forward has such a parameter: a tower inside a larger model often
    inherits the name of the words.
    """
    parameters = [item for item in inspect.signature(kind.forward).parameters.values() if item.name != "self"]
    takes = [item.name for item in parameters if item.kind is item.POSITIONAL_OR_KEYWORD]
    said = getattr(kind, "main_input_name", "pixel_values")
    main = [name for name in ([said] if isinstance(said, str) else said) if name in takes] or takes[:1]
    needs = [item.name for item in parameters if item.name in takes and item.default is item.empty]
    grid = [_GRID] if _GRID in takes else []
    return list(dict.fromkeys([*main, *needs, *grid]))


def _masks_at_random(kind: Any, config: Any) -> float | None:
    """Which part of its patches a masked autoencoder leaves out, by the order of its ``noise``; None for all others.

    Hiera takes ``noise`` too, and masks in its pretraining alone.
    """
    takes = inspect.signature(kind.forward).parameters
    return float(config.mask_ratio) if config.model_type == "vit_mae" and "noise" in takes else None


def _refuse_masking(kind: Any, config: Any, reference: str) -> None:
    if ratio := _masks_at_random(kind, config):
        raise ResvitError(
            f"{kind.__name__} ({reference}) leaves out {ratio:.0%} of its patches, drawn at random for each image.",
            "Let it see all of them: --model-arg mask_ratio=0.0.",
        )


def _fix_by_part(kind: Any) -> str:
    """What to give instead: a class beside this one that sees, where there is one and transformers offers it."""
    offered = import_transformers()
    beside = vars(sys.modules[kind.__module__]).items()
    parts = sorted(
        name
        for name, other in beside
        if isinstance(other, type)
        and other is not kind
        and name.startswith(kind.__name__[:3])
        and ("Vision" in name or "Backbone" in name)
        and "PreTrained" not in name
        and getattr(other, "config_class", None) is not None
        and hasattr(offered, name)
        and _reads(other) == ["pixel_values"]
    )
    own = "give a module of yours from the image alone to tensors of fixed shape (--model file.py:factory)"
    if not parts:
        return f"{own[0].upper()}{own[1:]}."
    return f"Take the part that sees: --model-arg architecture={parts[0]}" + (
        f" (or {', '.join(parts[1:4])}); or {own}." if len(parts) > 1 else f"; or {own}."
    )


def _own_config(kind: Any, config: Any) -> Any:
    """The configuration of a part, such as CLIP's vision tower, out of that of the whole."""
    wanted = getattr(kind, "config_class", None)
    if wanted is None or isinstance(config, wanted):
        return config
    parts = [getattr(config, name, None) for name in getattr(config, "sub_configs", {})]
    return next((part for part in parts if isinstance(part, wanted)), config)


def _set(config: Any, settings: Mapping[str, Scalar], reference: str) -> None:
    known = [*config.to_dict(), "num_labels"]
    for name, value in settings.items():
        if name not in known:
            near = difflib.get_close_matches(name, known, n=3)
            raise ResvitError(
                f"The configuration of {reference} has no setting {name}.",
                f"Did you mean {', '.join(near)}?" if near else f"It has: {', '.join(sorted(known))}.",
            )
        setattr(config, name, value)


def _folder_of(folder: Path, reference: str) -> Path:
    """The folder that the model's files are in: the user's own, or that of the hub's cache."""
    if folder.is_dir():
        return folder
    from huggingface_hub import hf_hub_download

    return Path(hf_hub_download(reference, "config.json", local_files_only=True)).parent


def _require_whole(loaded: Mapping[str, Any], reference: str) -> None:
    """Refuse a network that transformers would have filled up with random numbers."""
    lacking = sorted(map(str, [*loaded["missing_keys"], *loaded.get("mismatched_keys", ())]))
    if lacking:
        raise ResvitError(
            f"The weights of {reference} do not cover the model: {len(lacking)} tensors are missing or of another "
            f"shape ({', '.join(lacking[:3])}{', …' if len(lacking) > 3 else ''}).",
            "Give the fine-tuned model rather than its backbone, with the num_labels that it was trained with.",
        )


def _input_shape(config: Any, preprocess: Preprocess | None) -> tuple[int, int, int] | None:
    """(C, H, W) by the preprocessing, else by the configuration or that of the backbone inside it."""
    inside = [config, getattr(config, "backbone_config", None), getattr(config, "vision_config", None)]
    channels = int(next((c.num_channels for c in inside if isinstance(getattr(c, "num_channels", None), int)), 3))
    if preprocess is not None:
        return (channels, *preprocess.size)
    for size in (getattr(part, "image_size", None) for part in inside):
        if isinstance(size, int):
            return channels, size, size
        if isinstance(size, (list, tuple)) and len(size) == 2:
            return channels, int(size[0]), int(size[1])
    return None


def _size_step(config: Any) -> int:
    """What height and width must be a multiple of, where a network cuts its patches into windows of equal size."""
    for part in (config, getattr(config, "backbone_config", None)):
        patch, windows = getattr(part, "patch_size", None), getattr(part, "num_windows", None)
        windows = getattr(part, "num_windows_side", windows)
        if isinstance(patch, int) and isinstance(windows, int):
            return patch * windows
    return 1


def _task_options(config: Any) -> dict[str, Any]:
    """How the model's outputs are to be read, where its configuration tells."""
    if config.model_type not in _SOFTMAX:
        return {}
    numbers = {"class_numbers": "id"} if config.num_labels == _DETR_COCO else {}
    return {"activation": "softmax", **numbers}


def _preprocess(path: Path, config: Any) -> Preprocess | None:
    """What ``preprocessor_config.json`` says; None where there is none, it names no size, or no picture is read."""
    channels = int(getattr(config, "num_channels", 3))
    if channels not in (1, 3):  # a picture and a guess of its mask, or a radar's bands: the user's own loader feeds it
        return None
    if not path.exists():
        return None
    again = "Copy or download the model again."
    own = json_from_outside(read_outside(path), str(path), again)
    try:
        return _preprocess_from(own, config, channels)
    except (AttributeError, LookupError, TypeError, ValueError, ArithmeticError) as error:
        raise ResvitError(f"{path} is not what transformers writes: {type(error).__name__}: {error}.", again) from error


def _preprocess_from(own: Mapping[str, Any], config: Any, channels: int) -> Preprocess | None:
    size, resize, fraction = _sizes(own, config)
    if size is None:
        return None
    # The network reads (pixel * factor - mean) / std, and Preprocess (pixel / 255 - mean) / std.
    factor = 255.0 * float(own.get("rescale_factor", 1 / 255)) if own.get("do_rescale", True) else 255.0
    normalises = own.get("do_normalize", True)
    mean = own.get("image_mean", [0.5]) if normalises else [0.0]
    std = own.get("image_std", [0.5]) if normalises else [1.0]
    scaled = tuple(float(value) / factor for value in mean)
    pads = scaled if len(scaled) == channels else scaled[:1]
    return Preprocess(
        size=size,
        channels=channels,
        resize=resize,
        crop_fraction=fraction,
        interpolation=_RESAMPLE.get(own.get("resample"), "bilinear"),  # type: ignore[arg-type]
        mean=scaled,
        std=tuple(float(value) / factor for value in std),
        pad_value=tuple(min(max(255.0 * value, 0.0), 255.0) for value in pads) if resize == "letterbox" else (0.0,),
    )


def _sizes(own: Mapping[str, Any], config: Any) -> tuple[tuple[int, int] | None, Any, float]:
    """(Height, width), ``resize`` and ``crop_fraction`` of a Preprocess."""
    size = own.get("size")
    if isinstance(size, int):
        size = {"height": size, "width": size} if "Segformer" in str(own) else {"shortest_edge": size}
    if isinstance(size, list) and len(size) == 2:
        size = {"height": size[0], "width": size[1]}
    size = size or {}
    if not isinstance(size, dict):
        raise TypeError(f"its size is {size!r}")
    if own.get("do_center_crop") and isinstance(own.get("crop_size"), (int, dict)):
        crop = own["crop_size"]
        height, width = (crop, crop) if isinstance(crop, int) else (crop["height"], crop["width"])
        edge = size.get("shortest_edge") or min(size.get("height", height), size.get("width", width))
        return (height, width), "crop", min(1.0, min(height, width) / edge)
    if "height" in size and "width" in size:
        return (int(size["height"]), int(size["width"])), "stretch", 1.0
    if "shortest_edge" in size:
        edge = int(size["shortest_edge"])
        # An engine has one size: a photo of any aspect ratio is fitted into a square and padded, as the models pad.
        if "longest_edge" in size:
            return (edge, edge), "letterbox", 1.0
        return (edge, edge), "crop", float(own.get("crop_pct") or 1.0)
    known = getattr(config, "image_size", None)
    return ((known, known) if isinstance(known, int) else None), "stretch", 1.0


@contextlib.contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """Without the library's own progress bars and warnings: what they say is checked here."""
    logging = transformers.utils.logging
    before, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(before)
        if bars:
            logging.enable_progress_bar()


def _own_code(reference: str) -> ResvitError:
    return ResvitError(
        f"{reference} comes with code of its own, which is not run.",
        "Read that code, and give the network by a factory of yours: --model file.py:factory.",
    )


@contextlib.contextmanager
def _refusals(reference: str) -> Iterator[None]:
    """What transformers raises, in a sentence."""
    from resvit_export.loading.user_code import user_error

    try:
        yield
    except ResvitError:
        raise
    except Exception as error:
        text = str(error)
        if "trust_remote_code" in text:
            raise _own_code(reference) from error
        if leads_to_file(expanded(reference) / "adapter_config.json"):
            raise ResvitError(
                f"{reference} is an adapter (LoRA or another of peft's), not a whole model.",
                "Merge it into its model first: peft's merge_and_unload(), then save_pretrained.",
            ) from error
        if expanded(reference).name == "config.json" and leads_to_file(expanded(reference)):
            raise ResvitError(
                f"{reference} is the configuration alone.", f"Give its folder: hf:{expanded(reference).parent}."
            ) from error
        if isinstance(error, OSError) and not leads_to_file(expanded(reference) / "config.json"):
            reference = re.sub(r"^https?://[^/]+/", "", reference)
            raise ResvitError(
                f"{reference} is neither a folder with a config.json nor in the hub's cache on this machine, and "
                "nothing is downloaded.",
                f"Fetch it where there is a network (hf download {reference}), or give the folder of the model.",
            ) from error
        if isinstance(error, ImportError):
            lines = [line.strip() for line in text.splitlines() if line.strip()]
            raise ResvitError(
                f"transformers cannot build {reference} here: {lines[0] if lines else error!r}",
                "Install that library beside transformers, or take a network that does without it.",
                ExitCode.MISSING,
            ) from error
        raise user_error(
            error, f"transformers cannot load {reference}", "Check the folder, --model-arg and the version."
        ) from error
