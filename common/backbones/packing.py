"""Packing: short sequences one after the other in fewer rows, so that less padding is computed."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

WORTH = 0.9
"""Share of the padded elements below which packing pays for its copies."""


@dataclass(frozen=True)
class Packing:
    """Places of `n` sequences in `rows` rows of the same width as the longest sequence.

    Attributes:
        places: `[n, length]`, the place of each element in the flattened rows; 0 for padding.
        mask: `[n, length]`, bool, False for padding.
        positions: `[rows, length]`, the position of each element in its own sequence; it restarts at 0 with each
            sequence, and with the unused end of a row.
    """

    places: Tensor
    mask: Tensor
    positions: Tensor

    @classmethod
    def of(cls, mask: Tensor) -> Self | None:
        """Return the packing of padded sequences by first fit, longest first; None if it saves little.

        Args:
            mask: `[n, length]`, 0 for padding, which follows each sequence.
        """
        lengths = mask.sum(1).long().tolist()
        width = mask.shape[1]
        rows = _first_fit(lengths, width)
        if len(rows) > WORTH * len(lengths):
            return None
        starts, positions = [0] * len(lengths), []
        for number, row in enumerate(rows):
            at = number * width
            for sequence in row:
                starts[sequence] = at
                positions.append(torch.arange(lengths[sequence]))
                at += lengths[sequence]
            positions.append(torch.arange((number + 1) * width - at))
        real = mask > 0
        places = torch.tensor(starts, device=mask.device)[:, None] + torch.arange(width, device=mask.device)
        table = torch.cat(positions).view(len(rows), width).to(mask.device)
        return cls(torch.where(real, places, 0), real, table)

    def pack(self, values: Tensor) -> Tensor:
        """Return padded `[n, length, d]` as packed `[rows, length, d]`."""
        packed = values.new_zeros(self.positions.numel(), values.shape[2])
        packed[self.places[self.mask]] = values[self.mask]
        return packed.view(*self.positions.shape, -1)

    def unpack(self, packed: Tensor) -> Tensor:
        """Undo `pack`; padding holds any values."""
        return packed.flatten(0, 1)[self.places]


def _first_fit(lengths: Sequence[int], width: int) -> list[list[int]]:
    """Return the sequences in each row, the longest ones first."""
    rows: list[list[int]] = []
    left: list[int] = []
    for sequence in sorted(range(len(lengths)), key=lambda one: -lengths[one]):
        fitting = next((row for row, room in enumerate(left) if room >= lengths[sequence]), None)
        if fitting is None:
            fitting = len(rows)
            rows.append([])
            left.append(width)
        rows[fitting].append(sequence)
        left[fitting] -= lengths[sequence]
    return rows
