"""The choices of the recipe that no other wing defines. The others are where they are used: ``Precision``, ``Effort``,
what is pruned (``Kind``) and by what (``Importance``)."""

from __future__ import annotations

import enum


class Choice(str, enum.Enum):
    """One of a few named values; it prints, compares and is written as its text."""

    def __str__(self) -> str:
        return str(self.value)


class StageName(Choice):
    """The stages that are commands, in the order in which they run."""

    PRUNE = "prune"
    FOLD = "fold"
    EXPORT = "export"
    CALIBRATE = "calibrate"
    QUANTIZE = "quantize"
    FUSE = "fuse"
    VALIDATE = "validate"
    COMPILE = "compile"
    BUNDLE = "bundle"

    @property
    def upto(self) -> tuple[StageName, ...]:
        """This stage and all before it."""
        stages = tuple(StageName)
        return stages[: stages.index(self) + 1]


class Quantizer(Choice):
    """Whose quantiser."""

    RESVIT = "resvit"
    """Our own."""
    MODELOPT = "modelopt"
    """The ONNX quantiser of NVIDIA ModelOpt."""


class InputType(Choice):
    """What the engine reads; its outputs are FP16 in all but the first."""

    FP32 = "fp32"
    FP16 = "fp16"
    INT8 = "int8"
    """What the first QuantizeLinear would write: the host does it with its scale."""
    UINT8 = "uint8"
    """The pixels; the graph normalises them."""


class Calibrator(Choice):
    """How the range of an activation is chosen."""

    OUTPUT = "output"
    """The least error at the layer's output; the others look at the tensor alone, as ``Estimator`` says."""
    MSE = "mse"
    PERCENTILE = "percentile"
    ENTROPY = "entropy"
    MAX = "max"


class Recovery(Choice):
    """When the weights are trained against the float model."""

    AUTO = "auto"
    """Where calibration alone is rejected and there are training images."""
    ALWAYS = "always"
    NEVER = "never"


class TaskKind(Choice):
    """What the network is for."""

    AUTO = "auto"
    """Told by what is known of the images, else by the outputs."""
    CLASSIFICATION = "classification"
    DETECTION = "detection"
    SEGMENTATION = "segmentation"
    DEPTH = "depth"
    EMBEDDING = "embedding"
    """A vector for the image, by which images of its class are found."""
    TEXT = "text"
    """What is written in the image."""
    OTHER = "other"
    """By a metric of the user's own, or by how near the outputs are."""


class Plugins(Choice):
    """Whether kernels of our own take over what they can."""

    AUTO = "auto"
    """Where they are measured to be faster."""
    ON = "on"
    OFF = "off"


class Tuning(Choice):
    """How long variants of the placement are timed on the machine that runs them."""

    QUICK = "quick"
    """Every region once, in some seconds each."""
    DEFAULT = "default"
    THOROUGH = "thorough"
    """Until nothing changes, in many rounds."""


class PluginAttention(Choice):
    """What our attention kernel multiplies in."""

    FP16 = "fp16"
    EIGHT_BITS = "8bit"
    """In the precision of the build."""


class Sparsity(Choice):
    """Which weights are zero."""

    TWO_OF_FOUR = "2:4"
    """Two of four, which sparse tensor cores skip."""
