"""Heads: the trainable part, from features `[n, d]` to outputs `[n, C]`: logits of classes, or real targets.

A head is a module with ordinary parameters and also a pure function of parameters: `outputs(parameters, features)`
accepts parameters with leading dimensions `[S, ...]`, so that the heads of `S` sites are trained or evaluated in one
batched product.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, ClassVar, Protocol, Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from fedhead.errors import UserError
from fedhead.registry import Registry

if TYPE_CHECKING:
    from fedhead.tasks.losses import Loss

heads: Registry["type[Head]"] = Registry("head")

MOST_PARAMETERS = 2**27
"""512 MiB, as much as a message holds."""


class Solutions(Protocol):
    """Closed-form solutions from pooled statistics, for initialising heads."""

    def affine(self, solver: str) -> tuple[Tensor, Tensor]:
        """Return the weight `[C, d]` and bias `[C]` of `solver`, float64, for the original features."""

    def prototypes(self) -> Tensor:
        """Return unit vectors `[C, d]`, the class means of standardised features."""

    def standardisation(self) -> tuple[Tensor, Tensor]:
        """Return the features' mean and scale, each `[d]`, float64."""


class Head(nn.Module, ABC):
    """A trainable map from `num_features` features to `num_classes` outputs.

    Parameters are trained and exchanged; buffers are constants that travel with the model.
    """

    inits: ClassVar[tuple[str, ...]]
    """Names of the supported initialisations, the default first; a task may exclude some."""

    directional: ClassVar[bool] = False
    """Whether outputs only rank classes and have no meaning on their own."""

    standardises: ClassVar[bool] = False
    """Whether the head needs the features' mean and scale even without training."""

    averages_in_coefficients: ClassVar[bool] = False
    """Whether gradient steps stay in the span of the features, as `fedhead.client.averaging` assumes."""

    most_rows: ClassVar[int | None] = None
    """Largest number of rows that are evaluated at once; None for as many as fit in memory."""

    curved: bool = False
    """Whether versions are compared by their losses at a grid of temperatures."""

    rates: Mapping[str, float] = MappingProxyType({})
    """Factors of the learning rate, by the names of parameters; 1 for others."""

    def __init__(self, num_features: int, num_classes: int) -> None:
        super().__init__()
        self.num_features = num_features
        self.num_classes = num_classes

    @classmethod
    def from_argument(cls, argument: str, num_features: int, num_classes: int) -> Self:
        """Build a head from the argument of a spec such as `mlp:256`.

        Raises:
            UserError: if the argument is invalid.
        """
        if argument:
            raise UserError(f"This head takes no argument, but was given {argument!r}.")
        return cls(num_features, num_classes)

    def together(self, rows: int) -> int | None:
        """Return the most sites to train at once, in batches of `rows`; None for as many as fit in memory."""
        return None

    @abstractmethod
    def outputs(self, parameters: Mapping[str, Tensor], features: Tensor) -> Tensor:
        """Return outputs `[..., n, C]` of features `[..., n, d]`.

        Args:
            parameters: this head's parameters by name, each with the same leading dimensions as `features`.
            features: `[..., n, d]`.
        """

    def gradients(
        self, parameters: Mapping[str, Tensor], features: Tensor, targets: Tensor, weights: Tensor, loss: "Loss"
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Return the weighted loss's gradients, each shaped as its parameter, and its values `[...]`.

        Args:
            parameters: by name, each with the same leading dimensions as `features`.
            features: `[..., n, d]`.
            targets: `[..., n]` or `[..., n, C]`, as `loss` takes them.
            weights: `[..., n]`, of each row's loss.
            loss: of outputs against targets.
        """
        with torch.enable_grad():
            leaves = {name: value.detach().requires_grad_() for name, value in parameters.items()}
            values = (loss.values(self.outputs(leaves, features), targets) * weights).sum(-1)
            # Each value depends only on the parameters at its own leading index, so one sum gives all gradients.
            slopes = torch.autograd.grad(values.sum(), list(leaves.values()))
        return dict(zip(leaves, slopes, strict=True)), values.detach()

    def seed_draws(self, stream: str) -> None:
        """Seed the random numbers of training by the name of a site's round; most heads draw none."""

    @abstractmethod
    def randomise(self, generator: torch.Generator) -> None:
        """Draw the parameters at random."""

    def initial(self, init: str, generator: torch.Generator, solutions: Solutions | None = None) -> None:
        """Initialise the parameters by `init`, for the original features.

        Args:
            init: `zeros`, `random`, or a closed form.
            generator: draws random parameters.
            solutions: closed forms, for every `init` except `zeros` and `random`.

        Raises:
            UserError: if the statistics do not determine the closed form.
        """
        if init == "random":
            self.randomise(generator)
        elif init != "zeros":
            if solutions is None:
                raise ValueError(f"The initialisation {init!r} needs statistics.")
            self.assign(self._solved(init, solutions))

    def _solved(self, init: str, solutions: Solutions) -> Mapping[str, Tensor]:
        raise ValueError(f"{type(self).__name__} has no closed form {init!r}.")

    @abstractmethod
    def fold(self, mean: Tensor, scale: Tensor) -> None:
        """Convert this head from features `(x - mean) / scale` to an equivalent one for `x`; both are `[d]`."""

    @abstractmethod
    def rescale(self, shift: Tensor, scale: Tensor) -> None:
        """Change this head's outputs `o` to `o * scale + shift`; both are `[C]`.

        Raises:
            ValueError: if the head is directional.
        """

    @abstractmethod
    def absorb_temperature(self, temperature: float) -> None:
        """Divide this head's outputs by `temperature`, by changing its parameters."""

    def affine(self) -> tuple[Tensor, Tensor] | None:
        """Return the weight `[C, d]` and bias `[C]` if the head is an affine map, else None."""
        return None

    def forward(self, features: Tensor) -> Tensor:
        """Return outputs `[n, C]` of features `[n, d]`."""
        return self.outputs(dict(self.named_parameters()), features)

    def trainable(self) -> dict[str, Tensor]:
        """Return a detached copy of the parameters by name."""
        return {name: value.detach().clone() for name, value in self.named_parameters()}

    @torch.no_grad()
    def assign(self, parameters: Mapping[str, Tensor]) -> None:
        """Copy `parameters` into the head.

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


class AffineHead(Head):
    """A head whose last step is `z W^T + b`, weight `[C, d]`, bias `[C]`, initially zero."""

    def __init__(self, num_features: int, num_classes: int) -> None:
        super().__init__(num_features, num_classes)
        self.weight = nn.Parameter(torch.zeros(num_classes, num_features))
        self.bias = nn.Parameter(torch.zeros(num_classes))

    def randomise(self, generator: torch.Generator) -> None:
        fill_normal(self.weight, self.num_features**-0.5, generator)

    @torch.no_grad()
    def rescale(self, shift: Tensor, scale: Tensor) -> None:
        self.weight.mul_(scale[:, None])
        self.bias.mul_(scale).add_(shift)

    @torch.no_grad()
    def absorb_temperature(self, temperature: float) -> None:
        self.weight.div_(temperature)
        self.bias.div_(temperature)


@heads.register("linear")
class LinearHead(AffineHead):
    """Outputs `x W^T + b`, weight `[C, d]`, bias `[C]`, initially zero."""

    inits = ("lda", "lda-gcv", "lda-shares", "boxes", "ridge", "nearest-mean", "hazards", "zeros", "random")
    averages_in_coefficients = True

    @classmethod
    def from_weights(cls, weight: Tensor, bias: Tensor) -> Self:
        """Wrap weight `[C, d]` and bias `[C]`, keeping their dtype."""
        head = cls(weight.shape[1], weight.shape[0]).to(weight.dtype)
        head.assign({"weight": weight, "bias": bias})
        return head

    def outputs(self, parameters: Mapping[str, Tensor], features: Tensor) -> Tensor:
        # Not `mT`, which the exporter of detectors does not support.
        return features @ parameters["weight"].transpose(-1, -2) + parameters["bias"].unsqueeze(-2)

    @torch.no_grad()
    def gradients(
        self, parameters: Mapping[str, Tensor], features: Tensor, targets: Tensor, weights: Tensor, loss: "Loss"
    ) -> tuple[dict[str, Tensor], Tensor]:
        outputs = parameters["weight"] @ features.mT + parameters["bias"].unsqueeze(-1)
        values, residuals = loss.slopes(outputs, targets)
        residuals *= weights.unsqueeze(-2)
        return {"weight": residuals @ features, "bias": residuals.sum(-1)}, (values * weights).sum(-1)

    def _solved(self, init: str, solutions: Solutions) -> Mapping[str, Tensor]:
        weight, bias = solutions.affine(init)
        return {"weight": weight, "bias": bias}

    def affine(self) -> tuple[Tensor, Tensor]:
        return self.weight.detach(), self.bias.detach()

    @torch.no_grad()
    def fold(self, mean: Tensor, scale: Tensor) -> None:
        self.weight.div_(scale)
        self.bias.sub_(self.weight @ mean)


@heads.register("mlp")
class MLPHead(Head):
    """One hidden layer of rectified linear units, `mlp:HIDDEN`; hidden weight `[h, d]`, output weight `[C, h]`."""

    inits = ("random",)

    def __init__(self, num_features: int, num_classes: int, hidden: int = 256) -> None:
        super().__init__(num_features, num_classes)
        self.hidden_weight = nn.Parameter(torch.zeros(hidden, num_features))
        self.hidden_bias = nn.Parameter(torch.zeros(hidden))
        self.output_weight = nn.Parameter(torch.zeros(num_classes, hidden))
        self.output_bias = nn.Parameter(torch.zeros(num_classes))

    @classmethod
    def from_argument(cls, argument: str, num_features: int, num_classes: int) -> Self:
        if not argument.isdecimal() or int(argument) == 0:
            raise UserError(f"An mlp head needs a number of hidden units, as in 'mlp:256', not 'mlp:{argument}'.")
        if int(argument) * (num_features + num_classes) > MOST_PARAMETERS:
            raise UserError(f"The head mlp:{argument} is too large to send: it has over {MOST_PARAMETERS} parameters.")
        return cls(num_features, num_classes, int(argument))

    def outputs(self, parameters: Mapping[str, Tensor], features: Tensor) -> Tensor:
        hidden = features @ parameters["hidden_weight"].mT + parameters["hidden_bias"].unsqueeze(-2)
        output = functional.relu(hidden) @ parameters["output_weight"].mT
        return output + parameters["output_bias"].unsqueeze(-2)

    def randomise(self, generator: torch.Generator) -> None:
        fill_normal(self.hidden_weight, (2 / self.num_features) ** 0.5, generator)
        fill_normal(self.output_weight, self.hidden_bias.numel() ** -0.5, generator)

    @torch.no_grad()
    def fold(self, mean: Tensor, scale: Tensor) -> None:
        self.hidden_weight.div_(scale)
        self.hidden_bias.sub_(self.hidden_weight @ mean)

    @torch.no_grad()
    def rescale(self, shift: Tensor, scale: Tensor) -> None:
        self.output_weight.mul_(scale[:, None])
        self.output_bias.mul_(scale).add_(shift)

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
    directional = True
    standardises = True
    shift: Tensor
    scale: Tensor

    def __init__(self, num_features: int, num_classes: int) -> None:
        super().__init__(num_features, num_classes)
        self.weight = nn.Parameter(torch.zeros(num_classes, num_features))
        self.sharpness = nn.Parameter(torch.full((1,), 10.0))
        self.register_buffer("shift", torch.zeros(num_features))
        self.register_buffer("scale", torch.ones(num_features))

    def outputs(self, parameters: Mapping[str, Tensor], features: Tensor) -> Tensor:
        rows = functional.normalize((features - self.shift) / self.scale, dim=-1)
        prototypes = functional.normalize(parameters["weight"], dim=-1)
        return parameters["sharpness"].unsqueeze(-1) * (rows @ prototypes.mT)

    def randomise(self, generator: torch.Generator) -> None:
        fill_normal(self.weight, self.num_features**-0.5, generator)

    @torch.no_grad()
    def initial(self, init: str, generator: torch.Generator, solutions: Solutions | None = None) -> None:
        super().initial(init, generator, solutions)
        if solutions is not None:
            self.fold(*solutions.standardisation())

    def _solved(self, init: str, solutions: Solutions) -> Mapping[str, Tensor]:
        return {"weight": solutions.prototypes(), "sharpness": self.sharpness}

    def rescale(self, shift: Tensor, scale: Tensor) -> None:
        raise ValueError("The outputs of a cosine head are cosines and cannot be real targets.")

    def fold(self, mean: Tensor, scale: Tensor) -> None:
        # (((x - mean) / scale) - shift) / own_scale, written with one shift and one scale.
        self.shift.mul_(scale).add_(mean)
        self.scale.mul_(scale)

    @torch.no_grad()
    def absorb_temperature(self, temperature: float) -> None:
        self.sharpness.div_(temperature)


def make_head(spec: str, num_features: int, num_classes: int) -> Head:
    """Build a head from a spec such as `linear`, `mlp:256` or `cosine`.

    Raises:
        UserError: for an unknown name or an invalid argument.
    """
    name, _, argument = spec.partition(":")
    return heads[name].from_argument(argument, num_features, num_classes)


@torch.no_grad()
def fill_normal(parameter: nn.Parameter, deviation: float, generator: torch.Generator) -> None:
    """Draw a parameter from a normal distribution, on the CPU in float32: the same numbers on every device."""
    drawn = torch.randn(parameter.shape, generator=generator, dtype=torch.float32)
    parameter.copy_(drawn.mul_(deviation))
