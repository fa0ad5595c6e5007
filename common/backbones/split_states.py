"""Cuts of transformers' models, without tracing: a hook ends the trunk before a block, another one starts the tail."""

import copy
import inspect
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from fedhead.errors import UserError

NO_FAMILY = ("albert", "deberta", "deberta-v2", "modernbert")
"""Model types whose blocks share weights or take more than one tensor from what runs before them."""


class StateCuts:
    """The cuts of a model of transformers, before each of its blocks.

    Args:
        encoder: holds the model, and returns its last hidden state, one of the others, or its own vector.
        spec: the backbone, for messages.

    Raises:
        UserError: if the model has no list of blocks, or belongs to an unsupported family.
    """

    def __init__(self, encoder: Any, spec: str) -> None:
        self.spec = spec
        self.module: nn.Module = encoder.model
        self.pooled, self.hidden = bool(encoder.pooled), encoder.hidden
        config: Any = self.module.config
        count = getattr(config, "num_hidden_layers", 0)
        lists = [
            name
            for name, module in self.module.named_modules()
            if isinstance(module, nn.ModuleList) and len(module) == count and len({type(one) for one in module}) == 1
        ]
        if config.model_type in NO_FAMILY or len(lists) != 1:
            raise UserError(
                f"{spec} is a model of the family {config.model_type!r}, which cannot be cut into blocks; train the "
                "head alone, or choose another backbone."
            )
        if self.hidden == count:
            raise UserError(f"{spec} cannot be cut for the layer 'hidden:{count}'; use the layer 'penultimate'.")
        self.container = lists[0]
        self.last = count if self.hidden is None else int(self.hidden)
        if not self.last:
            raise UserError(f"{spec} has no blocks below the layer 'hidden:0' that could train.")

    @property
    def blocks(self) -> Sequence[str]:
        """The names of the blocks up to the layer of the features."""
        return [f"{self.container}.{number}" for number in range(self.last)]

    def place(self, block: int) -> str:
        """Return the place before a block."""
        return self.blocks[block]

    def parameters_of(self, block: int) -> Mapping[str, nn.Parameter]:
        """Return the parameters of a block and all that runs later."""
        inside = tuple(f"{name}." for name in self.blocks[block:])
        late = () if self.hidden is not None else self._after
        return {
            name: parameter for name, parameter in self.module.named_parameters() if name.startswith((*inside, *late))
        }

    def start_of(self, names: Sequence[str]) -> str:
        """Return the first block with one of these parameters; the last one for parameters after the blocks."""
        first = (block for block in self.blocks if any(name.startswith(f"{block}.") for name in names))
        return next(first, self.blocks[-1])

    def cut(self, place: str) -> tuple[nn.Module, nn.Module, str]:
        """Return the model before and after a block."""
        number = self.blocks.index(place)
        return Below(self.module, self.container, number), self._above(number), "model."

    def shapes(self) -> list[tuple[int | None, ...]]:
        """Return the shape of a row's activations before each block; None for the length of a text."""
        example = _example(self.module)
        with torch.no_grad():
            values = Below(self.module, self.container, 0)(**example)
        length = None if "input_ids" in example else values.shape[1]
        return [(length, values.shape[2])] * len(self.blocks)

    def _above(self, number: int) -> nn.Module:
        return Above(self.module, self.container, number, self.last, self.pooled, self.hidden is not None)

    @cached_property
    def _after(self) -> tuple[str, ...]:
        """Return the prefixes of the modules that run after the last block: those that follow it in the model."""
        order: list[str] = []
        handles = []
        for name, module in self.module.named_modules():
            direct = any(True for _ in module.parameters(recurse=False))
            if direct or name == f"{self.container}.{self.last - 1}":
                handles.append(module.register_forward_hook(lambda *_, name=name: order.append(name)))
        try:
            with torch.no_grad():
                self.module(**_example(self.module))
        finally:
            for handle in handles:
                handle.remove()
        last = f"{self.container}.{self.last - 1}"
        seen, later = set(order[: order.index(last)]), order[order.index(last) + 1 :]
        # A pooler that the features do not use never trains.
        unused = () if self.pooled else ("pooler.",)
        return tuple(f"{name}." for name in later if name not in seen and not name.startswith(unused))


class _Reached(Exception):  # noqa: N818 - it ends a forward pass and is not an error
    def __init__(self, state: Tensor) -> None:
        self.state = state


def _stop(module: nn.Module, args: Any, kwargs: Any) -> None:
    raise _Reached(args[0] if args else kwargs["hidden_states"])


class Below(nn.Module):
    """A model up to one of its blocks.

    Args:
        model: the whole; it is not modified, and its tensors are shared.
        container: the name of the list of its blocks.
        number: of the block before which it stops.
    """

    def __init__(self, model: nn.Module, container: str, number: int) -> None:
        super().__init__()
        self.model = _shared(model)
        blocks: Any = self.model.get_submodule(container)
        for later in range(number, len(blocks)):
            blocks[later] = _Skip(None)
        blocks[number].register_forward_pre_hook(_stop, with_kwargs=True)

    def forward(self, *images: Tensor, **named: Tensor) -> Tensor:
        try:
            self.model(*images, **named)
        except _Reached as reached:
            return reached.state
        raise AssertionError("the block was not reached")


class _Skip(nn.Module):
    """A block that returns its input as the block that it replaces would.

    Args:
        rest: None for a block that returns a tensor; otherwise what follows the tensor in the tuple.
    """

    def __init__(self, rest: tuple[Any, ...] | None) -> None:
        super().__init__()
        self.rest = rest

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        state = args[0] if args else kwargs["hidden_states"]
        return state if self.rest is None else (state, *self.rest)


class _Start(nn.Module):
    """A source of the stored state: called in place of embeddings, and as a hook before a block."""

    state: Tensor

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.state

    def before(self, module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
        """Replace the hidden states that a block is given."""
        return ((self.state, *args[1:]), kwargs) if args else ((), {**kwargs, "hidden_states": self.state})


class Above(nn.Module):
    """A model from one of its blocks on, with its own masks.

    Args:
        model: the whole; it is not modified, and its tensors are shared.
        container: the name of the list of its blocks.
        start: the number of the block at which it starts.
        stop: the number of blocks up to its output.
        pooled: whether to return the model's own vector.
        early: whether to return the state after `stop` blocks, without the model's final layers.
    """

    def __init__(self, model: nn.Module, container: str, start: int, stop: int, pooled: bool, early: bool) -> None:
        super().__init__()
        rest = _rest(model, container)
        self.model = _shared(model)
        self.pooled = pooled
        self.early = early
        self.start = _Start()
        self.texts = "input_ids" in _example(model)
        blocks: Any = self.model.get_submodule(container)
        for number in range(len(blocks)):
            if not start <= number < stop:
                blocks[number] = _Skip(rest)
        blocks[start].register_forward_pre_hook(self.start.before, with_kwargs=True)
        if early:
            blocks[stop].register_forward_pre_hook(_stop, with_kwargs=True)
        if isinstance(embeddings := getattr(self.model, "embeddings", None), nn.Module):
            # The state replaces the output of the embeddings, so that they do not run.
            embeddings.forward = self.start.forward
        config: Any = self.model.config
        self.size = _image_size(config)
        if hasattr(config, "use_cache"):
            config.use_cache = False

    def forward(self, values: Tensor, mask: Tensor | None = None) -> Tensor:
        if not self.texts:
            return self.of({"pixel_values": values.new_zeros(()).expand(len(values), *self.size)}, values)
        return self.of({"inputs_embeds": values, "attention_mask": mask}, values)

    def of(self, inputs: Mapping[str, Any], values: Tensor) -> Tensor:
        """Return the model's output for inputs of its own, with the states before the first block."""
        self.start.state = values
        try:
            output = self.model(**inputs, return_dict=True)
        except _Reached as reached:
            return reached.state
        if self.pooled:
            vectors: Tensor = output.pooler_output
            return vectors.flatten(1)
        states: Tensor = output.last_hidden_state
        return states


def _shared(model: nn.Module) -> nn.Module:
    """Return a copy of the modules that shares all tensors."""
    tensors = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


def _rest(model: nn.Module, container: str) -> tuple[Any, ...] | None:
    """Return the rest of a block's output after the hidden state; None if it returns the state alone."""
    seen: list[Any] = []
    first = model.get_submodule(f"{container}.0")
    handle = first.register_forward_hook(lambda module, inputs, output: seen.append(output))
    try:
        with torch.no_grad():
            model(**_example(model))
    finally:
        handle.remove()
    return tuple(None for _ in seen[0][1:]) if isinstance(seen[0], tuple) else None


def _example(model: nn.Module) -> dict[str, Tensor]:
    """Return a small input of a model of texts or images."""
    device = next(model.parameters()).device
    if "input_ids" in inspect.signature(model.forward).parameters:
        ids = torch.zeros(1, 2, dtype=torch.int64, device=device)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return {"pixel_values": torch.zeros(1, *_image_size(model.config), device=device)}


def _image_size(config: Any) -> tuple[int, int, int]:
    size = getattr(config, "image_size", 0)
    height, width = (size, size) if isinstance(size, int) else size
    return getattr(config, "num_channels", 3), height, width
