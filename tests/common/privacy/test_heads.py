import numpy as np
import pytest
import torch
from sklearn.neighbors import NearestCentroid
from torch import Tensor

from fedhead.privacy.heads import NoisySums, solve_noisy, temperature_of, within_spectrum
from fedhead.privacy.mechanism import Mechanism
from fedhead.privacy.sensitivity import svec, unit_rows
from fedhead.privacy.stages import (
    CALIBRATION_NOISE,
    MOST_CALIBRATION,
    Stage,
    better_solver,
    calibration_share,
    centre_of,
    forms,
    mechanism,
    noise_level,
)


def problem(rows: int = 4000, size: int = 12, classes: int = 4, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, classes, (rows,), generator=generator)
    means = torch.randn(classes, size, generator=generator)
    scales = torch.linspace(0.2, 1.5, size)
    features = means[labels] + scales * torch.randn(rows, size, generator=generator)
    return unit_rows(features), labels


def noisy(rows: Tensor, labels: Tensor, mu: float, solver: Stage = "lda", seed: int = 0) -> NoisySums:
    classes, size = int(labels.max()) + 1, rows.shape[1]
    made = mechanism(solver, mu, classes, size)
    exact = {
        "counts": np.bincount(labels, minlength=classes).astype(float),
        "sums": torch.zeros(classes, size, dtype=torch.float64).index_add_(0, labels, rows).numpy(),
        "gram": svec(rows.T @ rows).numpy(),
    }
    drawn = made.add_noise({name: exact[name] for name in made.arrays}, entropy=np.random.default_rng(seed).bytes)
    gram = torch.from_numpy(drawn["gram"]) if "gram" in drawn else None
    counts, sums = torch.from_numpy(drawn["counts"]), torch.from_numpy(drawn["sums"])
    return NoisySums(counts, sums, gram, *(made.sigma(name) for name in made.arrays))


def accuracy(sums: NoisySums, rows: Tensor, labels: Tensor) -> float:
    return float((solve_noisy(sums)(rows).argmax(1) == labels).double().mean())


def test_without_noise_discriminant_analysis_has_the_within_class_covariance() -> None:
    rows, labels = problem()
    values, vectors = within_spectrum(noisy(rows, labels, 900.0))
    centred = rows - torch.stack([rows[labels == c].mean(0) for c in range(4)])[labels]
    covariance = centred.T @ centred / len(rows)
    torch.testing.assert_close((vectors * values) @ vectors.T, covariance, atol=2e-4, rtol=0)


def test_without_noise_nearest_means_have_a_spherical_covariance() -> None:
    rows, labels = problem()
    values, vectors = within_spectrum(noisy(rows, labels, 900.0, "nearest-mean"))
    centred = rows - torch.stack([rows[labels == c].mean(0) for c in range(4)])[labels]
    torch.testing.assert_close(vectors, torch.eye(12, dtype=torch.float64))
    np.testing.assert_allclose(values.numpy(), float(centred.square().mean()), rtol=1e-3)
    head = solve_noisy(noisy(rows, labels, 900.0, "nearest-mean"))
    reference = NearestCentroid().fit(rows.numpy(), labels.numpy()).predict(rows.numpy())
    assert (head(rows).argmax(1).numpy() == reference).mean() > 0.98


def test_noisy_class_means_are_shrunk() -> None:
    rows, labels = problem(rows=300)
    exact, sums = noisy(rows, labels, 900.0, "nearest-mean"), noisy(rows, labels, 0.05, "nearest-mean")
    lengths = [float(solve_noisy(one).weight.detach().norm()) for one in (sums, exact)]
    assert lengths[0] < 3 * lengths[1]


def test_eigenvalues_beyond_the_noise_are_unbiased() -> None:
    rows, labels = problem(size=60)
    clean, _ = within_spectrum(noisy(rows, labels, 900.0))
    sums = noisy(rows, labels, 1.0)
    estimated, _ = within_spectrum(sums)
    edge = sums.edge / len(rows)
    spikes = estimated > 1.05 * edge
    assert 0 < int(spikes.sum()) < 60
    top = int(spikes.sum())
    torch.testing.assert_close(estimated[-top:], clean[-top:], rtol=0.25, atol=edge / 4)
    assert float(estimated.sum()) == pytest.approx(float(clean.sum()), rel=0.2)


@pytest.mark.parametrize("solver", ["lda", "nearest-mean"])
def test_heads_from_noisy_sums_keep_most_of_the_accuracy(solver: Stage) -> None:
    rows, labels = problem()
    clean = accuracy(noisy(rows, labels, 900.0, solver), rows, labels)
    assert accuracy(noisy(rows, labels, 0.7, solver), rows, labels) > clean - 0.03
    # Noise beyond everything leaves a finite head.
    lost = solve_noisy(noisy(rows, labels, 0.01, solver))
    assert all(bool(part.isfinite().all()) for part in lost.affine())


def test_counts_are_shrunk_to_their_mean_and_positive() -> None:
    rows, labels = problem(rows=80)
    counts = noisy(rows, labels, 0.05).shrunk_counts()
    assert bool((counts > 0).all())
    spread = float(counts.max() / counts.min())
    assert spread < 25
    exact = noisy(rows, labels, 900.0).shrunk_counts()
    np.testing.assert_allclose(exact.numpy(), np.bincount(labels), atol=0.1)


@pytest.mark.parametrize("solver", ["lda", "nearest-mean"])
def test_temperature_lowers_the_loss_of_noisy_heads(solver: Stage) -> None:
    rows, labels = problem()
    sums = noisy(rows, labels, 0.3, solver)
    head = solve_noisy(sums)
    temperature = temperature_of(head, sums)
    plain, scaled = (
        float(torch.nn.functional.cross_entropy(head(rows).detach() / one, labels)) for one in (1.0, temperature)
    )
    assert scaled <= plain + 0.02
    assert scaled < np.log(4)


def test_public_figures_choose_the_solver() -> None:
    levels = [noise_level(rows, classes, 200, mu) for rows, classes, mu in ((1437, 10, 1.6), (2500, 77, 1.6))]
    assert [better_solver(level) for level in levels] == ["lda", "nearest-mean"]
    assert noise_level(100, 4, 24, 0.5) == pytest.approx(4 * 5 / 50)


def test_a_calibration_spends_no_more_than_it_needs() -> None:
    shares = [calibration_share(rows, 0.25) for rows in (30, 1000, 2500, 10**4, 10**6)]
    assert shares[0] == 0
    assert shares[1] == MOST_CALIBRATION
    assert shares[1:] == sorted(shares[1:], reverse=True)
    noise = mechanism("calibration", 0.25 * shares[3] ** 0.5, 5, 5).sigma("excess") / 10**4
    assert noise == pytest.approx(CALIBRATION_NOISE, rel=0.01)


def test_a_centre_of_noise_alone_is_near_zero() -> None:
    rng = np.random.default_rng(0)
    drawn = centre_of(1000.0, rng.normal(size=200) * 30, 30.0)
    assert np.linalg.norm(drawn) < 0.2
    kept = centre_of(1000.0, np.full(4, 300.0), 0.1)
    np.testing.assert_allclose(kept, 0.3, rtol=1e-4)
    assert np.linalg.norm(centre_of(-5.0, np.full(4, 300.0), 0.1)) <= 1


def test_stages_spend_what_they_are_given() -> None:
    for stage in ("centre", "lda", "nearest-mean", "calibration", "evaluation"):
        made: Mechanism = mechanism(stage, 0.3, 7, 20)  # type: ignore[arg-type]
        assert 0.299 < made.mu <= 0.3
        assert sum(share for share, _, _ in forms(stage, 7, 20).values()) == pytest.approx(1)  # type: ignore[arg-type]
