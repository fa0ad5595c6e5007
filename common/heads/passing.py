"""No head: the features are the outputs, as those of a language model are."""

from collections.abc import Mapping

import torch
from torch import Tensor

from fedhead.errors import UserError
from fedhead.heads.head import Head, heads


@heads.register("none")
class NoHead(Head):
    """Outputs that are the features; nothing trains."""

    inits = ("zeros",)

    def __init__(self, num_features: int, num_classes: int) -> None:
        if num_features != num_classes:
            raise UserError(f"Without a head, {num_features} features cannot be {num_classes} outputs.")
        super().__init__(num_features, num_classes)

    def outputs(self, parameters: Mapping[str, Tensor], features: Tensor) -> Tensor:
        return features

    def randomise(self, generator: torch.Generator) -> None:
        """Do nothing: there are no parameters."""

    def fold(self, mean: Tensor, scale: Tensor) -> None:
        raise ValueError("Without a head, features are not standardised.")

    def rescale(self, shift: Tensor, scale: Tensor) -> None:
        raise ValueError("Without a head, outputs are not rescaled.")

    def absorb_temperature(self, temperature: float) -> None:
        raise ValueError("Without a head, outputs are not scaled.")
