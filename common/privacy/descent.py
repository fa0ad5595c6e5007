"""Rounds of noisy gradients after a head that noisy sums solved; all of it only post-processes releases."""

from collections.abc import Callable

import torch
from torch import Tensor

from fedhead.privacy.stages import BIAS_FEATURE, LARGEST_WEIGHT

STEP = 3.2
"""Length of a step for each class, in units of the mean gradient. The curvature of the cross entropy of rows of norm 1
about their centre is well below 1, and each class has one row in `C`."""

START = 4.0
"""Largest mean norm of a class's weights before the first round: with longer ones, few rows have a gradient."""

Gradient = Callable[[int, Tensor, Tensor], Tensor]
"""Returns the noisy sum of clipped gradients `[C, d + 1]` by weight and bias, given the round, from 1, and the head."""


def descend(gradient: Gradient, weight: Tensor, bias: Tensor, rows: float, rounds: int) -> tuple[Tensor, Tensor]:
    """Return the head after rounds of full-batch gradient descent, the mean of all rounds' heads.

    Round `t` weighs `t` in the mean, which averages the noise out (Shamir and Zhang, ICML 2013). The bias weighs a
    feature of `BIAS_FEATURE`.

    Args:
        gradient: makes the releases.
        weight: `[C, d]`, float32.
        bias: `[C]`.
        rows: about how many rows there are.
        rounds: 1 or more.
    """
    scale = min(START / max(float(weight.double().norm(dim=1).mean()), 1e-12), 1.0)
    head = torch.cat([weight, (bias - bias.mean())[:, None] / BIAS_FEATURE], dim=1).double() * scale
    mean = torch.zeros_like(head)
    for step in range(1, rounds + 1):
        moved = gradient(step, *_parts(head)) / rows
        head = (head - STEP * len(weight) * moved).clamp(-LARGEST_WEIGHT, LARGEST_WEIGHT)
        mean += head * (2 * step / (rounds * (rounds + 1)))
    return _parts(mean)


def _parts(head: Tensor) -> tuple[Tensor, Tensor]:
    return head[:, :-1].float().contiguous(), (BIAS_FEATURE * head[:, -1]).float().contiguous()
