"""From an exported program, or the user's own file, to the float ONNX in canonical form."""
