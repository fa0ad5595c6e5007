"""Rounds of noisy gradients after a head that noisy sums solved; all of it only post-processes releases."""

from collections.abc import Callable

import torch
from torch import Tensor

from fedhead.privacy.heads import NoisySums, within_spectrum
from fedhead.privacy.stages import LARGEST_WEIGHT

STEP = 0.5
"""Length of a step, in units of the preconditioned mean gradient."""

Gradient = Callable[[int, Tensor, Tensor], Tensor]
"""Returns the noisy sum of clipped gradients `[C, d + 1]` by weight and bias, given the round, from 1, and the head."""


def descend(gradient: Gradient, weight: Tensor, bias: Tensor, noisy: NoisySums, rounds: int) -> tuple[Tensor, Tensor]:
    """Return the head after rounds of full-batch gradient descent, the mean of all rounds' heads.

    Steps are preconditioned by the noisy covariance within classes with its mean eigenvalue added: rows of norm 1 vary
    little in most directions, and a plain gradient step of any stable length hardly moves these. Round `t` weighs `t`
    in the mean, which averages the noise out (Shamir and Zhang, ICML 2013).

    Args:
        gradient: makes the releases.
        weight: `[C, d]`, float32.
        bias: `[C]`.
        noisy: the sums that the head was solved from.
        rounds: 1 or more.
    """
    spectrum, vectors = within_spectrum(noisy)
    raised, rows = spectrum + spectrum.mean(), float(noisy.shrunk_counts().sum())
    head = torch.cat([weight, bias[:, None]], dim=1).double()
    mean = torch.zeros_like(head)
    for step in range(1, rounds + 1):
        moved = gradient(step, *_parts(head)) / rows
        moved[:, :-1] = (moved[:, :-1] @ vectors / raised) @ vectors.T
        head = (head - STEP * moved).clamp(-LARGEST_WEIGHT, LARGEST_WEIGHT)
        mean += head * (2 * step / (rounds * (rounds + 1)))
    return _parts(mean)


def _parts(head: Tensor) -> tuple[Tensor, Tensor]:
    return head[:, :-1].float().contiguous(), head[:, -1].float().contiguous()
