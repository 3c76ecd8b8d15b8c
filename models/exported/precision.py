"""Smaller files: weights in half precision, or networks in integers of 8 bits."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np

from utils.errors import InputError

LARGE = 1024  # numbers of a tensor from which on it pays to store it otherwise
NETWORKS = "/networks."  # in the name space of a node that belongs to a network (models/exported/export.py)


def halve_weights(path: Path) -> None:
    """Store large float32 tensors in half precision; they become float32 again when the file is loaded."""
    import onnx

    model = onnx.load(path)
    casts = []
    for tensor in model.graph.initializer:
        values = onnx.numpy_helper.to_array(tensor)
        if values.dtype != np.float32 or values.size < LARGE or np.abs(values).max() > np.finfo(np.float16).max:
            continue
        name = tensor.name
        tensor.CopyFrom(onnx.numpy_helper.from_array(values.astype(np.float16), f"{name}_half"))
        casts.append(onnx.helper.make_node("Cast", [tensor.name], [name], f"{name}_single", to=onnx.TensorProto.FLOAT))
    nodes = [*casts, *model.graph.node]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    onnx.save(model, path)


def quantize_networks(path: Path, frames: Iterable[np.ndarray]) -> None:
    """Let the networks' products with weights compute in integers, scaled for `frames` [1, 3, S, S], normal ones.

    Weights get 7 bits, with which no processor's sums overflow. Raises InputError if no layer is large enough.
    """
    from onnxruntime import quantization

    class Frames(quantization.CalibrationDataReader):
        def __init__(self) -> None:
            self.inputs = ({"images": frame} for frame in frames)

        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(self.inputs, None)

    own = layers_of_networks(path)
    fold_constants(path)
    names = [name for name in layers_with_large_weights(path) if name in own]
    if not names:
        raise InputError("--precision int8 has no effect on networks without large layers; leave it out, or take fp16")
    quantization.quantize_static(
        path,
        path,
        Frames(),
        quant_format=quantization.QuantFormat.QDQ,
        nodes_to_quantize=names,
        per_channel=True,
        reduce_range=True,
    )


def layers_of_networks(path: Path) -> set[str]:
    """The names of the nodes that come from the networks' own code."""
    import onnx

    nodes = onnx.load(path).graph.node
    return {node.name for node in nodes if any(NETWORKS in entry.value for entry in node.metadata_props)}


def fold_constants(path: Path) -> None:
    """Replace what does not depend on the input, such as transposed weights, by its value."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.log_severity_level = 3  # errors
    options.optimized_model_filepath = str(path)
    onnxruntime.InferenceSession(path.read_bytes(), options, providers=["CPUExecutionProvider"])


def layers_with_large_weights(path: Path) -> list[str]:
    """The names of convolutions and products with large constant weights."""
    import onnx

    graph = onnx.load(path).graph
    large = {tensor.name for tensor in graph.initializer if np.prod(tensor.dims) >= LARGE}
    kinds = ("Conv", "MatMul", "Gemm")
    return [node.name for node in graph.node if node.op_type in kinds and large.intersection(node.input)]
