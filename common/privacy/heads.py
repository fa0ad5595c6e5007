"""Heads from noisy sums of unit-norm rows.

The noise on the Gram matrix is a symmetric random matrix whose eigenvalues fill `[-edge, edge]` with
`edge = sigma_g sqrt(2 d)` (Wigner's semicircle). Eigenvalues inside it carry no information; those beyond it are too
large by a known amount (Benaych-Georges and Nadakuditi, 2011). All functions only post-process a release.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fedhead.heads import LinearHead
from fedhead.privacy.names import names_spectrum, nearness, shrink_to_names
from fedhead.privacy.sensitivity import unsvec

LEAST_SHARE = 0.05
"""A class's count is at least this share of the mean class's."""


LEAST_EIGENVALUE = 0.02
"""Least eigenvalue of a covariance, in edges."""


@dataclass(frozen=True, eq=False)
class NoisySums:
    """A noisy release of counts, class sums and the Gram matrix, of rows with norm at most 1.

    Attributes:
        counts: `[C]`.
        sums: `[C, d]`.
        gram: `[d (d + 1) / 2]`, as `svec`; None if it was not released.
        sigma_counts: the noise's standard deviation on counts.
        sigma_sums: on class sums.
        sigma_gram: on every entry of `gram`.
        names: `[C, d]`, features of the classes' names, as rows are given; used without a Gram matrix.
    """

    counts: Tensor
    sums: Tensor
    gram: Tensor | None
    sigma_counts: float
    sigma_sums: float
    sigma_gram: float = 0.0
    names: Tensor | None = None

    @property
    def edge(self) -> float:
        """The largest eigenvalue of the noise on the Gram matrix."""
        return self.sigma_gram * math.sqrt(2 * self.sums.shape[1])

    def shrunk_counts(self) -> Tensor:
        """Return `[C]`, counts shrunk to their mean by the share of their variance that is noise, all positive."""
        mean = self.counts.mean()
        deviations = self.counts - mean
        variance = float(deviations.square().mean())
        kept = max(0.0, 1 - self.sigma_counts**2 / variance) if variance else 0.0
        return (mean + kept * deviations).clamp(min=max(float(mean) * LEAST_SHARE, 1.0))


def solve_noisy(noisy: NoisySums) -> LinearHead:
    """Solve discriminant analysis from noisy sums; float64, for rows as they were summed.

    The covariance is that of `within_spectrum`: without a Gram matrix it is spherical, as for nearest means. The mean
    of class `c` has noise of variance `v_c = sigma_s^2 / n_c^2` in each feature. Deviations from the centre are
    multiplied by `s / (s + v_c)`, with `s` their own mean variance (empirical Bayes; Efron and Morris, 1973).
    Otherwise classes with few rows get the longest weights, of noise. With names of classes, see `shrink_to_names`.
    """
    counts = noisy.shrunk_counts()
    rows = float(counts.sum())
    spectrum, vectors = within_spectrum(noisy)
    centre, deviations = class_means(noisy)
    weight = (deviations @ vectors / spectrum) @ vectors.T
    bias = (counts / rows).log() - 0.5 * (weight * deviations).sum(1) - weight @ centre
    return LinearHead.from_weights(weight, bias)


def class_means(noisy: NoisySums) -> tuple[Tensor, Tensor]:
    """Return the centre `[d]` of all rows, and the shrunk deviations `[C, d]` of class means from it."""
    counts = noisy.shrunk_counts()
    centre, deviations, noise = _noisy_means(noisy)
    if (names := trusted_names(noisy)) is not None:
        return centre, shrink_to_names(deviations, names, counts, noise)
    signal = (deviations.square().mean() - noise.mean()).clamp(min=0)
    return centre, deviations * (signal / (signal + noise))[:, None]


def trusted_names(noisy: NoisySums) -> Tensor | None:
    """Return features of the classes' names if the sums prove class means near them, and have no Gram matrix."""
    if noisy.names is None or noisy.gram is not None:
        return None
    _, deviations, noise = _noisy_means(noisy)
    return noisy.names if nearness(deviations, noisy.names, noisy.shrunk_counts(), noise) else None


def _noisy_means(noisy: NoisySums) -> tuple[Tensor, Tensor, Tensor]:
    """Return the centre `[d]`, deviations of class means `[C, d]`, and the variance of their noise `[C]`."""
    counts = noisy.shrunk_counts()
    centre = noisy.sums.sum(0) / counts.sum()
    return centre, noisy.sums / counts[:, None] - centre, (noisy.sigma_sums / counts) ** 2


def within_spectrum(noisy: NoisySums) -> tuple[Tensor, Tensor]:
    """Return the eigenvalues `[d]`, all positive, and eigenvectors `[d, d]` of the within-class covariance.

    Class sums have variance `sigma_s^2 / n_c` too much in the products that are taken from the Gram matrix. An
    eigenvalue `w` beyond `edge / N` becomes `(w + sqrt(w^2 - 4 t^2)) / 2` with `t = edge / (2 N)`; the others
    become their mean. Without a Gram matrix their sum is what the class means leave of norm 1, and all are equal, or
    as `names_spectrum` guesses.
    """
    counts, sums = noisy.shrunk_counts(), noisy.sums
    rows, size = float(counts.sum()), sums.shape[1]
    if noisy.gram is None:
        between = (sums.square().sum(1) - size * noisy.sigma_sums**2) / counts
        # Less its standard error: a covariance that is too small makes a head too sure.
        error = ((2 * size * noisy.sigma_sums**2 + 4 * between * counts) * noisy.sigma_sums**2).clamp(min=0) / counts**2
        variance = max(1 - max(float(between.sum() - error.sum().sqrt()), 0.0) / rows, LEAST_SHARE) / size
        if (names := trusted_names(noisy)) is not None:
            spectrum, vectors = names_spectrum(names, counts)
            return variance * spectrum, vectors
        return torch.full((size,), variance, dtype=torch.float64), torch.eye(size, dtype=torch.float64)
    gram = unsvec(noisy.gram, size)
    gram.diagonal().add_(noisy.sigma_sums**2 * float((1 / counts).sum()))
    within = gram.addmm_(sums.T, sums / counts[:, None], alpha=-1) / rows
    edge = noisy.edge / rows
    values, vectors = torch.linalg.eigh(within)
    spikes = values > edge
    raised = (values + (values.square() - edge**2).clamp(min=0).sqrt()) / 2
    rest = float(values.sum() - raised[spikes].sum()) / max(int((~spikes).sum()), 1)
    return torch.where(spikes, raised, max(rest, LEAST_EIGENVALUE * edge)), vectors


def temperature_of(head: LinearHead, noisy: NoisySums, draws: int = 64) -> float:
    """Return the temperature of least cross entropy on rows drawn from the noisy class means and covariance.

    No row is looked at: the released sums describe Gaussian classes, whose logits are drawn. Where these classes hardly
    overlap, any low temperature would do, and real rows are less sure than Gaussian ones: it is at least 1.

    Args:
        head: solved from `noisy`.
        noisy: the sums.
        draws: per class.
    """
    counts, spectrum, vectors = noisy.shrunk_counts(), *within_spectrum(noisy)
    generator = torch.Generator().manual_seed(0)
    classes, size = noisy.sums.shape
    weight, bias = head.affine()
    means = noisy.sums / counts[:, None]
    factor = (weight @ vectors * spectrum.sqrt()).T
    drawn = torch.randn(classes, draws, size, generator=generator, dtype=torch.float64) @ factor
    logits = (drawn + (means @ weight.T + bias)[:, None]).flatten(0, 1)
    labels = torch.arange(classes).repeat_interleave(draws)
    chances = (counts / counts.sum()).repeat_interleave(draws) / draws
    temperatures = torch.logspace(0, 2, 25, dtype=torch.float64)
    losses = [
        float(chances @ torch.nn.functional.cross_entropy(logits / one, labels, reduction="none"))
        for one in temperatures
    ]
    return float(temperatures[int(np.argmin(losses))])
