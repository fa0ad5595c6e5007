"""The layers of a backbone that train, chosen by a tune specification, and the place of the cut below them."""

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Protocol

from torch import nn

from fedhead.backbones.adapters import layers_to_adapt
from fedhead.backbones.split_graph import outer_layers
from fedhead.errors import UserError
from fedhead.registry import suggest
from fedhead.tuning import TuneSpec


class Cuts(Protocol):
    """The places at which a model can be cut, in the order in which it runs."""

    @property
    def module(self) -> nn.Module:
        """The whole model."""
        ...

    @property
    def blocks(self) -> Sequence[str]:
        """The names of the blocks, in the order in which they run."""
        ...

    def parameters_of(self, block: int) -> Mapping[str, nn.Parameter]:
        """Return the parameters that train if this block and the later ones do."""
        ...

    def start_of(self, names: Sequence[str]) -> str:
        """Return the place before the first use of these parameters."""
        ...

    def place(self, block: int) -> str:
        """Return the place before a block."""
        ...

    def shapes(self) -> list[tuple[int | None, ...]]:
        """Return the shape of a row's activations before each block; None for the length of a text."""
        ...

    def cut(self, place: str) -> tuple[nn.Module, nn.Module, str]:
        """Return the modules before and after a place, sharing the model's tensors, and the prefix of the names."""
        ...


def choose(cuts: Cuts, tune: TuneSpec, spec: str) -> tuple[str, list[str]]:
    """Return the place of the cut, and the names of the parameters of the chosen layers.

    Raises:
        UserError: if the backbone has fewer blocks than were asked for, or no such layers.
    """
    if not tune.patterns:
        count = len(cuts.blocks) if tune.where == "all" else tune.blocks or 0
        if count > len(cuts.blocks):
            if tune.chosen:
                raise UserError(
                    f"{spec} has {len(cuts.blocks)} blocks, so {tune.where!r} is too many. "
                    f"'fedhead backbones show {spec} --layers' names them."
                )
            count = len(cuts.blocks)
        first = len(cuts.blocks) - count
        names = list(cuts.parameters_of(first))
        return cuts.place(first), names
    every = list(cuts.parameters_of(0))
    for pattern in tune.patterns:
        if not any(_matches(name, pattern) for name in every):
            layers = sorted({outer for name in every for outer in outer_layers(name)})
            raise UserError(f"{spec} has no layer {pattern!r} with parameters. {suggest(pattern, layers)}")
    names = [name for name in every if any(_matches(name, pattern) for pattern in tune.patterns)]
    return cuts.start_of(names), names


def of_method(module: nn.Module, names: Sequence[str], tune: TuneSpec, spec: str) -> list[str]:
    """Return the parameters that a method trains, or with LoRA the weights that it adapts.

    Raises:
        UserError: if the chosen layers have none.
    """
    chosen, what = set(names), "parameters"
    if tune.method == "bitfit":
        chosen, what = {name for name in names if name.rpartition(".")[2] == "bias"}, "biases"
    elif tune.method == "norm":
        chosen, what = _norm_parameters(module) & chosen, "normalisation with scale and shift"
    elif tune.method == "lora":
        chosen, what = {f"{name}.weight" for name in layers_to_adapt(module, chosen)}, "linear layers or convolutions"
    if not chosen:
        raise UserError(f"The layers {tune.where!r} of {spec} have no {what} that could train.")
    return sorted(chosen)


def weight_of(name: str) -> str:
    """Return the name of the weight that a parameter of an adapter belongs to; others are their own."""
    layer, adapter, _ = name.partition(".lora_")
    return f"{layer}.weight" if adapter else name


def depths_of(cuts: Cuts, names: Sequence[str]) -> dict[str, int]:
    """Return the number of blocks above the one that each parameter is in."""
    above = {name: len(cuts.blocks) - 1 for name in names}
    for block in range(len(cuts.blocks)):
        above |= dict.fromkeys(above.keys() & cuts.parameters_of(block).keys(), len(cuts.blocks) - 1 - block)
    return above


def names_by_stage(cuts: Cuts, stages: Sequence[TuneSpec], trained: Sequence[str], spec: str) -> list[list[str]]:
    """Return the names of the parameters that train in each stage.

    Raises:
        UserError: if one does not train all that the stage before it trains.
    """
    found: list[list[str]] = []
    for stage in stages:
        weights: set[str] = set()
        if stage.method != "head":
            _, names = choose(cuts, stage, spec)
            weights = set(of_method(cuts.module, names, stage, spec))
        if missing := sorted(weights - {weight_of(name) for name in trained}):
            raise UserError(
                f"The schedule is out of order: its stage {str(stage)!r} trains {missing[0]!r}, and its last stage "
                "does not. Each stage trains what the stage before it trains, and more."
            )
        now = [name for name in trained if weight_of(name) in weights]
        if found and not set(now) > set(found[-1]):
            raise UserError(
                f"The schedule is out of order: its stage {str(stage)!r} does not train what the stage before it "
                "trains, and more."
            )
        found.append(now)
    return found


def _norm_parameters(module: nn.Module) -> set[str]:
    """Return the names of the scales and shifts of normalisations."""
    return {
        f"{name}.{own}"
        for name, inside in module.named_modules()
        if "norm" in type(inside).__name__.lower()
        for own, parameter in inside.named_parameters(recurse=False)
        if parameter.ndim == 1
    }


def _matches(name: str, pattern: str) -> bool:
    return name.startswith(f"{pattern}.") or name == pattern or fnmatchcase(name, pattern)
