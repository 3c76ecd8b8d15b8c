"""The same network with fewer layers: what follows a layer is folded into its weights or computed in its kernel."""

import contextlib
import operator
from collections import Counter
from collections.abc import Callable

import torch
from torch import fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

SUMS = (operator.add, operator.iadd, torch.add)


def fold_batch_norms(net: nn.Module) -> None:
    """Fold batch norms into the convolutions before them that nothing else reads, in place, if it can be traced."""
    graph, lonely = _trace(net, nn.BatchNorm2d)
    modules = dict(net.named_modules())
    for node in graph.nodes:
        if not _calls(node, modules, nn.BatchNorm2d):
            continue
        before = node.args[0]
        if _calls(before, modules, nn.Conv2d) and len(before.users) == 1 and before.target in lonely:
            net.set_submodule(before.target, fuse_conv_bn_eval(modules[before.target], modules[node.target]))
            net.set_submodule(node.target, nn.Identity())


def fold_layer_scales(net: nn.Module) -> None:
    """Fold the LayerScale factors of a ViT's blocks into the linear layers before them, in place."""
    from timm.layers import LayerScale
    from timm.models.vision_transformer import Block

    for block in net.modules():
        if type(block) is not Block:
            continue
        for name, layer in (("ls1", getattr(block.attn, "proj", None)), ("ls2", getattr(block.mlp, "fc2", None))):
            scale = getattr(block, name)
            if type(scale) is LayerScale and type(layer) is nn.Linear:
                layer.weight = nn.Parameter(layer.weight * scale.gamma[:, None], requires_grad=False)
                if layer.bias is not None:
                    layer.bias = nn.Parameter(layer.bias * scale.gamma, requires_grad=False)
                setattr(block, name, nn.Identity())


def fuse_gelus(net: nn.Module, kernel: Callable[[nn.Linear], nn.Module]) -> None:
    """Let `kernel(linear)`, a module whose forward(x) gives gelu(linear(x)), start timm's MLPs, in place."""
    from timm.layers import Mlp

    for module in net.modules():
        is_ours = type(module) is Mlp and type(module.act) is nn.GELU and type(module.fc1) is nn.Linear
        if is_ours and module.act.approximate == "none":
            module.act = nn.Identity()
            module.fc1 = kernel(module.fc1)


def fuse_relus(net: nn.Module, kernel: Callable[[nn.Conv2d], nn.Module]) -> nn.Module:
    """The network with each ReLU, and the sum before it, computed by the convolution before them.

    `kernel(conv)` is a module whose forward(x, added=None) gives relu(conv(x) + added). Batch norms must have been
    folded before. A network that cannot be traced is returned as it is.
    """
    graph, lonely = _trace(net, nn.ReLU)
    if not graph.nodes:
        return net
    modules = dict(net.named_modules())
    for node in list(graph.nodes):
        if _calls(node, modules, nn.Identity):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)

    def fusible(node: object) -> bool:
        if not _calls(node, modules, nn.Conv2d) or len(node.users) > 1 or node.target not in lonely:
            return False
        return modules[node.target].padding_mode == "zeros" and not isinstance(modules[node.target].padding, str)

    for node in list(graph.nodes):
        if not _calls(node, modules, nn.ReLU):
            continue
        before = node.args[0]
        if fusible(before):
            conv, added = before, ()
        elif before.op == "call_function" and before.target in SUMS and len(before.users) == 1:
            conv = next((term for term in before.args if fusible(term)), None)
            added = tuple(term for term in before.args if term is not conv)
        else:
            continue
        if conv is None or not all(isinstance(term, fx.Node) for term in added):
            continue
        net.set_submodule(conv.target, kernel(modules[conv.target]))
        with graph.inserting_before(node):
            fused = graph.call_module(conv.target, (conv.args[0], *added))
        node.replace_all_uses_with(fused)
        for gone in dict.fromkeys((node, before, conv)):
            graph.erase_node(gone)
    return fx.GraphModule(net, graph)


def _trace(net: nn.Module, kind: type[nn.Module]) -> tuple[fx.Graph, set[str]]:
    """The network's graph, empty unless it has layers of `kind`, and the paths of modules that are called just once."""
    graph = fx.Graph()
    if any(type(module) is kind for module in net.modules()):
        with contextlib.suppress(Exception):  # control flow that depends on values makes tracing fail in many ways
            graph = fx.symbolic_trace(net).graph
    calls = Counter(node.target for node in graph.nodes if node.op == "call_module")
    return graph, {path for path, count in calls.items() if count == 1}


def _calls(node: object, modules: dict[str, nn.Module], kind: type[nn.Module]) -> bool:
    return isinstance(node, fx.Node) and node.op == "call_module" and type(modules[node.target]) is kind
