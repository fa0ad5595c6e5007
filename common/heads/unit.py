"""A linear head on rows of norm 1, as differentially private sums need them."""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional

from fedhead.heads.head import AffineHead, heads


@heads.register("unit")
class UnitHead(AffineHead):
    """Outputs `z W^T + b` of `z = u(u((x - origin) / scale) - shift)`, where `u` divides a row by its norm.

    Weight `[C, d]` and bias `[C]` are trained; origin, scale and shift `[d]` are constants. The first normalisation
    bounds the rows of which a private mean is taken, the second one the rows about this mean.
    """

    inits = ("zeros", "random")
    origin: Tensor
    scale: Tensor
    shift: Tensor

    def __init__(self, num_features: int, num_classes: int) -> None:
        super().__init__(num_features, num_classes)
        self.register_buffer("origin", torch.zeros(num_features))
        self.register_buffer("scale", torch.ones(num_features))
        self.register_buffer("shift", torch.zeros(num_features))

    @classmethod
    def from_parts(cls, weight: Tensor, bias: Tensor, origin: Tensor, shift: Tensor) -> "UnitHead":
        """Return a float32 head of its parts; the scale is 1."""
        head = cls(weight.shape[1], weight.shape[0])
        head.assign({"weight": weight, "bias": bias})
        head.origin.copy_(origin)
        head.shift.copy_(shift)
        return head

    def outputs(self, parameters: Mapping[str, Tensor], features: Tensor) -> Tensor:
        rows = functional.normalize((features - self.origin) / self.scale, dim=-1)
        rows = functional.normalize(rows - self.shift, dim=-1)
        return rows @ parameters["weight"].mT + parameters["bias"].unsqueeze(-2)

    @torch.no_grad()
    def fold(self, mean: Tensor, scale: Tensor) -> None:
        # ((x - mean) / scale - origin) / own_scale, written with one origin and one scale.
        self.origin.mul_(scale).add_(mean)
        self.scale.mul_(scale)
