"""Every call into ONNX Runtime of the device wing: it is imported when it is used."""
