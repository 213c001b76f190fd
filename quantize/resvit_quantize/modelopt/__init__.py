"""NVIDIA ModelOpt's own ONNX quantiser."""
