"""A model executed only up to one of its layers: as a graph if it can be traced, otherwise stopped by a hook."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torchvision.models.feature_extraction import NodePathTracer

from fedhead.backbones.blocks import block_names
from fedhead.errors import UserError
from fedhead.registry import suggest

PENULTIMATE = "penultimate"


INSIDE = "inside"
"""Key of a node's metadata: the name of the module that runs it."""

BLOCKS = "blocks"
"""Key of a graph's metadata: the names of the blocks of the model that it was traced from."""


class _Tracer(NodePathTracer):  # type: ignore[misc]
    """Distinguishes buffers from the constants that a model computes, and notes which module runs a node."""

    proxy_buffer_attributes = True

    def create_proxy(self, *args: Any, **kwargs: Any) -> fx.Proxy:
        proxy: fx.Proxy = super().create_proxy(*args, **kwargs)
        proxy.node.meta[INSIDE] = self.current_module_qualname
        return proxy


class Graph:
    """The graph of a model in eval mode, with nodes named by their modules.

    Args:
        model: one that `torch.fx` can trace.
        leaves: classes of modules that are not traced.
        wrapped: functions that are not traced.
    """

    def __init__(
        self,
        model: nn.Module,
        leaves: Sequence[type[nn.Module]] = (),
        wrapped: Sequence[Callable[..., Any]] = (),
    ) -> None:
        self.model = model.eval()
        tracer = _Tracer(leaf_modules=list(leaves), autowrap_functions=list(wrapped))
        self.graph = tracer.trace(self.model)
        self.names = {node: str(name) for node, name in tracer.node_to_qualname.items()}

    @property
    def layers(self) -> list[str]:
        """The names of the nodes, in the order in which they run."""
        return [name for node, name in self.names.items() if node.op not in ("placeholder", "get_attr", "output")]

    def cut(self, layer: str, spec: str) -> fx.GraphModule:
        """Return the computation of `layer`'s output, with only the weights that it needs.

        Args:
            layer: a node, a module (for its last node), or `penultimate` for the classifier's input; several, joined
                by `+`, return their outputs together.
            spec: the backbone, for messages.

        Raises:
            UserError: if there is no such layer.
        """
        nodes = [
            self._classifier_input() if name == PENULTIMATE else self._last_node_of(name, spec)
            for name in layer.split("+")
        ]
        graph, copies = fx.Graph(), dict[fx.Node, fx.Node]()
        graph.graph_copy(self.graph, copies)
        outputs = tuple(copies[node] for node in nodes)
        graph.output(outputs if len(outputs) > 1 else outputs[0])
        for later in reversed(graph.nodes):
            if not later.users and later.op not in ("placeholder", "output"):
                graph.erase_node(later)
        cut = fx.GraphModule(self.model, graph, type(self.model).__name__).eval()
        cut.meta[BLOCKS] = block_names(self.model)
        return cut

    def whole(self) -> fx.GraphModule:
        """Return the computation of the model's own output."""
        whole = fx.GraphModule(self.model, self.graph, type(self.model).__name__).eval()
        whole.meta[BLOCKS] = block_names(self.model)
        return whole

    def _last_node_of(self, layer: str, spec: str) -> fx.Node:
        inside: list[fx.Node] = [
            node for node, name in self.names.items() if name == layer or name.startswith(f"{layer}.")
        ]
        if not inside:
            raise UserError(f"{spec} has no layer {layer!r}. {suggest(layer, self.layers)}")
        return inside[-1]

    def _classifier_input(self) -> fx.Node:
        modules = dict(self.model.named_modules())
        classifier = next(
            node
            for node in reversed(self.graph.nodes)
            if node.op == "call_module" and isinstance(modules[str(node.target)], nn.Linear | nn.Conv2d)
        )
        entry: fx.Node = classifier.all_input_nodes[0]
        return entry


class Stopped(nn.Module):
    """A module that runs until one of its layers has returned its output for the first time.

    Args:
        module: run in eval mode; must not be used otherwise afterwards.
        layer: the name of a module inside it.
        spec: the backbone, for messages.
        batch: an input of `module`, for determining which weights are used up to the layer.

    Raises:
        UserError: if there is no such layer, it does not run, or its output is not a tensor.
    """

    def __init__(self, module: nn.Module, layer: str, spec: str, batch: Tensor | Mapping[str, Tensor]) -> None:
        super().__init__()
        modules = dict(module.eval().named_modules())
        if not layer or layer not in modules:
            raise UserError(f"{spec} has no layer {layer!r}. {suggest(layer, module_layers(module))}")
        self.module = module
        self.layer = layer
        self.spec = spec
        modules[layer].register_forward_hook(_stop)
        self.used = _names_used(module, lambda: self(**batch) if isinstance(batch, Mapping) else self(batch))

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        try:
            self.module(*args, **kwargs)
        except _Reached as reached:
            output = reached.output[0] if isinstance(reached.output, tuple | list) else reached.output
            if not isinstance(output, Tensor):
                raise UserError(
                    f"Layer {self.layer!r} of {self.spec} returns a {type(output).__name__}, not a tensor."
                ) from None
            return output
        raise UserError(f"Layer {self.layer!r} of {self.spec} is not reached by an input.")

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Return the weights that are used, under their names in the module."""
        state = self.module.state_dict(*args, **kwargs)
        return {name: tensor for name, tensor in state.items() if name in self.used}

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Load weights under their names in the module."""
        return self.module.load_state_dict(*args, **kwargs)


def module_layers(module: nn.Module) -> list[str]:
    """Return the names of the modules inside `module`."""
    return [name for name, _ in module.named_modules() if name]


class _Reached(Exception):  # noqa: N818 - it ends a forward pass and is not an error
    def __init__(self, output: Any) -> None:
        self.output = output


def _stop(module: nn.Module, inputs: Any, output: Any) -> None:
    raise _Reached(output)


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records the memory that operations read."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.read: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        leaves = tree_leaves((args, kwargs or {}))
        self.read.update(_memory(leaf) for leaf in leaves if isinstance(leaf, Tensor))
        return func(*args, **(kwargs or {}))


def _names_used(module: nn.Module, run: Callable[[], Tensor]) -> frozenset[str]:
    """Return the names of the tensors in the module's state that `run` reads."""
    with torch.no_grad(), _Recorder() as recorder:
        run()
    return frozenset(name for name, tensor in module.state_dict().items() if _memory(tensor) in recorder.read)


def _memory(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)
