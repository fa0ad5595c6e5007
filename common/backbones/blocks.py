"""Blocks of a model: the parts into which its own structure of modules divides it."""

from collections import Counter

from torch import nn

LISTS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


def block_names(model: nn.Module) -> list[str]:
    """Return the names of a model's blocks, in the order of their definition.

    A block is a residual block, a Transformer's layer or the like; in a plain chain, a single convolution or linear
    layer. Stages and other modules that only hold blocks are divided further.
    """
    names: list[str] = []
    _visit("", model, names)
    return names


def _visit(name: str, module: nn.Module, names: list[str]) -> None:
    if name and not _holds_blocks(module):
        names.append(name)
        return
    for child_name, child in module.named_children():
        if _weighs(child):
            _visit(f"{name}.{child_name}" if name else child_name, child, names)


def _weighs(module: nn.Module) -> bool:
    """Return whether a module has matrices or kernels, unlike a normalisation."""
    return any(parameter.ndim > 1 for parameter in module.parameters())


def _holds_blocks(module: nn.Module) -> bool:
    weighing = [child for child in module.children() if _weighs(child)]
    if isinstance(module, LISTS):
        return len(weighing) > 1
    direct = any(parameter.ndim > 1 for parameter in module.parameters(recurse=False))
    if len(weighing) == 1 and not direct and not isinstance(weighing[0], LISTS) and list(weighing[0].children()):
        return True
    return any(isinstance(child, LISTS) and _repeats(child) for child in weighing)


def _repeats(module: nn.Module) -> bool:
    """Return whether a list holds several composite modules of one class, or lists of such."""
    composite = [child for child in module.children() if list(child.children())]
    classes = Counter(type(child) for child in composite if not isinstance(child, LISTS))
    return any(count > 1 for count in classes.values()) or any(
        isinstance(child, LISTS) and _repeats(child) for child in composite
    )
