"""Personal heads: exact leave-one-out logits, and the heads at both ends of the weights."""

import math

import pytest
import torch
from torch import Tensor

from fedhead import FeatureStatistics, solve_head
from fedhead.errors import UserError
from fedhead.solvers.personal import WEIGHTS, choose_personal, weighted_discriminant

CLASSES, WIDTH = 3, 6


def drawn(rows: int, seed: int, shift: float = 0.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(CLASSES, WIDTH, generator=torch.Generator().manual_seed(99))
    labels = torch.arange(rows) % CLASSES
    features = centres[labels] + 1.5 * torch.randn(rows, WIDTH, generator=generator) + shift
    return features, labels


def sums(features: Tensor, labels: Tensor) -> FeatureStatistics:
    return FeatureStatistics.from_features(features, labels, num_classes=CLASSES)


@pytest.mark.parametrize("kappa", [0.0, 1.0, 30.0, math.inf])
def test_leave_one_out_logits_are_those_of_a_discriminant_without_the_row(kappa: float) -> None:
    others, own = drawn(60, 0), drawn(24, 1, 0.3)
    site = sums(*own)
    made = weighted_discriminant(sums(*others) + site, site, kappa)
    weight = 1.0 if math.isinf(kappa) else 1 + kappa
    features = torch.cat([others[0], own[0]]).double()
    labels = torch.cat([others[1], own[1]])
    weights = torch.cat([torch.full((60,), 0.0 if math.isinf(kappa) else 1.0), torch.full((24,), weight)]).double()

    def scatter(used: Tensor) -> tuple[Tensor, Tensor]:
        means = torch.stack(
            [(used[labels == c, None] * features[labels == c]).sum(0) / used[labels == c].sum() for c in range(CLASSES)]
        )
        deviations = features - means[labels]
        return (used[:, None] * deviations).T @ deviations, means

    whole, _ = scatter(weights)
    found = made.left_out(*own)
    for row in range(24):
        used = weights.clone()
        used[60 + row] = 0
        within, means = scatter(used)
        matrix = made.kept * within + (1 - made.kept) * whole.diagonal().diag()
        solved = torch.linalg.solve(matrix, means.T).T * used.sum()
        priors = made.priors.clone()
        priors[own[1][row]] -= 1
        logits = solved @ own[0][row].double() - 0.5 * (solved * means).sum(1) + priors.log()
        difference = found[row] - logits
        torch.testing.assert_close(difference - difference.mean(), torch.zeros(CLASSES).double(), atol=1e-8, rtol=0)


def test_without_extra_weight_it_is_the_pooled_head_and_with_infinite_weight_the_sites_own() -> None:
    site, pooled = sums(*drawn(40, 1)), sums(*drawn(200, 0)) + sums(*drawn(40, 1))
    priors = site.counts + pooled.counts / pooled.rows
    for kappa, stats in ((0.0, pooled), (math.inf, site)):
        expected = solve_head(stats, "lda", priors=priors)
        head = weighted_discriminant(pooled, site, kappa).head()
        rows = drawn(50, 7)[0].double()
        difference = (head(rows) - expected(rows)).detach()
        torch.testing.assert_close(difference, difference[:, :1].expand_as(difference), atol=1e-8, rtol=0)


def test_a_site_like_the_others_takes_the_pool_and_one_with_exchanged_labels_itself() -> None:
    others, own = drawn(900, 0), drawn(60, 1)
    pool = sums(*others)
    alike = choose_personal(pool + sums(*own), sums(*own), *own)
    assert not math.isinf(alike.kappa)
    rows, labels = drawn(600, 5)
    alone = weighted_discriminant(pool + sums(*own), sums(*own), math.inf).head()
    right = [int((head(rows.double()).argmax(1) == labels).sum()) for head in (alike.head, alone)]
    assert right[0] >= right[1]
    exchanged = (own[0], (own[1] + 1) % CLASSES)
    odd = choose_personal(pool + sums(*exchanged), sums(*exchanged), *exchanged)
    assert odd.kappa >= 100
    assert odd.loss < 1


def test_a_class_that_the_site_lacks_or_holds_once_is_no_error() -> None:
    features, labels = drawn(31, 3)
    labels = torch.where(labels == 2, 0, labels)
    labels[0] = 2
    site = sums(features, labels)
    pooled = sums(*drawn(90, 0)) + site
    for kappa in WEIGHTS:
        assert bool(weighted_discriminant(pooled, site, kappa).left_out(features, labels).isfinite().all())
    one = sums(features, torch.zeros_like(labels))
    chosen = choose_personal(sums(*drawn(90, 0)) + one, one, features, torch.zeros_like(labels))
    assert math.isfinite(chosen.kappa)
    with pytest.raises(UserError, match="two classes"):
        choose_personal(one, one, features, torch.zeros_like(labels))
