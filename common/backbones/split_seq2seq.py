"""Cuts of encoder-decoders: token ids pass the boundary, and adapters of attention train in the whole model."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fedhead.backbones.hf_seq2seq import NextTargets, answer_losses
from fedhead.backbones.split_causal import BASE
from fedhead.errors import UserError

ATTENTION = ("q", "v", "q_proj", "v_proj", "query", "value")
"""Names of the layers that make queries and values."""

COLUMNS = 4
"""Values of a token at the boundary: two digits of its id, and whether it is of an answer and was cut."""


class PairCuts:
    """The only cut of an encoder-decoder, before its first layer.

    Encoder and decoder meet in every block of the decoder, so that no single tensor separates two of them.
    """

    def __init__(self, whole: NextTargets, spec: str) -> None:
        self._whole = whole
        self.module: nn.Module = whole.model
        self.blocks: Sequence[str] = [
            name for half in (whole.model.get_encoder(), whole.model.get_decoder()) for name in self._blocks(half)
        ]
        if not self.blocks or not self.parameters_of(0):
            raise UserError(
                f"{spec} has no layers of queries and values in a list of blocks that adapters could adapt."
            )

    def _blocks(self, half: nn.Module) -> list[str]:
        names = {id(module): name for name, module in self.module.named_modules()}
        found = next((one for one in half.modules() if isinstance(one, nn.ModuleList) and len(one)), nn.ModuleList())
        return [names[id(block)] for block in found]

    def parameters_of(self, block: int) -> Mapping[str, nn.Parameter]:
        """Return the weights of queries and values of a block and the later ones."""
        inside = tuple(f"{name}." for name in self.blocks[block:])
        layers = tuple(f".{name}.weight" for name in ATTENTION)
        named = self.module.named_parameters()
        return {name: one for name, one in named if name.startswith(inside) and name.endswith(layers)}

    def start_of(self, names: Sequence[str]) -> str:
        """Return the only place."""
        return "tokens"

    def place(self, block: int) -> str:
        """Return the only place."""
        return "tokens"

    def shapes(self) -> list[tuple[int | None, ...]]:
        """Return the shape of a conversation at the boundary, for each block."""
        return [(None, COLUMNS)] * len(self.blocks)

    def cut(self, place: str) -> tuple[nn.Module, nn.Module, str]:
        """Return a module that passes tokens on, and the whole model."""
        return _Tokens(self._whole.model.get_input_embeddings()), _Whole(self._whole.model), "model."


class _Tokens(nn.Module):
    """Token ids as numbers; the embeddings are held for their device."""

    def __init__(self, embeddings: nn.Module) -> None:
        super().__init__()
        self.embeddings = embeddings

    def forward(self, input_ids: Tensor, attention_mask: Tensor, targets: Tensor, cut: Tensor) -> Tensor:
        high, low = input_ids.div(BASE, rounding_mode="floor"), input_ids.remainder(BASE)
        return torch.stack([high, low, targets, cut[:, None].expand_as(targets)], dim=-1).float()


class _Whole(nn.Module):
    """The whole model, on token ids and for one site at a time, because it splits a batch into steps."""

    joins_sites = False

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, values: Tensor, mask: Tensor | None = None) -> Tensor:
        assert mask is not None
        high, low, targets, cut = values.float().round().long().unbind(-1)
        return answer_losses(self.model, high * BASE + low, mask, targets, cut[:, 0])
