"""The spine: commands, recipe, pipeline, loading a model, torch → ONNX, the report."""
