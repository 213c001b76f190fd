"""Everything that runs on or for a device. Needs neither torch nor onnx."""
