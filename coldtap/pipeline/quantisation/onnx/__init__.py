"""A quantised backbone as an ONNX file."""
