"""Class means near the features of the classes' names, which are public.

A text backbone has features of the names of classes, too, and texts of a class are often near its name. Names cost no
privacy: noisy means are shrunk to them as far as they prove right, and not at all to meaningless ones.
"""

import torch
from torch import Tensor

BIN_VALUES = 256
"""Least number of noisy values, over classes and directions, that a variance is estimated from."""

LEAST_LENGTH = 1e-6
"""Mean square of the deviations of names below which all names are alike."""

POWER = 0.25
"""Variance of rows within classes, as a power of the variance of names in the same direction."""


LEAST_EVIDENCE = 3.0
"""Least multiple of names that class means prove to have, in standard errors, for which names are used."""


def nearness(deviations: Tensor, names: Tensor, counts: Tensor, noise: Tensor) -> float:
    """Return the multiple of names that is nearest to noisy class means, by least squares; 0 if that is not proven.

    It is at most 1: rows of norm 1 have no longer mean.

    Args:
        deviations: `[C, d]`, of class means from their centre.
        names: `[C, d]`, features of the names, as rows of the classes would be given.
        counts: `[C]`, rows.
        noise: `[C]`, the variance of the noise in each entry of `deviations`.
    """
    named, weights = _about_centre(names, counts), counts.square() / counts.square().sum()
    lengths = named.square().sum(1)
    length = float(weights @ lengths)
    if length <= LEAST_LENGTH:
        return 0.0
    multiple = float(weights @ (deviations * named).sum(1)) / length
    error = float((weights.square() * noise) @ lengths) ** 0.5 / length
    return min(multiple, 1.0) if multiple > LEAST_EVIDENCE * error else 0.0


def shrink_to_names(deviations: Tensor, names: Tensor, counts: Tensor, noise: Tensor) -> Tensor:
    """Return `[C, d]`, noisy deviations of class means from their centre, shrunk to the nearest multiple of names.

    What deviates from it is normal with a variance for each of some groups of directions, from those in which names
    vary most to those in which they do not, and is multiplied by the share of its variance that is not noise (empirical
    Bayes; Efron and Morris, 1973). See `nearness` for the arguments.
    """
    near = _about_centre(names, counts) * nearness(deviations, names, counts, noise)
    _, vectors = names_spectrum(names, counts)
    beyond = (deviations - near) @ vectors
    classes, size = beyond.shape
    weights = counts.square() / counts.square().sum()
    each = weights @ (beyond.square() - noise[:, None])
    groups = torch.arange(size) // max(1, -(-BIN_VALUES // classes))
    members = torch.bincount(groups)
    variances = torch.zeros(len(members), dtype=each.dtype).index_add_(0, groups, each) / members
    # Groups differ by noise, too; they are shrunk to their mean as counts are.
    expected = 2 * float(weights @ noise.square()) / (classes * float(members[0]))
    spread = float((variances - each.mean()).square().mean())
    kept = max(0.0, 1 - expected / spread) if spread else 0.0
    signal = (each.mean() + kept * (variances - each.mean())).clamp(min=0)[groups]
    return near + (beyond * (signal / (signal + noise[:, None]))) @ vectors.T


def names_spectrum(names: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """Return a spectrum `[d]` of mean 1 and eigenvectors `[d, d]`: a guess of the covariance within classes.

    Texts of a class vary most in the directions in which names do.
    """
    named = _about_centre(names, counts) * (counts / counts.sum()).sqrt()[:, None]
    values, vectors = torch.linalg.eigh(named.T @ named)
    values, vectors = values.flip(0).clamp(min=0), vectors.flip(1)
    spectrum = (values + values.mean()) ** POWER
    mean = spectrum.mean()
    return (spectrum / mean if mean > 0 else torch.ones_like(spectrum)), vectors


def _about_centre(names: Tensor, counts: Tensor) -> Tensor:
    return names - counts @ names / counts.sum()
