"""Heads: the trainable part, from features `[n, d]` to logits `[n, C]`.

A head is a module with ordinary parameters, and at the same time a pure function of parameters given to
it: `logits(parameters, features)` takes parameters with leading dimensions `[S, ...]` and trains or evaluates
the heads of `S` sites in one batched product.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar, Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from fedhead.errors import UserError
from fedhead.losses import loss_for
from fedhead.registry import Registry

heads: Registry["type[Head]"] = Registry("head")


class Head(nn.Module, ABC):
    """A trainable map from `num_features` features to `num_classes` logits.

    Parameters are what sites train and exchange; buffers are constants that travel with the model.
    """

    inits: ClassVar[tuple[str, ...]]
    """What its first parameters may be, the default first."""

    multi_label_inits: ClassVar[tuple[str, ...]] = ()
    """The same in a multi-label run; empty for a head that cannot tell whether a row has any class."""

    def __init__(self, num_features: int, num_classes: int) -> None:
        super().__init__()
        self.num_features = num_features
        self.num_classes = num_classes

    @classmethod
    def from_argument(cls, argument: str, num_features: int, num_classes: int) -> Self:
        """Build from what follows the colon of a spec such as `mlp:256`.

        Raises:
            UserError: if the argument does not fit.
        """
        if argument:
            raise UserError(f"This head takes no argument, but was given {argument!r}.")
        return cls(num_features, num_classes)

    @abstractmethod
    def logits(self, parameters: Mapping[str, Tensor], features: Tensor) -> Tensor:
        """Return logits `[..., n, C]` of features `[..., n, d]`.

        Args:
            parameters: this head's parameters by name, each with the same leading dimensions as `features`.
            features: `[..., n, d]`.
        """

    def gradients(
        self, parameters: Mapping[str, Tensor], features: Tensor, labels: Tensor, weights: Tensor
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Return the weighted loss's gradients, each shaped as its parameter, and its values `[...]`.

        Args:
            parameters: by name, each with the same leading dimensions as `features`.
            features: `[..., n, d]`.
            labels: `[..., n]` class numbers, or `[..., n, C]` of 0 and 1 for multi-label rows; int64. They tell which
                loss it is: see `fedhead.losses`.
            weights: `[..., n]`, what each row's loss counts.
        """
        with torch.enable_grad():
            leaves = {name: value.detach().requires_grad_() for name, value in parameters.items()}
            logits = self.logits(leaves, features)
            values = (loss_for(logits, labels).values(logits, labels) * weights).sum(-1)
            # A value depends only on the parameters of its own leading index, so one sum serves them all.
            slopes = torch.autograd.grad(values.sum(), list(leaves.values()))
        return dict(zip(leaves, slopes, strict=True)), values.detach()

    @abstractmethod
    def randomise(self, generator: torch.Generator) -> None:
        """Draw the parameters at random."""

    @abstractmethod
    def absorb_standardisation(self, mean: Tensor, scale: Tensor) -> None:
        """Change this head, made for `(x - mean) / scale`, into the equal one for `x`; both are `[d]`."""

    @abstractmethod
    def absorb_temperature(self, temperature: float) -> None:
        """Change this head into the one whose logits are its own divided by `temperature`."""

    def forward(self, features: Tensor) -> Tensor:
        """Return logits `[n, C]` of features `[n, d]`."""
        return self.logits(dict(self.named_parameters()), features)

    def trainable(self) -> dict[str, Tensor]:
        """Return a detached copy of the parameters by name: what a site exchanges."""
        return {name: value.detach().clone() for name, value in self.named_parameters()}

    @torch.no_grad()
    def assign(self, parameters: Mapping[str, Tensor]) -> None:
        """Copy `parameters` in.

        Raises:
            ValueError: if a name or a shape differs.
        """
        own = dict(self.named_parameters())
        if own.keys() != parameters.keys():
            raise ValueError(f"Expected the parameters {sorted(own)}, not {sorted(parameters)}.")
        for name, value in own.items():
            if value.shape != parameters[name].shape:
                raise ValueError(
                    f"Parameter {name!r} has shape {list(parameters[name].shape)}, not {list(value.shape)}."
                )
        for name, value in own.items():
            value.copy_(parameters[name])


@heads.register("linear")
class LinearHead(Head):
    """Logits `x W^T + b`, weight `[C, d]`, bias `[C]`. Zero when made."""

    inits = ("lda", "ridge", "nearest-mean", "zeros", "random")
    multi_label_inits = ("ridge", "zeros", "random")

    def __init__(self, num_features: int, num_classes: int) -> None:
        super().__init__(num_features, num_classes)
        self.weight = nn.Parameter(torch.zeros(num_classes, num_features))
        self.bias = nn.Parameter(torch.zeros(num_classes))

    @classmethod
    def from_weights(cls, weight: Tensor, bias: Tensor) -> Self:
        """Wrap weight `[C, d]` and bias `[C]`, keeping their dtype."""
        head = cls(weight.shape[1], weight.shape[0]).to(weight.dtype)
        head.assign({"weight": weight, "bias": bias})
        return head

    def logits(self, parameters: Mapping[str, Tensor], features: Tensor) -> Tensor:
        return features @ parameters["weight"].mT + parameters["bias"].unsqueeze(-2)

    @torch.no_grad()
    def gradients(
        self, parameters: Mapping[str, Tensor], features: Tensor, labels: Tensor, weights: Tensor
    ) -> tuple[dict[str, Tensor], Tensor]:
        logits = parameters["weight"] @ features.mT + parameters["bias"].unsqueeze(-1)
        values, residuals = loss_for(logits, labels).slopes(logits, labels)
        residuals *= weights.unsqueeze(-2)
        return {"weight": residuals @ features, "bias": residuals.sum(-1)}, (values * weights).sum(-1)

    def randomise(self, generator: torch.Generator) -> None:
        _fill_normal(self.weight, self.num_features**-0.5, generator)

    @torch.no_grad()
    def absorb_standardisation(self, mean: Tensor, scale: Tensor) -> None:
        self.weight.div_(scale)
        self.bias.sub_(self.weight @ mean)

    @torch.no_grad()
    def absorb_temperature(self, temperature: float) -> None:
        self.weight.div_(temperature)
        self.bias.div_(temperature)


@heads.register("mlp")
class MLPHead(Head):
    """One hidden layer of rectified units, `mlp:HIDDEN`; hidden weight `[h, d]`, output weight `[C, h]`."""

    inits = ("random",)
    multi_label_inits = inits

    def __init__(self, num_features: int, num_classes: int, hidden: int = 256) -> None:
        super().__init__(num_features, num_classes)
        self.hidden_weight = nn.Parameter(torch.zeros(hidden, num_features))
        self.hidden_bias = nn.Parameter(torch.zeros(hidden))
        self.output_weight = nn.Parameter(torch.zeros(num_classes, hidden))
        self.output_bias = nn.Parameter(torch.zeros(num_classes))

    @classmethod
    def from_argument(cls, argument: str, num_features: int, num_classes: int) -> Self:
        if not argument.isdecimal() or int(argument) == 0:
            raise UserError(f"An mlp head needs its hidden units, as in 'mlp:256', not 'mlp:{argument}'.")
        return cls(num_features, num_classes, int(argument))

    def logits(self, parameters: Mapping[str, Tensor], features: Tensor) -> Tensor:
        hidden = features @ parameters["hidden_weight"].mT + parameters["hidden_bias"].unsqueeze(-2)
        output = functional.relu(hidden) @ parameters["output_weight"].mT
        return output + parameters["output_bias"].unsqueeze(-2)

    def randomise(self, generator: torch.Generator) -> None:
        _fill_normal(self.hidden_weight, (2 / self.num_features) ** 0.5, generator)
        _fill_normal(self.output_weight, self.hidden_bias.numel() ** -0.5, generator)

    @torch.no_grad()
    def absorb_standardisation(self, mean: Tensor, scale: Tensor) -> None:
        self.hidden_weight.div_(scale)
        self.hidden_bias.sub_(self.hidden_weight @ mean)

    @torch.no_grad()
    def absorb_temperature(self, temperature: float) -> None:
        self.output_weight.div_(temperature)
        self.output_bias.div_(temperature)


@heads.register("cosine")
class CosineHead(Head):
    """Logits `sharpness * cos(x', w_c)` of `x' = (x - shift) / scale` (Gidaris & Komodakis, CVPR 2018).

    Weight `[C, d]` and sharpness `[1]` are trained; shift and scale `[d]` are constants.
    """

    inits = ("nearest-mean", "random")
    shift: Tensor
    scale: Tensor

    def __init__(self, num_features: int, num_classes: int) -> None:
        super().__init__(num_features, num_classes)
        self.weight = nn.Parameter(torch.zeros(num_classes, num_features))
        self.sharpness = nn.Parameter(torch.full((1,), 10.0))
        self.register_buffer("shift", torch.zeros(num_features))
        self.register_buffer("scale", torch.ones(num_features))

    def logits(self, parameters: Mapping[str, Tensor], features: Tensor) -> Tensor:
        rows = functional.normalize((features - self.shift) / self.scale, dim=-1)
        prototypes = functional.normalize(parameters["weight"], dim=-1)
        return parameters["sharpness"].unsqueeze(-1) * (rows @ prototypes.mT)

    def randomise(self, generator: torch.Generator) -> None:
        _fill_normal(self.weight, self.num_features**-0.5, generator)

    def absorb_standardisation(self, mean: Tensor, scale: Tensor) -> None:
        # (((x - mean) / scale) - shift) / own_scale, written with one shift and one scale.
        self.shift.mul_(scale).add_(mean)
        self.scale.mul_(scale)

    @torch.no_grad()
    def absorb_temperature(self, temperature: float) -> None:
        self.sharpness.div_(temperature)


def make_head(spec: str, num_features: int, num_classes: int) -> Head:
    """Build a head from a spec such as `linear`, `mlp:256` or `cosine`.

    Raises:
        UserError: for an unknown name or a wrong argument.
    """
    name, _, argument = spec.partition(":")
    return heads[name].from_argument(argument, num_features, num_classes)


@torch.no_grad()
def _fill_normal(parameter: nn.Parameter, deviation: float, generator: torch.Generator) -> None:
    drawn = torch.randn(parameter.shape, generator=generator, dtype=torch.float32)
    parameter.copy_(drawn.mul_(deviation))
