"""Cuts of a model that `torch.fx` can trace: the boundary is the one tensor in use before the first node of a layer."""

import inspect
import traceback
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from fedhead.backbones.blocks import block_names
from fedhead.backbones.layers import BLOCKS, INSIDE, Graph, Stopped
from fedhead.errors import UserError
from fedhead.wording import listed


class GraphCuts:
    """The cuts of a traced model.

    Args:
        module: a traced graph, or a module that can be traced.
        example: a batch `[n, channels, height, width]` of at least two rows.
        spec: the backbone, for messages.

    Raises:
        UserError: if it cannot be traced.
    """

    def __init__(self, module: nn.Module, example: Tensor, spec: str) -> None:
        self.spec = spec
        self.example = example
        self.module = module if isinstance(module, fx.GraphModule) else _traced(module, spec)
        self.nodes = list(self.module.graph.nodes)
        self._position = {node: position for position, node in enumerate(self.nodes)}
        names = self.module.meta.get(BLOCKS) or block_names(self.module)
        self._starts = self._merged(names)
        if not self._starts:
            raise UserError(f"{spec} has no layers that could train.")

    @property
    def blocks(self) -> Sequence[str]:
        """The names of the blocks, in the order in which they run."""
        return list(self._starts)

    def place(self, block: int) -> str:
        """Return the place before a block."""
        return self.blocks[block]

    def parameters_of(self, block: int) -> Mapping[str, nn.Parameter]:
        """Return the parameters used from a block on, and nowhere before."""
        start = self._starts[self.blocks[block]]
        return {name: parameter for name, (parameter, first) in self._used.items() if first >= start}

    def start_of(self, names: Sequence[str]) -> str:
        """Return the layer that first uses these parameters."""
        return _title(self.nodes[min(self._used[name][1] for name in names)])

    def cut(self, place: str) -> tuple[nn.Module, nn.Module, str]:
        """Return the graphs before and after a place.

        Raises:
            UserError: if several tensors cross.
        """
        start = self._starts.get(place)
        if start is None:
            inside = (node for node in self.nodes if node.name == place or _is_inside(node, place))
            start = self._position[next(inside)]
        crossing = self._crossing(start)
        if len(crossing) != 1:
            raise UserError(
                f"{self.spec} cannot be cut before {place!r}: {len(crossing)} tensors cross there"
                f"{', the outputs of ' if crossing else ''}{listed([_title(node) for node in crossing], 4)}. Choose "
                f"another layer, such as "
                f"{self._block_before(start)!r}."
            )
        boundary = crossing[0]
        return self._below(boundary), self._above(boundary, start), ""

    def shapes(self) -> list[tuple[int | None, ...]]:
        """Return the shape of a row's activations before each block."""
        boundaries = [self._crossing(start)[0] for start in self._starts.values()]
        recorder = _Recorder(self.module, set(boundaries))
        with torch.no_grad():
            recorder.run(self.example[:1])
        return [tuple(recorder.values[node].shape[1:]) for node in boundaries]

    @cached_property
    def _used(self) -> dict[str, tuple[nn.Parameter, int]]:
        """The parameters by name, each with the position of the first node that uses it."""
        found: dict[str, tuple[nn.Parameter, int]] = {}
        modules, parameters = dict(self.module.named_modules()), dict(self.module.named_parameters())
        for position, node in enumerate(self.nodes):
            if node.op == "call_module":
                for name, parameter in modules[str(node.target)].named_parameters(str(node.target)):
                    found.setdefault(name, (parameter, position))
            elif node.op == "get_attr" and str(node.target) in parameters:
                first = min((self._position[user] for user in node.users), default=position)
                found.setdefault(str(node.target), (parameters[str(node.target)], first))
        return found

    def _merged(self, names: Sequence[str]) -> dict[str, int]:
        """Return the blocks with their first nodes; one that several tensors enter belongs to the one before."""
        weighing = [name for name, (parameter, _) in self._used.items() if parameter.ndim > 1]
        ordered = sorted(
            (start, name)
            for name in names
            if (start := self._first(name)) is not None and any(used.startswith(f"{name}.") for used in weighing)
        )
        merged: list[tuple[int, list[str]]] = []
        for start, name in ordered:
            before = merged[-1][0] if merged else -1
            # A block that starts with a shortcut has one input only before the shortcut leaves it.
            for candidate in (name, *outer_layers(name)):
                first = self._first(candidate)
                if first is not None and before < first <= start and len(self._crossing(first)) == 1:
                    merged.append((first, [candidate]))
                    break
            else:
                if merged:
                    merged[-1][1].append(name)
        return {_common(members): start for start, members in merged}

    def _first(self, name: str) -> int | None:
        """Return the position of the first node inside a module."""
        return next((position for position, node in enumerate(self.nodes) if _is_inside(node, name)), None)

    def _block_before(self, start: int) -> str:
        earlier = [name for name, first in self._starts.items() if first <= start]
        return earlier[-1] if earlier else self.blocks[0]

    def _crossing(self, start: int) -> list[fx.Node]:
        """Return the nodes before a position whose values are used after it, without constants and sizes."""
        return [
            node
            for node in self.nodes[:start]
            if node not in self._constant
            and any(self._position[user] >= start for user in node.users)
            and not (node in self._sized and self._sizes[node] is not None)
        ]

    @cached_property
    def _constant(self) -> set[fx.Node]:
        """The nodes that do not depend on the input."""
        constant: set[fx.Node] = set()
        placeholders = [node for node in self.nodes if node.op == "placeholder"]
        for node in self.nodes:
            # Optional inputs keep their defaults.
            if (
                node.op == "get_attr"
                or node in placeholders[1:]
                or (node.op.startswith("call_") and all(one in constant for one in node.all_input_nodes))
            ):
                constant.add(node)
        return constant

    @cached_property
    def _sized(self) -> set[fx.Node]:
        """The nodes that depend on the sizes of tensors alone, and are numbers themselves."""
        sized: set[fx.Node] = set()
        for node in self.nodes:
            of_sizes = bool(node.all_input_nodes) and all(one in sized for one in node.all_input_nodes)
            if (
                (node.target is getattr and node.args[1] == "shape")
                or (node.op == "call_method" and node.target == "size")
                or (of_sizes and getattr(node.target, "__module__", "") in ("_operator", "math"))
            ):
                sized.add(node)
        return sized

    @cached_property
    def _sizes(self) -> dict[fx.Node, Any]:
        """The values of the sizes, with `ROWS` for the number of rows; None for others that depend on it."""
        runs = []
        for rows in (1, 2):
            recorder = _Recorder(self.module, self._sized)
            with torch.no_grad():
                recorder.run(self.example[:rows])
            runs.append(recorder.values)
        return {node: _general(one, runs[1][node]) for node, one in runs[0].items()}

    def _below(self, boundary: fx.Node) -> fx.GraphModule:
        graph, copies = fx.Graph(), dict[fx.Node, Any]()
        for node in self.nodes[: self._position[boundary] + 1]:
            copies[node] = self._copy(node, graph, copies)
        graph.output(copies[boundary])
        return _pruned(self.module, graph)

    def _above(self, boundary: fx.Node, start: int) -> fx.GraphModule:
        graph = fx.Graph()
        values = graph.placeholder("values")
        copies: dict[fx.Node, Any] = {boundary: values}
        rows = graph.call_method("size", (values, 0))
        for node in self.nodes[:start]:
            if node in self._sized and any(self._position[user] >= start for user in node.users):
                copies[node] = _written(self._sizes[node], rows)
        for position, node in enumerate(self.nodes):
            if node not in copies and (position >= start or node in self._constant):
                copies[node] = self._copy(node, graph, copies)
        return _pruned(self.module, graph)

    def _copy(self, node: fx.Node, graph: fx.Graph, copies: Mapping[fx.Node, Any]) -> Any:
        if node.op == "placeholder" and node in self._constant:
            return node.args[0] if node.args else None
        return graph.node_copy(node, copies.__getitem__)


ROWS = "rows"


def _general(one: Any, two: Any) -> Any:
    """Return a size for any number of rows, from its values for one row and for two."""
    if isinstance(one, tuple):
        parts = tuple(_general(*pair) for pair in zip(one, two, strict=True))
        return None if None in parts else parts
    if not isinstance(one, int):
        return None
    return one if one == two else ROWS if (one, two) == (1, 2) else None


def _written(size: Any, rows: fx.Node) -> Any:
    return tuple(_written(one, rows) for one in size) if isinstance(size, tuple) else rows if size == ROWS else size


class _Recorder(fx.Interpreter):
    """Notes the values of some nodes."""

    def __init__(self, module: fx.GraphModule, nodes: set[fx.Node]) -> None:
        super().__init__(module)
        self.nodes = nodes
        self.values: dict[fx.Node, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n in self.nodes:
            self.values[n] = value
        return value


def _pruned(module: nn.Module, graph: fx.Graph) -> fx.GraphModule:
    for node in reversed(graph.nodes):
        if not node.users and node.op not in ("placeholder", "output"):
            graph.erase_node(node)
    return fx.GraphModule(module, graph, type(module).__name__).eval()


def _is_inside(node: fx.Node, layer: str) -> bool:
    names = [str(node.meta.get(INSIDE, ""))]
    if node.op in ("call_module", "get_attr"):
        names.append(str(node.target))
    return any(name == layer or name.startswith(f"{layer}.") for name in names)


def _title(node: fx.Node) -> str:
    return str(node.target) if node.op == "call_module" else str(node.meta.get(INSIDE) or node.name)


def outer_layers(name: str) -> list[str]:
    """Return the modules that hold a module, the innermost first."""
    parts = name.split(".")
    return [".".join(parts[:count]) for count in range(len(parts) - 1, 0, -1)]


def _common(names: Sequence[str]) -> str:
    """Return the module that holds all of these, or the first of them."""
    if len(names) == 1:
        return names[0]
    parts = zip(*(name.split(".") for name in names), strict=False)
    shared = []
    for same in parts:
        if len(set(same)) > 1:
            break
        shared.append(same[0])
    return ".".join(shared) or names[0]


def _traced(module: nn.Module, spec: str) -> fx.GraphModule:
    if isinstance(module, Stopped):
        raise UserError(f"{spec} stops at layer {module.layer!r}; only its last layer, 'penultimate', can be tuned.")
    leaves, wrapped = _timm_leaves() if spec.startswith("timm:") else ((), ())
    try:
        return Graph(module, leaves, wrapped).whole()
    # Control flow that depends on values fails in various ways.
    except Exception as error:
        reason = str(error).strip().partition("\n")[0].rstrip(".")
        raise UserError(
            f"{spec} cannot be cut, since its code decides by the values of tensors: {_where(error)}{reason}. "
            "Train the head alone, or choose another backbone."
        ) from None


def _where(error: BaseException) -> str:
    """Return the innermost module's class and line in an error's traceback, as the start of a sentence."""
    calls = [
        (frame.f_code.co_name, frame.f_locals.get("self"), line)
        for frame, line in traceback.walk_tb(error.__traceback__)
    ]
    forwards = [(module, line) for name, module, line in calls if "forward" in name and isinstance(module, nn.Module)]
    if not forwards:
        return ""
    module, line = forwards[-1]
    return f"{type(module).__name__}, line {line} of {Path(inspect.getfile(type(module))).name}: "


def _timm_leaves() -> tuple[Sequence[type[nn.Module]], Sequence[Callable[..., Any]]]:
    """Return the modules and functions that timm itself does not trace."""
    layers: Any = import_module("timm.layers")
    return layers.get_notrace_modules(), layers.get_notrace_functions()
