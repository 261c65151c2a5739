"""What an ONNX file says of itself, and how one is written."""
