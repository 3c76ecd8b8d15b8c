"""A fusion as one ONNX file, and such files as models. `model.py` runs them without PyTorch."""

FORMAT = "usad-onnx-1"  # the file's metadata hold a JSON text under this name
EDGE, EXPORT = "requirements-edge.txt", "requirements-export.txt"
