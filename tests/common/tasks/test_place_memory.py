"""Items of dense tasks are read a few at a time, however many there are."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fedhead.backbones.geometry import Geometry
from fedhead.tasks.dense import BLOCK_PLACES, ItemPlaces
from fedhead.tasks.segmentation import Segmentation

GEOMETRY = Geometry(((2, 32, 32),), (64, 64))
TASK = Segmentation(("background", "cell"))


class Stored:
    """Stored values of items that are made when they are read, with the most that were read at a time."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        self.most = 0

    def __getitem__(self, rows: Tensor) -> Tensor:
        self.most = max(self.most, len(rows))
        return torch.randn(len(rows), GEOMETRY.num_values, generator=torch.Generator().manual_seed(int(rows[0])))


def mask_of(row: int) -> Any:
    return np.full((64, 64), row % 2, np.uint8)


def sum_up(places: ItemPlaces, stored: Any, rows: Any) -> None:
    places.add(TASK.statistics(GEOMETRY.num_features), stored, rows)


def evaluate(places: ItemPlaces, stored: Any, rows: Any) -> None:
    places.evaluate(lambda features: features, stored, rows)


@pytest.mark.parametrize("use", [sum_up, evaluate])
def test_as_many_items_are_in_memory_for_a_hundred_as_for_a_thousand(
    use: Callable[[ItemPlaces, Any, Any], None],
) -> None:
    places, most = ItemPlaces(TASK, GEOMETRY, mask_of), []
    for count in (100, 1000):
        stored = Stored()
        use(places, stored, np.arange(count))
        most.append(stored.most)
    assert most[0] == most[1] == places.block == BLOCK_PLACES // GEOMETRY.num_places
