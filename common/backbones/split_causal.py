"""Cuts of causal language models: the targets of the tokens pass the boundary with their states."""

import torch
from torch import Tensor, nn

from fedhead.backbones.hf_causal import NO_TARGET, NextTokens, losses
from fedhead.backbones.split_states import Above, Below, StateCuts

BASE = 2048
"""Targets are written with two digits of this base, which float16 holds exactly."""

COLUMNS = 3
"""Columns after the state of a token: the digits of its target, and whether its conversation was cut."""


class CausalCuts(StateCuts):
    """The cuts of a causal model before each of its blocks; the output layer never trains."""

    def __init__(self, whole: NextTokens, spec: str) -> None:
        super().__init__(whole, spec)
        self.whole = whole

    def cut(self, place: str) -> tuple[nn.Module, nn.Module, str]:
        number = self.blocks.index(place)
        below = _BelowTokens(self.module, self.container, number)
        return below, _AboveTokens(self.whole, self.container, number, self.last), "model."


class _BelowTokens(Below):
    def forward(self, *images: Tensor, **named: Tensor) -> Tensor:
        targets, cut = named.pop("targets"), named.pop("cut")
        states = super().forward(*images, **named)
        digits = torch.stack([targets.div(BASE, rounding_mode="floor"), targets.remainder(BASE)], dim=-1)
        marks = cut[:, None, None].expand(*targets.shape, 1)
        return torch.cat([states, digits.to(states), marks.to(states)], dim=-1)


class _AboveTokens(Above):
    def __init__(self, whole: NextTokens, container: str, start: int, stop: int) -> None:
        super().__init__(whole.model, container, start, stop, False, False)
        self.output = whole.output

    def forward(self, values: Tensor, mask: Tensor | None = None) -> Tensor:
        assert mask is not None
        states = super().forward(values[..., :-COLUMNS], mask)
        high, low, cut = values[..., -COLUMNS:].float().round().long().unbind(-1)
        targets = torch.where((high >= 0) & (mask > 0), high * BASE + low, NO_TARGET)
        return losses(states, self.output, targets, cut[:, 0])
