"""Class means that names of classes are near."""

import pytest
import torch
from torch import Tensor

from fedhead.privacy.heads import NoisySums, solve_noisy
from fedhead.privacy.names import names_spectrum, shrink_to_names
from fedhead.privacy.sensitivity import unit_rows

CLASSES, FEATURES, ROWS = 40, 64, 1200
COUNTS = torch.full((CLASSES,), ROWS / CLASSES, dtype=torch.float64)


def drawn(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return rows, their classes, and names of the classes, near which rows are."""
    generator = torch.Generator().manual_seed(seed)

    def normal(rows: int) -> Tensor:
        return torch.randn(rows, FEATURES, generator=generator, dtype=torch.float64)

    names = normal(CLASSES)
    labels = torch.arange(ROWS) % CLASSES
    means = names + 0.7 * normal(CLASSES)
    return unit_rows(means[labels] + 1.5 * normal(ROWS)), labels, unit_rows(names)


def accuracy(rows: Tensor, labels: Tensor, names: Tensor | None, sigma: float, seed: int = 1) -> float:
    generator = torch.Generator().manual_seed(seed)
    sums = torch.zeros(CLASSES, FEATURES, dtype=torch.float64).index_add_(0, labels, rows)
    noise = sigma * torch.randn(sums.shape, generator=generator, dtype=torch.float64)
    head = solve_noisy(NoisySums(COUNTS, sums + noise, None, 1e-3, sigma, names=names))
    return float((head(rows).argmax(1) == labels).double().mean())


def test_names_help_where_sums_are_noisy() -> None:
    rows, labels, names = drawn(0)
    assert accuracy(rows, labels, names, 12.0) > accuracy(rows, labels, None, 12.0) + 0.2
    assert accuracy(rows, labels, names, 0.1) > accuracy(rows, labels, None, 0.1) - 0.01


@pytest.mark.parametrize("sigma", [0.1, 4.0, 12.0])
def test_meaningless_names_do_little_harm(sigma: float) -> None:
    rows, labels, names = drawn(0)
    other = unit_rows(torch.randn(CLASSES, FEATURES, generator=torch.Generator().manual_seed(5), dtype=torch.float64))
    for wrong in (other, torch.ones_like(names), names[:1].expand(CLASSES, -1)):
        assert accuracy(rows, labels, wrong, sigma) > accuracy(rows, labels, None, sigma) - 0.05


def test_exact_means_stay_and_noise_alone_becomes_zero() -> None:
    generator = torch.Generator().manual_seed(0)
    names = unit_rows(torch.randn(CLASSES, FEATURES, generator=generator, dtype=torch.float64))
    deviations = torch.randn(CLASSES, FEATURES, generator=generator, dtype=torch.float64)
    noise = torch.full((CLASSES,), 1e-9, dtype=torch.float64)
    torch.testing.assert_close(shrink_to_names(deviations, names, COUNTS, noise), deviations, atol=1e-6, rtol=0)
    lost = shrink_to_names(100 * deviations, names, COUNTS, noise + 1e4)
    assert float(lost.norm()) < 0.1 * float((100 * deviations).norm())


def test_the_guess_of_a_covariance_is_one() -> None:
    spectrum, vectors = names_spectrum(drawn(2)[2], COUNTS)
    assert float(spectrum.mean()) == pytest.approx(1)
    assert (spectrum.diff() <= 1e-12).all()
    torch.testing.assert_close(vectors.T @ vectors, torch.eye(FEATURES, dtype=torch.float64))
