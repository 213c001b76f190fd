"""What a reference hybrid is made of, as one frozen value that is checked once. Needs no torch."""

from __future__ import annotations

import dataclasses
import enum
import math
from typing import Any

from resvit_engines.errors import ResvitError


class Join(str, enum.Enum):
    """How the ResNet and the ViT are joined."""

    EMBED = "embed"
    """The trunk's last feature map becomes the tokens (Dosovitskiy et al. 2021, "hybrid architecture")."""
    FPN = "fpn"
    """The tokens come from several trunk stages, through a feature pyramid (Lin et al. 2017)."""
    DUAL = "dual"
    """A patch-embedding ViT and the trunk run side by side, and fusion blocks read both."""


class Task(str, enum.Enum):
    """What the head answers."""

    CLASSIFICATION = "classification"
    """Class scores of the whole image, from the class token."""
    DETECTION = "detection"
    """Boxes with class scores, one for every cell of the pyramid (Tian et al. 2019)."""
    SEGMENTATION = "segmentation"
    """Class scores of every pixel."""


class Block(str, enum.Enum):
    """The residual block of the trunk."""

    BASIC = "basic"
    """Two 3x3 convolutions (He et al. 2016)."""
    BOTTLENECK = "bottleneck"
    """1x1, 3x3 and 1x1 convolutions (He et al. 2016)."""
    MOBILE = "mobile"
    """Inverted: a depthwise 5x5 convolution on four times the width, with squeeze-and-excitation and hard-swish (Howard
    et al. 2019)."""


class Stem(str, enum.Enum):
    """The trunk's first layers."""

    SMALL = "small"
    """3x3 convolution of stride 2: for images of some dozens of pixels."""
    RESNET = "resnet"
    """7x7 convolution of stride 2, then 3x3 max pooling of stride 2."""


class Fusion(str, enum.Enum):
    """How the two branches of a dual hybrid meet."""

    CONCAT = "concat"
    """The trunk's tokens stand behind the ViT's."""
    ADD = "add"
    """The trunk's tokens are added to the ViT's: both grids must be equal."""


@dataclasses.dataclass(frozen=True)
class HybridConfig:
    """Everything that decides the layers and the preprocessing of a reference hybrid.

    ``image_size`` is (H, W) in pixels; ``mean`` and ``std`` are per channel, for pixels scaled to 0..1.
    Fields of another join are empty. Raises ``ResvitError`` when the values do not fit together.
    """

    name: str
    join: Join
    image_size: tuple[int, int]
    in_channels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    num_classes: int
    stem: Stem
    stem_width: int
    block: Block
    stage_depths: tuple[int, ...]
    stage_widths: tuple[int, ...]
    dim: int
    depth: int
    head_dim: int
    mlp_ratio: int = 4
    layer_scale: float = 0.0
    """First value of LayerScale (Touvron et al. 2021); 0 leaves it out."""
    dropout: float = 0.0
    """Dropout on the transformer's residual branches and on the embedded tokens, while training."""
    task: Task = Task.CLASSIFICATION
    pyramid_width: int = 0
    level_patches: tuple[int, ...] = ()
    """fpn: for each of the last trunk stages, finest first, the edge in map cells of the patch of one token."""
    patch_size: int = 0
    """dual: edge in pixels of the ViT branch's patches."""
    fusion: Fusion = Fusion.CONCAT
    fusion_depth: int = 0
    """dual: how many blocks, behind the ``depth`` of the ViT branch, read both branches."""

    def __post_init__(self) -> None:
        check(self)

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of one image."""
        return (self.in_channels, *self.image_size)

    @property
    def stage_strides(self) -> tuple[int, ...]:
        """Pixels per map cell behind each trunk stage."""
        first = 2 if self.stem is Stem.SMALL else 4
        return tuple(first << stage for stage in range(len(self.stage_depths)))

    @property
    def divisor(self) -> int:
        """Height and width must be multiples of this many pixels."""
        strides = [self.stage_strides[-1]]
        if self.join is Join.DUAL:
            strides.append(self.patch_size)
        if self.join is Join.FPN:
            levels = self.stage_strides[-len(self.level_patches) :]
            strides += [stride * patch for stride, patch in zip(levels, self.level_patches, strict=True)]
        return math.lcm(*strides)

    @property
    def levels(self) -> tuple[tuple[int, int, int], ...]:
        """What the maps that a head reads are like, finest first: (width, pixels per cell, cells per token's edge).

        The last is 0 where the tokens hold nothing of that map.
        """
        if self.join is Join.FPN:
            strides = self.stage_strides[-len(self.level_patches) :]
            return tuple((self.pyramid_width, s, patch) for s, patch in zip(strides, self.level_patches, strict=True))
        last = len(self.stage_widths) - 1
        stages = zip(self.stage_widths, self.stage_strides, strict=True)
        return tuple((width, stride, int(index == last)) for index, (width, stride) in enumerate(stages))

    def grid(self, stride: int) -> tuple[int, int]:
        """(rows, columns) of a map whose cells are ``stride`` pixels apart."""
        return self.image_size[0] // stride, self.image_size[1] // stride

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values, which ``config_from_json`` reads back."""
        return {field.name: _plain(getattr(self, field.name)) for field in dataclasses.fields(self)}


# Anything outside is a slip of the keyboard, and would end as an allocation failure instead of a sentence.
LIMITS: dict[str, tuple[float, float]] = {
    "image_size": (8, 4096),
    "in_channels": (1, 64),
    "num_classes": (1, 1_000_000),
    "stem_width": (16, 1024),
    "stage_depths": (1, 64),
    "stage_widths": (16, 8192),
    "dim": (32, 4096),
    "depth": (0, 64),
    "mlp_ratio": (1, 16),
    "layer_scale": (0, 10),
    "dropout": (0, 0.95),
    "pyramid_width": (16, 2048),
    "level_patches": (1, 64),
    "patch_size": (1, 256),
    "fusion_depth": (1, 64),
}
ONLY = {  # the fields that one join alone uses
    "pyramid_width": Join.FPN,
    "level_patches": Join.FPN,
    "patch_size": Join.DUAL,
    "fusion": Join.DUAL,
    "fusion_depth": Join.DUAL,
}


def check(config: HybridConfig) -> None:
    """Raise ``ResvitError`` unless the values of ``config`` fit together."""
    for name, (low, high) in LIMITS.items():
        if ONLY.get(name, config.join) is not config.join:
            continue
        value = getattr(config, name)
        for item in value if isinstance(value, tuple) else (value,):
            require(
                low <= item <= high,
                f"{config.name}: {name} = {show(value)} is out of range.",
                f"Choose {name} between {low:g} and {high:g}.",
            )
    for name in ("mean", "std"):
        values = getattr(config, name)
        require(
            len(values) == config.in_channels,
            f"{config.name}: {name} has {len(values)} values for {config.in_channels} input channels.",
            f"Give {name} one value per channel.",
        )
        require(
            all(math.isfinite(value) for value in values),
            f"{config.name}: {name} = {show(values)} holds a value that is not a finite number.",
            "Give the figures that the network was trained with.",
        )
    require(
        all(value > 0 for value in config.std),
        f"{config.name}: std = {show(config.std)} divides by zero or flips the image.",
        "Give positive values, for pixels scaled to 0..1.",
    )
    require(
        len(config.stage_depths) == len(config.stage_widths) and len(config.stage_depths) in range(1, 6),
        f"{config.name}: {len(config.stage_depths)} stage_depths and {len(config.stage_widths)} stage_widths.",
        "Give both the same number of values, one per trunk stage, 1 to 5 stages.",
    )
    widths = {"stem_width": config.stem_width, "dim": config.dim, "pyramid_width": config.pyramid_width}
    widths |= {f"stage_widths[{index}]": width for index, width in enumerate(config.stage_widths)}
    for name, width in widths.items():
        require(
            width % 16 == 0,
            f"{config.name}: {name} = {width} is not a multiple of 16, so it does not fill the GPU's INT8 tiles.",
            f"Choose {max(16, round(width / 16) * 16)}.",
        )
    require(
        config.block is not Block.BOTTLENECK or all(width % 64 == 0 for width in config.stage_widths),
        f"{config.name}: a bottleneck trunk with stage_widths = {show(config.stage_widths)}.",
        "Choose multiples of 64: the inner width is a quarter and must be a multiple of 16.",
    )
    require(
        config.head_dim in (32, 64) and config.dim % config.head_dim == 0,
        f"{config.name}: heads of {config.head_dim} do not divide dim = {config.dim}.",
        "Choose head_dim 32 or 64, and dim as a multiple of it.",
    )
    if config.join is Join.FPN:
        require(
            2 <= len(config.level_patches) <= len(config.stage_depths),
            f"{config.name}: {len(config.level_patches)} level_patches for {len(config.stage_depths)} stages.",
            f"Give 2 to {len(config.stage_depths)} values, one per trunk stage counted from the last.",
        )
    require(
        config.task is not Task.DETECTION or config.join is Join.FPN,
        f"{config.name}: detection needs a feature pyramid, which the {config.join.value} hybrids lack.",
        f"Choose an {Join.FPN.value}-… model.",
    )
    _check_size(config)
    if config.join is Join.DUAL and config.fusion is Fusion.ADD:
        require(
            config.patch_size == config.stage_strides[-1],
            f"{config.name}: fusion 'add' needs equal grids, but the patches are {config.patch_size} pixels wide "
            f"and the trunk's cells {config.stage_strides[-1]}.",
            f"Set patch_size = {config.stage_strides[-1]}, or fusion = 'concat'.",
        )


def _check_size(config: HybridConfig) -> None:
    step = config.divisor
    height, width = config.image_size
    near = [
        "x".join(str(max(step, edge(side / step) * step)) for side in (height, width))
        for edge in (math.floor, math.ceil)
    ]
    require(
        height % step == 0 and width % step == 0,
        f"{config.name}: images of {height}x{width} do not divide into its grid of {step}x{step} pixels.",
        f"Choose multiples of {step}, such as {' or '.join(dict.fromkeys(near))}.",
    )


def require(holds: bool, problem: str, fix: str) -> None:
    """Raise ``ResvitError`` unless ``holds``."""
    if not holds:
        raise ResvitError(problem, fix)


def _plain(value: Any) -> Any:
    if isinstance(value, enum.Enum):
        return value.value
    return list(value) if isinstance(value, tuple) else value


def show(value: Any) -> str:
    """A value as a message quotes it: tuples without their brackets."""
    return ", ".join(map(str, value)) if isinstance(value, tuple) else str(value)
