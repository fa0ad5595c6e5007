"""Cuts of causal language models: the targets of the tokens pass the boundary with their states."""

import torch
from torch import Tensor, nn

from fedhead.backbones.hf_causal import NO_TARGET, NextTokens, losses
from fedhead.backbones.packing import Packing
from fedhead.backbones.split_states import Above, Below, StateCuts

BASE = 2048
"""Targets are written with two digits of this base, which float16 holds exactly."""

_ALIKE = 1e-4
"""Largest difference of packed states, relative to the largest."""

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
    """The blocks from one on, with the losses; short conversations share a row if the model keeps them apart there."""

    def __init__(self, whole: NextTokens, container: str, start: int, stop: int) -> None:
        super().__init__(whole.model, container, start, stop, False, False)
        self.output = whole.output
        self.packs: bool | None = None

    def forward(self, values: Tensor, mask: Tensor | None = None) -> Tensor:
        assert mask is not None
        states = self._states(values[..., :-COLUMNS], mask)
        high, low, cut = values[..., -COLUMNS:].float().round().long().unbind(-1)
        targets = torch.where((high >= 0) & (mask > 0), high * BASE + low, NO_TARGET)
        return losses(states, self.output, targets, cut[:, 0])

    def _states(self, values: Tensor, mask: Tensor) -> Tensor:
        """Return the states `[n, length, d]` after the last block."""
        packing = Packing.of(mask) if self.packs is not False else None
        if packing is not None and self.packs is None:
            self.packs = self._keeps_apart(values, mask)
        if packing is None or not self.packs:
            return super().forward(values, mask)
        return packing.unpack(self._packed(packing.pack(values), packing))

    def _packed(self, values: Tensor, packing: Packing) -> Tensor:
        # Without a mask, the library finds the sequences by their positions, and masks them from each other.
        return self.of({"inputs_embeds": values, "attention_mask": None, "position_ids": packing.positions}, values)

    def _keeps_apart(self, values: Tensor, mask: Tensor) -> bool:
        """Return whether the model gives two short sequences the same states in one row as in two."""
        shortest = mask.sum(1).argsort()[:2]
        width = int(mask[shortest].sum())
        rows, marks = values.new_zeros(2, width, values.shape[2]), mask.new_zeros(2, width)
        for at, row in enumerate(shortest.tolist()):
            length = int(mask[row].sum())
            rows[at, :length], marks[at, :length] = values[row, :length], 1
        packing = Packing.of(marks)
        if packing is None:
            return False
        with torch.no_grad(), torch.autocast(values.device.type, enabled=False):
            apart = super().forward(rows, marks)[packing.mask]
            try:
                together = packing.unpack(self._packed(packing.pack(rows), packing))[packing.mask]
            # Models that need a mask, or take no positions, raise errors of many kinds.
            except Exception:
                return False
        return torch.allclose(apart, together, rtol=_ALIKE, atol=_ALIKE * float(apart.abs().max()))
