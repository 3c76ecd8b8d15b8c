"""From a USAD to the graph of an ONNX file."""

import contextlib
import io
import logging
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from models.branches.neighbors import NearestNeighbors
from models.exported.model import OnnxModel
from models.exported.operators import WithOperatorsOfONNX
from models.fusion.usad import USAD
from models.networks.kernels import torchs_own_kernels

OPSET = 20  # the first with GELU
LARGEST_BATCH = 1024
LARGE = 1024  # numbers of a tensor from which on it pays to store them in half precision


class Exportable(nn.Module):
    """Images float32 [B, 3, S, S] in 0 to 1 -> scores [B] (float64) and maps [B, S, S] of all parts in turn.

    The branches lose what no exporter takes: checks of values, memory layouts, searches in blocks.
    """

    def __init__(self, usad: USAD) -> None:
        super().__init__()
        self.usad = usad
        self.networks = nn.ModuleDict({branch.name: branch.backbone for branch in usad.branches})
        for branch in usad.branches:
            branch.backbone.net.to(memory_format=torch.contiguous_format)
            branch.backbone.forward = branch.backbone.features
            for attribute, value in vars(branch).items():
                if isinstance(value, NearestNeighbors):
                    setattr(branch, attribute, WholeSearch(value.rows))

    def forward(self, images: Tensor) -> list[Tensor]:
        parts = self.usad.predict_parts(self.usad.branches[0].backbone.normalized(images))
        return [tensor for part in parts.values() for tensor in (part.scores.double(), part.maps.float())]


class WholeSearch(NearestNeighbors):
    """All queries against all rows at once: how many blocks there would be depends on the batch."""

    def __init__(self, rows: Tensor) -> None:
        super().__init__(rows)
        self.centered = self.rows - self.mean

    def search(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        scores = self.squares - 2 * (queries - self.mean) @ self.centered.mT
        near = scores.argmin(1, keepdim=True) if k == 1 else scores.topk(k, largest=False).indices
        distances = (queries[:, None] - self.rows[near]).square().sum(-1).sqrt()
        distances, order = distances.topk(k, largest=False)  # in rising order
        return distances, near.gather(1, order)


def write_graph(load: Callable[[], USAD], path: Path) -> None:
    """Write the graph of the fusion that `load` gives, in float32, with a free batch dimension."""
    with torchs_own_kernels():
        usad = load()
        net = Exportable(usad)
        images = torch.rand(2, 3, usad.image_size, usad.image_size)
        shapes = ({0: torch.export.Dim("batch", min=1, max=LARGEST_BATCH)},)
        with torch.no_grad(), _quiet():
            net(images)  # what is made at the first pass, such as the matrices of the blur, becomes a constant
            with WithOperatorsOfONNX():
                program = torch.export.export(net, (images,), dynamic_shapes=shapes, strict=False)
            torch.onnx.export(
                program,
                (images,),
                path,
                opset_version=OPSET,
                dynamo=True,
                external_data=False,
                optimize=False,  # onnxruntime does that when it loads the file, in a hundredth of the time
                input_names=["images"],
                output_names=OnnxModel.output_names(usad.parts()),
            )


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


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
