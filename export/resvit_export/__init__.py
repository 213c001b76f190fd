"""Takes a trained hybrid of a ResNet and a Vision Transformer to a quantised TensorRT engine, and proves its accuracy."""

from resvit_export.api import Built, Device, build

__all__ = ["Built", "Device", "build"]
