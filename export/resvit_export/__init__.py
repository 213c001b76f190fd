"""Takes a trained ResNet+ViT hybrid to a quantised TensorRT engine, and proves on the way that accuracy survived."""

from resvit_export.api import Built, Device, build

__all__ = ["Built", "Device", "build"]
