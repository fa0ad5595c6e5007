"""Rounds of noisy gradients; all of it only post-processes releases."""

from collections.abc import Callable

import torch
from torch import Tensor

from fedhead.privacy.stages import BIAS_FEATURE, CLIP, LARGEST_WEIGHT

LENGTH = 20.0
"""Norm of the noise in the weights of a class, after the last round, that the length of a step is chosen for. Longer
paths come nearer to the minimum of the cross entropy, and gather more noise."""

LONGEST_STEP = 50.0
"""Largest length of a step for each class, in units of the mean gradient: with few rounds and little noise, longer ones
overshoot the minimum."""

START = 12.0
"""Largest mean norm of a class's weights before the first round: with longer ones, few rows have a gradient."""

Gradient = Callable[[int, Tensor, Tensor], Tensor]
"""Returns the noisy sum of clipped gradients `[C, d + 1]` by weight and bias, given the round, from 1, and the head."""


def descend(
    gradient: Gradient, weight: Tensor, bias: Tensor, rows: float, rounds: int, level: float
) -> tuple[Tensor, Tensor]:
    """Return the head after rounds of full-batch gradient descent, the mean of all rounds' heads.

    Round `t` weighs `t` in the mean, which averages the noise out (Shamir and Zhang, ICML 2013). The bias weighs a
    feature of `BIAS_FEATURE`. All steps have one length, by which the noise of all gradients adds up to `LENGTH` in the
    weights of a class.

    Args:
        gradient: makes the releases.
        weight: `[C, d]`, float32.
        bias: `[C]`.
        rows: about how many rows there are.
        rounds: 1 or more.
        level: the `noise_level` of all gradients together.
    """
    scale = min(START / max(float(weight.double().norm(dim=1).mean()), 1e-12), 1.0)
    head = torch.cat([weight, (bias - bias.mean())[:, None] / BIAS_FEATURE], dim=1).double() * scale
    mean = torch.zeros_like(head)
    length = len(weight) * min(LENGTH / (level * rounds * CLIP), LONGEST_STEP)
    for step in range(1, rounds + 1):
        moved = gradient(step, *_parts(head)) / rows
        head = (head - length * moved).clamp(-LARGEST_WEIGHT, LARGEST_WEIGHT)
        mean += head * (2 * step / (rounds * (rounds + 1)))
    return _parts(mean)


def _parts(head: Tensor) -> tuple[Tensor, Tensor]:
    return head[:, :-1].float().contiguous(), (BIAS_FEATURE * head[:, -1]).float().contiguous()
