"""Optimisers of many heads at once."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from types import MappingProxyType

import torch
from torch import Tensor

from fedhead.config import LocalConfig


class Optimizer(ABC):
    """Optimiser of heads `[k, ...]`; `k` may decrease from step to step, but not increase.

    Args:
        settings: of local training.
        rates: factors of the learning rate, by the names of parameters; 1 for others.
    """

    def __init__(self, settings: LocalConfig, rates: Mapping[str, float] = MappingProxyType({})) -> None:
        self.settings = settings
        self.rates = rates

    def lr(self, name: str) -> float:
        """Return the learning rate of a parameter."""
        return self.settings.lr * self.rates.get(name, 1.0)

    @abstractmethod
    def step(self, parameters: Mapping[str, Tensor], gradients: Mapping[str, Tensor]) -> None:
        """Update `parameters` in place."""


class _SGD(Optimizer):
    def __init__(self, settings: LocalConfig, rates: Mapping[str, float] = MappingProxyType({})) -> None:
        super().__init__(settings, rates)
        self.velocities: dict[str, Tensor] = {}

    def step(self, parameters: Mapping[str, Tensor], gradients: Mapping[str, Tensor]) -> None:
        momentum, decay = self.settings.momentum, self.settings.weight_decay
        for name, parameter in parameters.items():
            gradient = gradients[name]
            if decay:
                gradient = gradient.add(parameter, alpha=decay)
            if momentum:
                if name in self.velocities:
                    gradient = self.velocities[name][: len(gradient)].mul_(momentum).add_(gradient)
                else:
                    gradient = self.velocities[name] = gradient.clone()
            parameter.sub_(gradient, alpha=self.lr(name))


class _AdamW(Optimizer):
    """AdamW (Loshchilov & Hutter, ICLR 2019), with the betas and epsilon of torch."""

    beta1, beta2, epsilon = 0.9, 0.999, 1e-8

    def __init__(self, settings: LocalConfig, rates: Mapping[str, float] = MappingProxyType({})) -> None:
        super().__init__(settings, rates)
        self.steps = 0
        self.means: dict[str, Tensor] = {}
        self.squares: dict[str, Tensor] = {}

    def step(self, parameters: Mapping[str, Tensor], gradients: Mapping[str, Tensor]) -> None:
        self.steps += 1
        mean_bias, square_bias = 1 - self.beta1**self.steps, 1 - self.beta2**self.steps
        for name, parameter in parameters.items():
            gradient, lr = gradients[name], self.lr(name)
            if self.steps == 1:
                self.means[name] = torch.zeros_like(gradient)
                self.squares[name] = torch.zeros_like(gradient)
            mean = self.means[name][: len(gradient)].lerp_(gradient, 1 - self.beta1)
            square = self.squares[name][: len(gradient)].mul_(self.beta2)
            square.addcmul_(gradient, gradient, value=1 - self.beta2)
            parameter.mul_(1 - lr * self.settings.weight_decay)
            parameter.addcdiv_(mean, square.sqrt().div_(square_bias**0.5).add_(self.epsilon), value=-lr / mean_bias)


OPTIMIZERS: dict[str, type[Optimizer]] = {"sgd": _SGD, "adamw": _AdamW}
