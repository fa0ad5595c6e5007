"""Recommendations for sites with real targets or several labels per row."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import stats as distributions
from torch import Tensor

from fedhead.evaluation.comparison import HEADS
from fedhead.evaluation.diagnosis import SiteDiagnosis
from fedhead.evaluation.loss_comparison import compare_losses, ridge_heads, scaled_losses, t_interval, t_test
from fedhead.evaluation.target_diagnosis import TargetDiagnostics
from fedhead.solvers import solve_head
from fedhead.sums.features import FeatureStatistics
from fedhead.sums.paired import MOST_LOSS, PairedLosses
from fedhead.sums.targets import LABELS, VALUES

pytestmark = pytest.mark.usefixtures("one_thread")


class Problem:
    """Sites whose targets follow one linear relation, except at the sites in `others`, which follow another one."""

    def __init__(self, sizes: dict[str, int], others: tuple[str, ...] = (), noise: float = 0.5, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.kind = VALUES
        weights = torch.randn(2, 10, generator=generator, dtype=torch.float64)
        weights[1] = weights[0].flip(0) * torch.tensor([1.0, -1.0]).repeat(5)
        self.rows: dict[str, tuple[Tensor, Tensor]] = {}
        self.held_out: dict[str, tuple[Tensor, Tensor]] = {}
        for name, size in sizes.items():
            for part, count in ((self.rows, size), (self.held_out, max(size // 2, 2))):
                features = torch.randn(count, 10, generator=generator, dtype=torch.float64)
                signal = features @ weights[int(name in others)]
                error = noise * signal.std() * torch.randn(count, generator=generator, dtype=torch.float64)
                part[name] = (features, (30 + 4 * (signal + error))[:, None])
        self.sites = {name: self.statistics(*rows) for name, rows in self.rows.items()}
        self.pool = sum(self.sites.values(), FeatureStatistics.empty(10, 1, kind=self.kind))
        self.diagnostics = TargetDiagnostics(self.sites, self.pool, ("sugar",))

    def statistics(self, features: Tensor, targets: Tensor) -> FeatureStatistics:
        return FeatureStatistics.from_features(features, targets, 1, kind=self.kind)

    def losses(self, site: str, judge: str) -> PairedLosses:
        """Return the losses of a site's heads on another site's held-out rows."""
        heads, (features, targets) = self.diagnostics.heads(self.sites[site]), self.held_out[judge]
        assert self.diagnostics.scale is not None
        with torch.inference_mode():
            outputs = [heads[name](features) for name in HEADS]
        return scaled_losses(outputs, targets, torch.from_numpy(self.diagnostics.scale))

    def diagnosis(self, site: str) -> SiteDiagnosis:
        found = self.diagnostics.diagnose(site, self.sites[site], self.losses(site, site))
        json.dumps(found.to_dict(), allow_nan=False)
        return found

    def with_harm(self, found: SiteDiagnosis) -> SiteDiagnosis:
        others = [self.losses(found.site, judge) for judge in self.sites if judge != found.site]
        total = PairedLosses.zeros(3)
        for one in others:
            total += one
        return self.diagnostics.with_harm(found, total)


def test_healthy_sites_join_or_have_too_few_rows() -> None:
    problem = Problem({"a": 200, "b": 200, "c": 200, "d": 12})
    told = {name: problem.diagnosis(name) for name in problem.sites}
    assert {told[name].recommendation for name in "abc"} == {"join"}
    assert {told[name].finding for name in "abc"} == {"alike"}
    assert "the shared head explains 7" in told["a"].reason
    assert "its own head explains at most" in told["a"].reason
    few = replace(problem.losses("d", "d"), rows=2)
    unknown = problem.diagnostics.diagnose("d", problem.sites["d"], few)
    assert unknown.recommendation == "not enough rows to tell"
    assert "fewer than 5 held-out rows" in unknown.reason
    assert problem.with_harm(told["a"]) == told["a"]


def test_a_site_with_another_relation_stays_local_and_harms_the_others() -> None:
    problem = Problem({"a": 150, "b": 150, "c": 150, "odd": 200}, others=("odd",))
    found = problem.diagnosis("odd")
    assert found.recommendation == "stay local"
    assert found.finding == "targets look wrong"
    assert found.comparison is not None
    assert not found.comparison.own_is_worse
    harmed = problem.with_harm(found)
    assert "make the shared head worse at the other sites: without them it explains" in harmed.reason
    told = [problem.diagnosis(name) for name in "abc"]
    assert not any(one.unlike or one.recommendation == "stay local" for one in told)


def test_a_site_without_rows_has_the_pools_mean_as_its_own_head() -> None:
    problem = Problem({"a": 100, "b": 100, "c": 100})
    nothing = FeatureStatistics.empty(10, 1, kind=VALUES)
    heads = ridge_heads(nothing, problem.pool, 1.0)
    assert not heads["own"].weight.any()
    torch.testing.assert_close(heads["own"].bias.data, problem.pool.target_mean())
    torch.testing.assert_close(heads["others"].weight.data, solve_head(problem.pool, "ridge", penalty=1.0).weight.data)


def test_heads_for_labels_share_the_sites_own_label_shares() -> None:
    generator = torch.Generator().manual_seed(1)
    features = torch.randn(400, 5, generator=generator, dtype=torch.float64)
    labels = (features[:, :2] + torch.randn(400, 2, generator=generator, dtype=torch.float64) > 0).long()
    skewed = labels[:, 0] == 1
    site = FeatureStatistics.from_features(features[skewed], labels[skewed], 2, kind=LABELS)
    pool = FeatureStatistics.from_features(features, labels, 2, kind=LABELS)
    heads = ridge_heads(site, pool, 1.0)
    for head in heads.values():
        with torch.inference_mode():
            predicted = head(features[skewed]).mean(0)
        torch.testing.assert_close(predicted, labels[skewed].double().mean(0), rtol=0, atol=0.01)


@pytest.mark.parametrize("rows", [5, 12, 100])
def test_intervals_and_p_values_are_those_of_a_t_test(rows: int) -> None:
    generator = np.random.default_rng(rows)
    losses = generator.gamma(2, size=(3, rows))
    losses[0] *= 0.8
    found = compare_losses(PairedLosses.of(losses))
    assert found is not None
    expected = distributions.ttest_rel(losses[1], losses[0])
    assert found.p_value == pytest.approx(expected.pvalue, rel=0.02)
    interval = expected.confidence_interval(0.95)
    width = interval.high - interval.low
    assert found.gain == pytest.approx((interval.low, interval.high), abs=0.01 * width)
    assert found.losses["others"] == pytest.approx(losses[2].mean())
    assert t_interval(0.5, 0.0, 10) == (0.5, 0.5)
    assert (t_test(0.0, 0.0, 10), t_test(0.1, 0.0, 10)) == (1.0, 0.0)


def test_one_row_cannot_decide_a_comparison() -> None:
    outputs = [torch.tensor([[0.0], [1e9]]), torch.zeros(2, 1)]
    sums = scaled_losses(outputs, torch.zeros(2, 1), torch.ones(1))
    np.testing.assert_array_equal(sums.losses, [MOST_LOSS, 0])
